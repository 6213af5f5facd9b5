"""Measure the speed of packing, compared with the disk, and the start-up time of packed models.

    python benchmarks/pack_speed.py FOLDER [--formats int8,int4,int2] [--threads 2] [--save NAME]
        [--prompt-tokens 64] [--memory 5GiB]

Encoding: one expert's matrices in memory, by kernels and by torch, with the fitted encoder and by
rounding to nearest. Packing: the whole model into a temporary cache folder with a cold page cache,
compared with the time to read and write as many bytes at the disk's measured speed. Start-up: from
`load` to the first token of a prompt, by when most experts have been used; from the checkpoint,
encoded while reading, and packed, each with a cold page cache and in a process of its own. MB/s
are of the checkpoint's bytes unless marked as written.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import record
import torch
from rich.console import Console
from rich.table import Table
from rivals import drop_page_cache

import moefit
from moefit.api import folder_of
from moefit.evaluate.bandwidth import measure_bandwidth
from moefit.folders import cache_root
from moefit.quant.cpu_kernels import status
from moefit.quant.encode import Encoder, encode_into
from moefit.quant.format import GroupedFormat, is_matrix, parse_format
from moefit.quant.grouped_int import GroupedMatrix
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.io.reader import ExpertStore
from moefit.serve.packed.build import pack

ENCODERS: tuple[Encoder, ...] = ("fitted", "nearest")
WRITTEN = 256 << 20  # bytes that measure the disk's speed
ROUNDS = 3


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.start:
        print(json.dumps(start(arguments)))
        return
    folder, names = folder_of(arguments.folder), arguments.formats.split(",")
    skeleton = build_skeleton(folder)
    results: dict[str, Any] = {"kernels": status()}
    results["encoding"] = encoding(skeleton, names)
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="pack-speed-") as place:
        disk = {
            "read": measure_bandwidth(folder, arguments.threads).storage,
            "write": write_speed(Path(place)),
        }
        results["disk"] = disk
        results["starting"] = {NATIVE: started(arguments, NATIVE, place)}
        for name in names:
            results["starting"][f"{name}, encoded"] = started(arguments, name, place)
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": place}):
            results["packing"] = {name: packing(skeleton, name, disk) for name in names}
        for name in names:
            results["starting"][f"{name}, packed"] = started(arguments, name, place)
    for one in tables(results):
        Console(width=100).print(one)
    if arguments.save:
        notes = (
            "encoding: bytes of the checkpoint's dtype a second, best of rounds; packing: of_disk "
            "is the share of the seconds that reading and writing take at the disk's own speed; "
            f"starting: seconds from load to the first token after {arguments.prompt_tokens}"
        )
        print(record.write("pack-speed", results, notes=notes, suffix=arguments.save))


NATIVE = "native"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--formats", default="int8,int6,int5,int4,int3,int2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--memory", help="of the start-ups; all that it takes if not given")
    parser.add_argument("--save", metavar="NAME")
    parser.add_argument("--start", metavar="PRECISION", help=argparse.SUPPRESS)
    return parser.parse_args()


def encoding(skeleton: Skeleton, names: list[str]) -> dict[str, dict[str, float]]:
    """Return bytes per second for one expert by format, encoder, kernels or torch."""
    blocks = {block.name: block for block in skeleton.blocks}
    block = skeleton.blocks[0]
    store = ExpertStore(skeleton.checkpoint, skeleton.map.experts, blocks)
    native = store.native(block.name, 0)
    matrices = [native[short] for short, spec in block.layout.specs.items() if is_matrix(spec)]
    rates: dict[str, dict[str, float]] = {}
    for name in names:
        format = parse_format(name)
        assert isinstance(format, GroupedFormat), name
        rates[name] = {}
        for encoder in ENCODERS:
            rates[name][encoder] = rate(matrices, format.bits, encoder)
            with mock.patch("moefit.quant.encode.kernels", lambda: None):
                rates[name][f"{encoder}, torch"] = rate(matrices, format.bits, encoder)
    return rates


def rate(matrices: list[torch.Tensor], bits: int, encoder: Encoder) -> float:
    targets = [GroupedMatrix.empty(len(one), one.shape[1], bits) for one in matrices]
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for target, matrix in zip(targets, matrices, strict=True):
            encode_into(target, matrix, encoder)
        best = min(best, time.perf_counter() - began)
    return sum(one.nbytes for one in matrices) / best


def write_speed(folder: Path) -> float:
    """Return bytes per second including fsync."""
    data, path = os.urandom(8 << 20), folder / "written"
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(WRITTEN // len(data)):
            file.write(data)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return WRITTEN / seconds


def packing(skeleton: Skeleton, name: str, disk: dict[str, float]) -> dict[str, Any]:
    """Measure packing without the check of existing files."""
    drop_page_cache(skeleton.checkpoint.folder.glob("*.safetensors"))
    made = pack(skeleton, [parse_format(name)])
    bound = made.bytes_read / disk["read"] + made.bytes_written / disk["write"]
    return {
        "seconds": made.seconds,
        "read": made.bytes_read / made.seconds,
        "written": made.bytes_written / made.seconds,
        "of_disk": bound / made.seconds,
        "relative_error": made.relative_errors[name],
    }


def started(arguments: argparse.Namespace, precision: str, cache: str) -> dict[str, Any]:
    """Run `start` in a process of its own with the packed files of `cache`."""
    drop_page_cache(folder_of(arguments.folder).glob("*.safetensors"))
    drop_page_cache(Path(cache).rglob("*.safetensors"))
    command = [sys.executable, *sys.argv, "--start", precision]
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def start(arguments: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    with moefit.load(
        arguments.folder, precision=arguments.start, memory=arguments.memory, context=256
    ) as served:
        loaded = time.perf_counter() - began
        vocabulary = served.model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        prompt_1T = torch.randint(0, vocabulary, (1, arguments.prompt_tokens), generator=generator)
        served.model(prompt_1T)
        report = served.report()
        return {
            "load": loaded,
            "first_token": time.perf_counter() - began,
            "resident": sum(len(one) for one in report["resident"].values()),
            "experts": sum(report["experts"].values()),
            "experts_from": report["experts_from"],
            "bytes_read": report["bytes_read"],
        }


def tables(results: dict[str, Any]) -> list[Table]:
    encoding = Table(title=f"encoding, MB/s, kernels: {results['kernels']}", title_justify="left")
    encoding.add_column("format")
    for way in next(iter(results["encoding"].values())):
        encoding.add_column(way, justify="right")
    for name, rates in results["encoding"].items():
        encoding.add_row(name, *(f"{one / 1e6:.0f}" for one in rates.values()))
    disk = results["disk"]
    packing = Table(
        title=f"packing; the disk reads {disk['read'] / 1e6:.0f} MB/s, writes "
        f"{disk['write'] / 1e6:.0f}",
        title_justify="left",
    )
    for name in ("format", "seconds", "MB/s read", "MB/s written", "of the disk's speed"):
        packing.add_column(name, justify="left" if name == "format" else "right")
    for name, one in results["packing"].items():
        speeds = f"{one['read'] / 1e6:.0f}", f"{one['written'] / 1e6:.0f}"
        packing.add_row(name, f"{one['seconds']:.1f}", *speeds, f"{one['of_disk']:.0%}")
    starting = Table(title="starting, seconds", title_justify="left")
    for name in ("experts", "loaded", "first token", "experts read", "MB read"):
        starting.add_column(name, justify="left" if name == "experts" else "right")
    for name, one in results["starting"].items():
        experts = f"{one['resident']}/{one['experts']}"
        seconds = f"{one['load']:.2f}", f"{one['first_token']:.2f}"
        starting.add_row(name, *seconds, experts, f"{one['bytes_read'] / 1e6:.0f}")
    return [encoding, packing, starting]


if __name__ == "__main__":
    main()
