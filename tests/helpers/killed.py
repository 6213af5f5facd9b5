"""A process that packs, and is killed when so many blocks have been written."""


def killed_packing(call: str, imports: str = "") -> str:
    """A script; argv: the model's folder, and after how many written experts it is killed."""
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
