"""One thread per test process: the tests' tensors are tiny, and on shared cores OpenMP's waiting
threads cost ten times the work. Set before torch is imported; subprocesses inherit it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
