"""What pytest leaves out of src's doctests: modules whose compiler isn't here."""

from importlib.util import find_spec

# PyTorch's builds for CPUs come without Triton, and what is written in it can't even be imported.
_IN_TRITON = ["src/moefit/quant/triton_*.py", "src/moefit/quant/gpu_kernels.py"]

collect_ignore_glob = [] if find_spec("triton") else _IN_TRITON
