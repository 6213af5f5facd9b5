#!/bin/bash
# Everything that needs a GPU, in one run of at most ten minutes, with a record:
#   benchmarks/gpu.sh [--dry-run]
# tests marked gpu, Triton kernels, decoding in memory and offloaded beside transformers (and vLLM or
# llama.cpp where they are installed), the rules that divide misses with the host, the host tier, and
# training at 300 M parameters. Each part has a time limit; one that fails is noted, and the others run.
# --dry-run runs the same commands on the CPU with the shipped model and tiny sizes, to check them.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
export PYTHONPATH=$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}

if [ "${1:-}" = --dry-run ]; then
    DEVICE=cpu MODEL=reference TRAIN=tiny LIMIT=10 TESTS=(--collect-only -q)
    KERNELS=(--device cpu --width 64 --inner 64 --experts 4 --top-k 2)
    export TRITON_INTERPRET=1
elif [ $# -gt 0 ]; then
    echo "gpu.sh takes no argument but --dry-run, and was given: $*" >&2
    exit 2
else
    DEVICE=cuda MODEL=$OUT/model TRAIN=300m LIMIT=1 TESTS=(-x -q) KERNELS=()
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "there is no GPU here; --dry-run checks the commands on a CPU" >&2
        exit 1
    }
fi

part() { # NAME SECONDS COMMAND...: run it within its time, and note how it ended
    local name=$1 seconds=$2 began=$SECONDS code
    shift 2
    echo "== $name: $*"
    timeout "$((seconds * LIMIT))" "$@" > "$OUT/$name.log" 2>&1
    code=$?
    tail -n 15 "$OUT/$name.log"
    echo "$name $code $((SECONDS - began))" >> "$OUT/parts.txt"
}

part tests 120 "$PYTHON" -m pytest -m gpu "${TESTS[@]}" tests/quant/test_gpu_kernels.py tests/serve
if "$PYTHON" -c 'import triton' 2> "$OUT/triton.log"; then
    part kernels 60 "$PYTHON" benchmarks/triton_kernels.py "${KERNELS[@]}"
else
    echo "== kernels: Triton is not installed, and nothing was run"
    [ $DEVICE = cpu ] || echo "kernels 1 0" >> "$OUT/parts.txt"
fi
if [ $DEVICE = cuda ]; then
    part checkpoint 60 "$PYTHON" benchmarks/make_checkpoint.py olmoe-1b-7b "$MODEL" --layers 4 --tokenizer reference
fi
for what in memory offloaded rules host transformers rivals; do
    part $what 50 "$PYTHON" benchmarks/gpu.py $what --model "$MODEL" --device $DEVICE --out "$OUT"
done
part training 60 "$PYTHON" benchmarks/gpu.py training --size $TRAIN --device $DEVICE --out "$OUT"
if [ $DEVICE = cuda ]; then
    "$PYTHON" benchmarks/gpu.py record --out "$OUT" --device $DEVICE
else
    cat "$OUT/parts.txt"
    ! awk '$2 != 0' "$OUT/parts.txt" | grep .
fi
