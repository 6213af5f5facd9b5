"""What pytest leaves out of src's doctests: modules whose compiler or library isn't here."""

from importlib.util import find_spec

# PyTorch's builds for CPUs come without Triton, and what is written in it can't even be imported.
_IN_TRITON = ["src/moefit/quant/gpu/*.py"]

_WITH_LM_EVAL = [
    f"src/moefit/tasks/{name}.py" for name in ("harness", "lm", "local_data", "run", "__main__")
]

collect_ignore_glob = [
    *([] if find_spec("triton") else _IN_TRITON),
    *([] if find_spec("lm_eval") else _WITH_LM_EVAL),
]
