#!/usr/bin/env bash
# Tests and measurements on a machine with a GPU, in at most 400 seconds: OUT=folder bench/gpu.sh
#
# It needs Python 3.11 or newer with torch, triton, numpy, psutil, tabulate, tqdm, matplotlib and pytest; nvcc and a C++ compiler
# for the native libraries, which are built for this GPU alone; no network. What matters most comes first: models beside
# ordinary training, then the kernels beside cuBLAS, then the tests. In OUT it leaves, as it goes, log.txt, stages.txt
# (status and seconds of every stage that has ended), what each process of tests says, and the record, tables and plots
# of each suite. A stage that fails or takes too long does not stop the next one; the exit status is 1 if one did. A
# kernel that leaves the GPU unusable costs its own row, as another process goes on with the next one, and a test that
# does so fails alone. A suite that was out of time leaves what it has: RESUME=1 goes on with it, on the same sources and
# with the same OUT, and with nothing else. Where OUT is emptied between two calls, carry the unfinished records (*.json)
# into it.
#
#   OUT        where to leave all that (default bench/out/gpu): about 30 files; where fewer come back, pack the folder
#   ALL        the seconds that there are (default 400)
#   WHEELS     a folder of wheels that is installed first: opacus, and what else is missing of its dependencies
#   PYTHON     default python3
#   PROCESSES  of tests at a time (default 8)
#   COMMIT     which one this is, for the records, where the sources are a copy without git
#   REHEARSE   1: the same stages on a CPU, with small shapes and Triton's interpreter, to see that all of them run

theirs=
IFS=: read -ra entries <<<"${PYTHONPATH:-}"
for entry in "${entries[@]}"; do # they are meant from where we were called
    case $entry in /*) theirs+=:$entry ;; *) theirs+=:$PWD/$entry ;; esac
done
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/out/gpu}
PROCESSES=${PROCESSES:-8}
mkdir -p "$OUT" || exit 1
export PYTHONPATH=$PWD:$PWD/kernels$theirs PYTHONUNBUFFERED=1 TQDM_DISABLE=1
export DPFAST_CACHE_DIR=${DPFAST_CACHE_DIR:-$PWD/build/gpu} # the libraries, and the planner's rates
COMMIT=${COMMIT:-$([ -e .git ] && git rev-parse HEAD 2>/dev/null)}
if [ -n "$COMMIT" ]; then export COMMIT; fi
DEVICE=cuda
small=()
if [ -n "${REHEARSE:-}" ]; then
    DEVICE=cpu
    small=(--small)
    export TRITON_INTERPRET=1
fi

ALL=${ALL:-400} # seconds in all
GRACE=8         # of these, to print and save for who is out of time
AGAIN=8         # processes that go on with a suite at most, after one whose GPU was lost
SECONDS=0
results=()
failed=0
running=
set -m # what runs behind & hears Ctrl-C

# stage LIMIT COMMAND...: run it for at most so many seconds; out of time it gets Ctrl-C, and says what it has
stage() {
    local limit=$1 start=$SECONDS
    shift
    printf '\n=== %s\n' "$*"
    if [ "$limit" -gt $((ALL - GRACE - SECONDS)) ]; then limit=$((ALL - GRACE - SECONDS)); fi
    status=124
    if [ "$limit" -gt 0 ]; then
        timeout --signal=INT --kill-after="$GRACE" "$limit" "$@" 2>&1 &
        running=$!
        wait "$running" # and not in the foreground: bash hears nothing before that has ended
        status=$?
        running=
    fi
    [ "$status" -eq 0 ] || failed=1
    results+=("$(printf 'status %3d  %4d s  %s' "$status" "$((SECONDS - start))" "$*")")
    printf '%s\n' "${results[-1]}" >>"$OUT/stages.txt"
}

# unfinished NAME: whether there is a record to go on with
unfinished() {
    grep -q '"finished": false' "$OUT/$1-$DEVICE"-*.json 2>/dev/null
}

# suite LIMIT NAME OPTIONS...: measure it, or with RESUME what was not finished
suite() {
    local end=$((SECONDS + $1)) name=$2 resume=()
    shift 2
    if [ -n "${RESUME:-}" ] && compgen -G "$OUT/$name-$DEVICE-*.json" >/dev/null; then
        if ! unfinished "$name"; then
            printf '\n=== %s: finished before\n' "$name"
            return
        fi
        resume=(--resume)
    fi
    for ((go = 0; go < AGAIN; go++)); do
        stage $((end - SECONDS)) \
            "$PYTHON" -m dpfast bench --suite "$name" --device "$DEVICE" --out "$OUT" "${small[@]}" "${resume[@]}" "$@"
        # with status 1 and an unfinished record the GPU was lost: the row that did it is kept
        if [ "$status" -ne 1 ] || ! unfinished "$name"; then break; fi
        resume=(--resume)
    done
}

all() {
    local models=130 kernels=60
    : >"$OUT/stages.txt"
    if [ -n "${WHEELS:-}" ]; then
        stage 20 "$PYTHON" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
    fi
    if [ -n "${RESUME:-}" ]; then
        models=$ALL kernels=$ALL # there is time; the libraries may have to be built again
    else
        stage 90 "$PYTHON" -m dpfast doctor # its first question for the libraries builds them
    fi
    # those with targets and with the largest batches first
    suite "$models" models --seconds 30 \
        --model gpt2-medium llama-1b-lora llama-1b gpt2 vit-s bert-base resnet18 wrn16-4 mlp
    suite "$kernels" kernels --seconds 20
    if [ -z "${RESUME:-}" ]; then
        stage 50 "$PYTHON" -m bench.split "$PROCESSES" "$OUT" gpu-tests -- \
            tests/gpu tests/kernels tests/test_graphed.py -m gpu
        stage 90 "$PYTHON" -m bench.split "$PROCESSES" "$OUT" kernel-tests -- \
            tests/kernels -m "not compiles and not gpu" # with a GPU these compile their kernels
    fi
    summary
    return "$failed"
}

summary() {
    printf '\n=== in all %d s (status 124: out of time)\n' "$SECONDS"
    printf '%s\n' "${results[@]}"
}

# Whoever cuts us short: the running stage may say what it has.
cut() {
    if [ -n "$running" ]; then
        kill -INT "$running"
        wait "$running"
    fi
    printf '\n=== cut after %d s\n' "$SECONDS"
    summary
    exit 1
}

all_or_cut() {
    trap cut INT TERM
    all
}

all_or_cut > >(tee ${RESUME:+-a} "$OUT/log.txt")
status=$?
wait # for tee
exit "$status"
