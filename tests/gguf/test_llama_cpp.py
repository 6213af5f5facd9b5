"""llama.cpp loads what is written, computes the same logits and tokenises the same."""

import ctypes

import numpy as np
import pytest
import torch
from converted_delta_net import DELTA_NETS
from converted_gguf import CONVERTED, deepseek, glm4_moe, gpt_oss
from tiny_gguf import VOCABULARY as IDS
from tiny_gguf import configs
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from moefit.gguf.write import write_gguf
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.train.data.tokenizer import train_bpe

pytest.importorskip("gguf", reason="needs the package gguf (moefit[gguf])")
llama = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (moefit[rivals])")
from gguf_files import write_file  # noqa: E402 - needs the package

VOCABULARY = 400
CONFIGS = configs(vocab_size=VOCABULARY)
TEXTS = (
    "the cat sat on the mat",
    "It's 1234 cats,  isn't it?\n\n\tdef cat(x):\n        return x ** 2",
    "naïve café: “cats” 漢字 🙂 ½",
)


class LlamaCpp:
    """A model in llama.cpp on one thread, with keys and values in float32."""

    def __init__(self, path):
        settings = llama.llama_model_default_params()
        self.model = llama.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model, f"llama.cpp cannot load {path}"
        options = llama.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 128
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = 0  # float32
        options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to 16 bits
        self.context = llama.llama_init_from_model(self.model, options)
        self.vocabulary = llama.llama_model_get_vocab(self.model)

    def tokens(self, text):
        data = text.encode()
        found = (llama.llama_token * (len(data) + 8))()
        count = llama.llama_tokenize(
            self.vocabulary, data, len(data), found, len(found), True, True
        )
        return list(found[:count])

    def logits(self, ids):
        """Return the logits after the last of some tokens, which are alone in the context."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        tokens = (llama.llama_token * len(ids))(*ids)  # the batch points into it
        batch = llama.llama_batch_get_one(tokens, len(ids))
        assert llama.llama_decode(self.context, batch) == 0
        size = llama.llama_vocab_n_tokens(self.vocabulary)
        pointer = llama.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, shape=(size,)).copy()

    def close(self):
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)


@pytest.fixture(scope="module", autouse=True)
def silence():
    callback = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    yield
    llama.llama_log_set(llama.llama_log_callback(0), ctypes.c_void_p(0))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_tokens_equal_ours(tmp_path, name):
    torch.manual_seed(0)
    tokenizer = train_bpe(TEXTS, VOCABULARY)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", type="f32")
    theirs = LlamaCpp(tmp_path / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert theirs.tokens(text) == ids
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].numpy()
        np.testing.assert_allclose(theirs.logits(ids), expected, atol=1e-3)
    theirs.close()


# llama.cpp takes a DeepSeek-V2 for a Lite by its number of layers, reads no part of a layer for a
# further token, and rounds YaRN's boundaries for gpt-oss (docs/checkpoints.md).
READ = {
    **CONVERTED,
    **DELTA_NETS,
    "v2-lite, one tensor": lambda: deepseek("v2-lite", split=False, layers=27),
    "glm4moe": lambda: glm4_moe(further=False),
    "gpt-oss": lambda: gpt_oss(scaled=False),
}


@pytest.mark.parametrize("kind", READ)
def test_llama_cpp_computes_the_same_from_files_of_its_converters(tmp_path, kind):
    """On the same file: logits, and tokens decoded greedily from several prompts."""
    _, metadata, tensors = READ[kind]()
    architecture = metadata["general.architecture"]
    metadata |= {"tokenizer.ggml.model": "no_vocab", f"{architecture}.vocab_size": IDS}
    path = write_file(tmp_path / "m.gguf", metadata, tensors)
    atol = 1e-3 if kind in DELTA_NETS else 1e-4  # whose logits are larger, after sums in a state
    theirs = LlamaCpp(path)
    with load_model(path, LoadSettings()) as served, torch.no_grad():
        for first in (0, 100):
            ids = [(first + 11 * number) % IDS for number in range(12)]
            for _ in range(4):
                mine = served.model(torch.tensor([ids])).logits[0, -1].numpy()
                np.testing.assert_allclose(theirs.logits(ids), mine, atol=atol)
                ids.append(int(mine.argmax()))
    theirs.close()
