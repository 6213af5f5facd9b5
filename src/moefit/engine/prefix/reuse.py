"""Whether requests of a model reuse keys and values of others, and which may.

Reuse needs a cache that is nothing but keys and values of tokens, which is tried with the model
itself, and operations that round a token alike in every batch (`invariance`), so that answers are
the same bits as without. Requests share keys and values only if they have the same salt and the
model is served alike: by the same policy, with the same formats of experts.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch

from moefit.engine.api import ReuseSetting
from moefit.engine.invariance import Invariance
from moefit.engine.prefix.cache import PrefixCache
from moefit.engine.prefix.tree import Prefix
from moefit.engine.runners import Runner, RunnerInput
from moefit.serve.config import Policy
from moefit.serve.memory.budget import MemoryBudget
from moefit.serve.model import ServedModel

_EXACT = "exact"
_REST = 3  # tokens of the trial after whole blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Whether requests reuse keys and values.

    Attributes:
        active: Whether they do.
        reason: Why not, or what to know.
    """

    active: bool
    reason: str = ""

    def describe(self) -> str:
        """Return a line for people."""
        words = "prefixes of prompts are reused" if self.active else "prefixes are not reused"
        return f"{words}: {self.reason}" if self.reason else words


class PrefixReuse:
    """Reuse of keys and values between the requests of an engine.

    Args:
        served: Its model.
        runner: That computes its requests; no request may be running.
        setting: auto: where answers are the same bits; on: where it is possible; off.
    """

    def __init__(self, served: ServedModel, runner: Runner, setting: ReuseSetting):
        self._served, self._cache, self._setting = served, runner.prefixes, setting
        self._obstacle = None if setting == "off" else find_obstacle(served, runner)
        self._versions = count(1)
        self._seen: tuple[MemoryBudget, Policy, bool] | None = None
        self._state, self._durable = "", False

    def coverage(self, invariance: Invariance) -> Coverage:
        """Return whether requests reuse keys and values in the mode in force."""
        if self._setting == "off":
            return Coverage(active=False, reason="switched off")
        if self._obstacle is not None:
            return Coverage(active=False, reason=self._obstacle)
        if invariance.covered:
            return Coverage(active=True)
        first = invariance.not_covered[0]
        cause = f"{first.module}: {first.reason}"
        if self._setting == "on":
            return Coverage(
                active=True, reason=f"answers may differ from those without reuse ({cause})"
            )
        return Coverage(
            active=False, reason=f"answers would depend on it ({cause}); switch it on to reuse them"
        )

    def prefix_of(self, prompt: Sequence[int], salt: str, invariance: Invariance) -> Prefix | None:
        """Return what a prompt may reuse and leave to others; None if that is nothing.

        Args:
            prompt: Token ids.
            salt: Only requests with the same salt share keys and values.
            invariance: Of the mode in force.
        """
        if not self.coverage(invariance).active:
            return None
        name = self._namespace(salt)
        return Prefix(namespace=name, tokens=prompt, durable=self._durable)

    def is_current(self, prefix: Prefix, salt: str) -> bool:
        """Return whether the model is still served as when `prefix_of` returned a prefix."""
        return prefix.namespace == self._namespace(salt)

    def _namespace(self, salt: str) -> str:
        return hashlib.sha256(repr((salt, self._served_as())).encode()).hexdigest()

    def _served_as(self) -> str:
        """Return a text that is the same while keys and values are computed in the same way."""
        now = (self._served.budget, self._served.policy, self._served.adapts_precision)
        if self._seen is None or any(a is not b for a, b in zip(now, self._seen, strict=True)):
            self._seen = now
            adapts = self._served.adapts_precision  # then formats change between steps
            formats = None if adapts else uniform_formats(self._served)
            mode = _mode_of(self._served.policy)
            self._state = f"{mode} {formats or next(self._versions)}"
            self._durable = formats is not None and mode == _EXACT
        return self._state


def _mode_of(policy: Policy) -> str:
    """Return the fields of a policy that keys and values depend on."""
    return _EXACT if policy.mode == policy.prefill == "exact" else repr(policy)


def uniform_formats(served: ServedModel) -> str | None:
    """Return the formats of experts by block; None if they differ within a block.

    Where they differ, a change of the budget may change the format of any expert.
    """
    digest = hashlib.sha256()
    for name, experts in served.blocks.items():
        formats = {slot.format.name for slot in experts.slots.values()}
        if len(formats) > 1:
            return None
        digest.update(f"{name} {sorted(formats)}\n".encode())
    return digest.hexdigest()


def find_obstacle(served: ServedModel, runner: Runner) -> str | None:
    """Return why a model's keys and values cannot be reused, or None.

    Computes a text twice, the second time with keys and values of the first, and compares the
    logits. Experts return zeros meanwhile.
    """
    cache, name = runner.prefixes, type(served.model).__name__
    if cache is None:
        return f"requests of {name} are computed one at a time, each with a cache of its own"
    tokens = 2 * cache.block + _REST
    if 2 * tokens > cache.places:
        return f"the KV cache holds fewer than {2 * tokens} tokens"
    vocabulary: int = served.model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(min(3, vocabulary - 1), vocabulary, (tokens,), generator=generator)
    try:
        with torch.inference_mode(), served.zero_experts():
            same = _same_logits(runner, cache, text.tolist())
    except Exception as error:  # noqa: BLE001 - any error in a family's code
        return f"{type(error).__name__}: {error}"
    finally:
        for request in _TRIALS:
            runner.close(request, keep=False)
        cache.reset()
    return None if same else f"the cache of {name} holds more than keys and values of tokens"


_TRIALS = ("first", "copied")


def _same_logits(runner: Runner, cache: PrefixCache, text: Sequence[int]) -> bool:
    prefix, outputs = Prefix(namespace="trial", tokens=text), []
    whole = len(text) - _REST
    for request in _TRIALS:
        past = runner.open(request, len(text), prefix)
        if not past:
            step = RunnerInput(request=request, tokens=text[:whole], past=0, num_logits=1)
            runner.step([step])
            runner.extend(request, text, whole)
        rest = RunnerInput(request=request, tokens=text[whole:], past=whole, num_logits=_REST)
        outputs.append(runner.step([rest]).clone())
    assert cache.stats().hits == whole, "the second text was not reused"
    return torch.equal(*outputs)
