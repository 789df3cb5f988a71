#!/usr/bin/env bash
# Tests and measurements on a machine with a GPU, in under nine minutes: OUT=folder bench/gpu.sh
#
# It needs Python 3.11 or newer with torch, triton, numpy, psutil, tqdm and pytest; nvcc and a C++ compiler for the
# native libraries, which are built for this GPU alone; no network. In OUT it leaves log.txt, and the record, tables and
# plots of each suite. A step that fails or takes too long does not stop the next one; the exit status is 1 if one did. A
# suite that was out of time leaves what it has: RESUME=1 goes on with it, on the same commit and with the same OUT.
#
#   OUT      where to leave all that (default bench/out/gpu)
#   WHEELS   a folder of wheels that is installed first: opacus, and what else is missing of its dependencies
#   PYTHON   default python3

cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/out/gpu}
mkdir -p "$OUT" || exit 1
export PYTHONPATH=.:kernels PYTHONUNBUFFERED=1 TQDM_DISABLE=1
export DPFAST_CACHE_DIR=${DPFAST_CACHE_DIR:-$PWD/build/gpu} # the libraries, and the planner's rates

results=()
failed=0

# step SECONDS COMMAND...: run it for at most so long
step() {
    local limit=$1 start=$SECONDS status
    shift
    printf '\n=== %s\n' "$*"
    timeout --kill-after=15 "$limit" "$@" 2>&1
    status=$?
    [ "$status" -eq 0 ] || failed=1
    results+=("$(printf 'status %3d  %4d s  %s' "$status" "$((SECONDS - start))" "$*")")
}

all() {
    if [ -n "${WHEELS:-}" ]; then
        step 20 "$PYTHON" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
    fi
    step 110 "$PYTHON" -m dpfast doctor # its first question for the libraries builds them
    step 70 "$PYTHON" -m pytest -m gpu -q
    step 80 "$PYTHON" -m pytest tests/kernels -q -m "not compiles" # with a GPU these compile their kernels
    step 80 "$PYTHON" -m dpfast bench --suite kernels --device cuda --seconds 25 --out "$OUT" ${RESUME:+--resume}
    step 165 "$PYTHON" -m dpfast bench --suite models --device cuda --seconds 40 --out "$OUT" ${RESUME:+--resume} \
        --model gpt2-medium llama-1b-lora llama-1b vit-s bert-base gpt2 resnet18 wrn16-4 mlp
    printf '\n=== in all %d s (status 124: out of time)\n' "$SECONDS"
    printf '%s\n' "${results[@]}"
    return "$failed"
}

all > >(tee "$OUT/log.txt")
status=$?
wait # for tee
exit "$status"
