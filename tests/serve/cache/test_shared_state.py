import torch
from tiny_served import MemoryStore, mixtral_block

from moefit.quant.format import NATIVE
from moefit.serve.cache.scores import VirtualExpertManager
from moefit.serve.cache.slot import allocate_slot
from moefit.serve.cache.swaps import SharedState
from moefit.serve.config import Policy
from moefit.serve.io.loads import Transfer


def live() -> SharedState:
    transfer = Transfer(MemoryStore(*mixtral_block()), readers=1)
    transfer.close()
    return SharedState(policy=Policy(), manager=VirtualExpertManager(), transfer=transfer)


def test_spare_bytes_include_all_kinds() -> None:
    one = live()
    assert one.spare_bytes == 0
    specs = mixtral_block()[0].layout.specs
    small, other = (allocate_slot(NATIVE, specs, torch.device("cpu")) for _ in range(2))
    one.spares["bf16", 1] = [small]
    one.spares["bf16", 2] = [other, small]
    one.spares["int4", 3] = []
    assert one.spare_bytes == 3 * small.nbytes


def test_two_models_share_no_state() -> None:
    one, other = live(), live()
    one.spares["bf16", 1] = []
    one.counters.swaps += 1
    assert not other.spares and not other.counters.swaps
    assert one.lock is not other.lock
