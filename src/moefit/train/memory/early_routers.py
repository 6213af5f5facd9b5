"""Fit routers that see the previous token and the embedding to those that they replace.

A fine-tune to `pregated: previous_token_and_embedding` from a model that routes by a token's own
state would begin with routers that choose experts as good as at random, and the loss of the text
teaches them slowly: it reaches only the experts that were chosen. So before the first step they are
fitted to the choice of the old routers, on the first batches of the run: KL(old || new), as
`loss.gate_kl` has it, with all other weights as they are and routing by the old routers.

Shapes: B sequences, T tokens, E experts.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moefit.checkpoint.config import read_config
from moefit.dsmoe.block import DsMoeBlock
from moefit.dsmoe.config import PREVIOUS_AND_EMBEDDING
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.dsmoe.previous_token import PreviousToken, normed_embedding
from moefit.train.config import TrainConfig
from moefit.train.data.batches import model_inputs, training_batches
from moefit.train.data.tokens import PreparedData
from moefit.train.model import initial_folder

BATCHES = 64  # of the run's first
_REPEATS = 4  # steps with each
_RATE = 0.1  # of Adam at the start, divided by the root of the width; falls to zero


def fit_early_routers(
    config: TrainConfig, model: PreTrainedModel, data: PreparedData
) -> str | None:
    """Fit a model's routers if its run begins with those of a model that is not pre-gated.

    Args:
        config: Of a run that is not resumed.
        model: With the weights that it begins with.
        data: Its text.

    Returns:
        What was done; None if nothing.
    """
    if getattr(model.config, "pregated", False) != PREVIOUS_AND_EMBEDDING:
        return None
    if config.start_from is None or config.continue_from is not None:
        return None
    if read_config(initial_folder(config.start_from)).get("pregated", False):
        return None
    assert isinstance(model, DsMoeForCausalLM)
    batches = training_batches(config, data)
    end = data.tokenizer.eos_token_id
    assert isinstance(end, int)
    document_end = end if config.data.document_mask else None
    ids = (batches.batch(number) for number in range(BATCHES))
    kl = fit_routers(model, ids, BATCHES, document_end)
    return f"fitted routers to those of start_from: KL {kl:.3f} nats per layer"


def fit_routers(
    model: DsMoeForCausalLM, batches: Iterable[Tensor], count: int, document_end: int | None
) -> float:
    """Fit a model's routers to the choice that they make of a token's own state.

    Args:
        model: With the weights of a model that is not pre-gated.
        batches: Token ids [B, T + 1].
        count: Their number.
        document_end: Token that ends a document, whose tokens see no other; None for one stretch.

    Returns:
        The mean KL(old || new) per block over the last batch, in nats.
    """
    blocks = [one for one in model.modules() if isinstance(one, DsMoeBlock)]
    fitted = nn.ModuleList()
    for block in blocks:
        assert block.gate is not None
        router = copy.deepcopy(block.gate)
        nn.init.zeros_(router.weight)  # as fitted to a token's own state it says nothing here
        fitted.append(router)
    rate = _RATE * model.config.hidden_size**-0.5
    optimizer = torch.optim.Adam(fitted.parameters(), lr=rate)
    steps = count * _REPEATS
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    loss = torch.zeros(())
    for ids_BN1 in batches:
        ids_BT = ids_BN1[:, :-1].to(model.device)
        inputs, old = _old_choices(model, blocks, ids_BT, document_end)
        previous = _previous(model, ids_BT, document_end)
        for _ in range(_REPEATS):
            loss = torch.zeros((), device=model.device)
            for number, router in enumerate(fitted):
                new_TE = router(inputs[number], shift=previous.of_block(number)).log_softmax(-1)
                loss = loss + F.kl_div(new_TE, old[number], reduction="batchmean", log_target=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for block, router in zip(blocks, fitted, strict=True):
        assert block.gate is not None
        block.gate.load_state_dict(router.state_dict())
    return loss.item() / len(blocks)


@torch.no_grad()
def _old_choices(
    model: DsMoeForCausalLM, blocks: list[DsMoeBlock], ids_BT: Tensor, document_end: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the blocks' inputs [B, T, D] and their routers' log scores [B * T, E]."""
    inputs: list[Tensor] = []
    hooks = [one.register_forward_pre_hook(lambda _, x: inputs.append(x[0])) for one in blocks]
    form, training = model.config.pregated, model.training
    try:
        model.config.pregated = False  # the old model: each token is routed by its own state
        rule = model.config.training_rule
        model.eval()(use_cache=False, rule=rule, **model_inputs(ids_BT, document_end))
    finally:
        model.config.pregated = form
        model.train(training)
        for hook in hooks:
            hook.remove()
    old: list[Tensor] = []
    for block, x_BTD in zip(blocks, inputs, strict=True):
        assert block.gate is not None
        old.append(block.gate.logits(x_BTD).flatten(0, 1).log_softmax(-1))
    return inputs, old


@torch.no_grad()
def _previous(model: DsMoeForCausalLM, ids_BT: Tensor, document_end: int | None) -> PreviousToken:
    positions = model_inputs(ids_BT, document_end).get("position_ids")
    if positions is None:
        positions = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
    x_BTD = model.get_input_embeddings()(ids_BT)
    embedding_BTD = normed_embedding(x_BTD, model.config.rms_norm_eps)
    return PreviousToken.of(None, positions, None, embedding_BTD, model.config.num_hidden_layers)
