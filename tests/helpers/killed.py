"""A process that packs and is killed after a number of written experts."""


def killed_packing(call: str, imports: str = "") -> str:
    """A script; arguments: the model's folder, and the number of experts to write."""
    return f"""
import os, signal, sys
from pathlib import Path
from moefit.quant.format import parse_format
from moefit.serve.packed.file import PackedWriter
from moefit.serve.packed.build import pack
from moefit.serve.hf.skeleton import build_skeleton as build
{imports}
left = int(sys.argv[2])
own = PackedWriter.write
def write(self, *arguments):
    global left
    own(self, *arguments)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
PackedWriter.write = write
{call}
"""
