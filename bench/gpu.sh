#!/usr/bin/env bash
# Tests and measurements on a machine with a GPU, in under nine minutes: OUT=folder bench/gpu.sh
#
# It needs Python 3.11 or newer with torch, triton, numpy, psutil, tqdm, matplotlib and pytest; nvcc and a C++ compiler
# for the native libraries, which are built for this GPU alone; no network. In OUT it leaves log.txt, and the record,
# tables and plots of each suite. A step that fails or takes too long does not stop the next one; the exit status is 1 if
# one did. A suite that was out of time leaves what it has: RESUME=1 goes on with it, on the same sources and with the
# same OUT, and with nothing else. Where OUT is emptied between two calls, carry the unfinished records (*.json) into it.
#
#   OUT      where to leave all that (default bench/out/gpu)
#   WHEELS   a folder of wheels that is installed first: opacus, and what else is missing of its dependencies
#   PYTHON   default python3
#   COMMIT   which one this is, for the records, where the sources are a copy without git

theirs=
IFS=: read -ra entries <<<"${PYTHONPATH:-}"
for entry in "${entries[@]}"; do # they are meant from where we were called
    case $entry in /*) theirs+=:$entry ;; *) theirs+=:$PWD/$entry ;; esac
done
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/out/gpu}
mkdir -p "$OUT" || exit 1
export PYTHONPATH=$PWD:$PWD/kernels$theirs PYTHONUNBUFFERED=1 TQDM_DISABLE=1
export DPFAST_CACHE_DIR=${DPFAST_CACHE_DIR:-$PWD/build/gpu} # the libraries, and the planner's rates
COMMIT=${COMMIT:-$([ -e .git ] && git rev-parse HEAD 2>/dev/null)}
if [ -n "$COMMIT" ]; then export COMMIT; fi

ALL=530 # seconds that the steps have together; the last one may take GRACE longer
GRACE=5 # seconds to print and save, for who is out of time
SECONDS=0
results=()
failed=0

# step LIMIT COMMAND...: run it for at most so many seconds
step() {
    local limit=$1 start=$SECONDS status=124
    shift
    printf '\n=== %s\n' "$*"
    if [ "$limit" -gt $((ALL - SECONDS)) ]; then limit=$((ALL - SECONDS)); fi
    if [ "$limit" -gt 0 ]; then
        timeout --kill-after="$GRACE" "$limit" "$@" 2>&1
        status=$?
    fi
    [ "$status" -eq 0 ] || failed=1
    results+=("$(printf 'status %3d  %4d s  %s' "$status" "$((SECONDS - start))" "$*")")
}

# suite LIMIT NAME OPTIONS...: measure it, or with RESUME what was not finished
suite() {
    local limit=$1 name=$2 resume=()
    shift 2
    if [ -n "${RESUME:-}" ] && compgen -G "$OUT/$name-cuda-*.json" >/dev/null; then
        if ! grep -q '"finished": false' "$OUT/$name"-cuda-*.json; then
            printf '\n=== %s: finished before\n' "$name"
            return
        fi
        resume=(--resume)
    fi
    step "$limit" "$PYTHON" -m dpfast bench --suite "$name" --device cuda --out "$OUT" "${resume[@]}" "$@"
}

all() {
    local kernels=80 models=165
    if [ -n "${WHEELS:-}" ]; then
        step 20 "$PYTHON" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
    fi
    if [ -n "${RESUME:-}" ]; then
        kernels=250 models=$ALL # there is time; the libraries may have to be built again
    else
        step 110 "$PYTHON" -m dpfast doctor # its first question for the libraries builds them
        step 70 "$PYTHON" -m pytest -m gpu -q
        step 80 "$PYTHON" -m pytest tests/kernels -q -m "not compiles and not gpu" # with a GPU these compile their kernels
    fi
    suite "$kernels" kernels --seconds 25
    # those with targets and with the largest batches first
    suite "$models" models --seconds 40 \
        --model gpt2-medium llama-1b-lora llama-1b gpt2 vit-s bert-base resnet18 wrn16-4 mlp
    printf '\n=== in all %d s (status 124: out of time)\n' "$SECONDS"
    printf '%s\n' "${results[@]}"
    return "$failed"
}

all > >(tee ${RESUME:+-a} "$OUT/log.txt")
status=$?
wait # for tee
exit "$status"
