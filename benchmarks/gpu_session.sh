#!/usr/bin/env bash
# Everything that only a GPU can tell, in three commands of nine minutes: builds, checks, sanitizes, then measures.
#
#   benchmarks/gpu_session.sh OUT build choice tests sanitize kernels calibrate
#   benchmarks/gpu_session.sh OUT build whole8 native rank128
#   benchmarks/gpu_session.sh OUT build whole1 torch8 operations races
#
# Kernels that are wrong need no times: read the first three logs of the first command before the others. `choice` says
# what runs each op here, and why; every other section uses these kernels, `torch8` none of them.
#
# Sections run in the order below, whatever the order of their names; without names all of them. Logs and JSON files are
# written to WORK (/tmp/loraga-gpu), benchmarks after every row, and copied to OUT/gpu-session.tar.gz after every
# section: OUT may be a place that is emptied before each command and gives back a few files only. A section that is done
# leaves WORK/NAME.done and is skipped the next time, until somebody removes WORK; one that is cut short, or finds no
# time left of CALL_SECONDS (570), is not. Nothing is downloaded; python3, torch and triton are taken as they are. PYTHON
# names another Python.
set -uom pipefail # m: jobs that run beside this shell, which has to hear signals, can be interrupted themselves
cd "$(dirname "$0")/.."
mkdir -p "${1:?where results go}"
out=$(cd "$1" && pwd)
shift
sections=("$@")
[ ${#sections[@]} -gt 0 ] || sections=(build choice tests sanitize kernels calibrate whole8 native rank128 whole1 torch8 operations races)
work=${WORK:-/tmp/loraga-gpu}
mkdir -p "$work"
python=${PYTHON:-python3}
failed=()
child=
export python PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TRITON_INTERPRET=0
export XDG_CACHE_HOME="$work/cache" # no choice of an earlier user counts, and that of `calibrate` is brought back

collect() {
    tar -czf "$work.tar.gz" -C "$work" . # a file may grow meanwhile, which tar calls a failure
    cp "$work.tar.gz" "$out/gpu-session.tar.gz"
}
stop() {
    collect # first: there may be no time for what comes
    [ -z "$child" ] || { kill -INT "$child" && wait "$child"; }
    exit 130
}
trap collect EXIT
trap stop INT TERM

section() { # section NAME SECONDS COMMAND...
    local name=$1 limit=$2 left=$((${CALL_SECONDS:-570} - SECONDS)) start=$SECONDS rc
    shift 2
    [[ " ${sections[*]} " == *" $name "* ]] || return 0
    if [ -e "$work/$name.done" ]; then
        echo "== $name: done before"
        return 0
    fi
    if [ "$left" -lt 20 ]; then
        failed+=("$name")
        echo "== $name: no time left"
        return 0
    fi
    echo "== $name"
    # an interrupt first: pytest then says what it has seen so far, and its benchmarks are saved
    timeout -s INT -k 10 "$((limit < left ? limit : left))" "$@" >"$work/$name.log" 2>&1 &
    child=$!
    wait "$child"
    rc=$?
    child=
    if [ $rc -eq 0 ]; then
        touch "$work/$name.done"
        echo "   $((SECONDS - start)) s; the end of its log:"
    else
        failed+=("$name")
        echo "   failed ($rc) after $((SECONDS - start)) s; the end of its log:"
    fi
    tail -n 12 "$work/$name.log" | cut -c 1-200
    collect
}

build() {
    "$python" -c 'import setuptools, sys
version = setuptools.__version__
if int(version.split(".")[0]) < 77:
    sys.exit(f"setuptools {version} cannot read the license in pyproject.toml; 77 or newer is needed")' || return 1
    LORAGA_CUDA=1 LORAGA_CUDA_ARCHITECTURES=${LORAGA_CUDA_ARCHITECTURES:-90} CMAKE_BUILD_PARALLEL_LEVEL=8 \
        "$python" -m pip install --no-build-isolation --no-deps --no-index -e . || return 1
    "$python" -c 'import sys; from loraga import _native; sys.exit(_native.why_unavailable("cuda"))' # or tests skip it
}

# Fails where a kernel fails its check at first use.
choice() {
    "$python" -m loraga env --json >"$work/env.json" && "$python" -m loraga env || return 1
    ! grep -E '"torch: ' "$work/env.json"
}

# Not those that compile ahead of time or emulate threads: they need no GPU. Eight processes, as most of the time goes
# into compiling kernels.
tests() {
    local workers=()
    "$python" -c 'import xdist' && workers=(-n 8)
    OMP_NUM_THREADS=2 "$python" -m pytest -q --timeout 100 "${workers[@]}" --ignore tests/kernels/test_aot.py \
        --ignore tests/native/test_cpp.py tests/kernels tests/native tests/ops/test_first_use.py \
        tests/ops/test_fallback.py tests/capture/test_kernel_choice.py tests/test_cuda.py \
        tests/estimators/test_host_buffers.py
}

# What the measurement of a user's card finds here. The choices must not change what the sections after it measure.
calibrate() {
    "$python" -m loraga calibrate && mv "$XDG_CACHE_HOME"/loraga/kernels-*.json "$work/calibration.json"
}

# Every kernel on shapes that reach each branch, each tensor an allocation of its own, of which memcheck sees the ends.
# Once without it first: a hundred kernels are compiled then, which would take minutes under it.
sanitize() {
    local smoke=("$python" -m pytest -q -x tests/kernels/smoke.py tests/native/smoke.py)
    "${smoke[@]}" || return 1
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 --target-processes all \
        "${smoke[@]}"
}

# racecheck sees hazards between threads of a block. It also reports Triton's own reductions over several warps, which
# are right (triton issues 4736 and 7264): what it says of those kernels is a log to be read, and decides nothing.
races() {
    local check=(compute-sanitizer --tool racecheck --target-processes all --error-exitcode 1 "$python" -m pytest -q)
    "${check[@]}" -x tests/native/smoke.py || return 1
    "${check[@]}" tests/kernels/smoke.py >"$work/races-triton.log" 2>&1
    return 0
}

# Llama-2-7B shape in bfloat16, random weights, 64 x 1024 tokens; peers last
whole() { # whole NAME SECONDS OPTION...
    local name=$1 limit=$2
    shift 2
    section "$name" "$limit" "$python" benchmarks/whole_run.py --device cuda --shape llama-2-7b --length 1024 \
        --repeats 1 --limit 4 --output "$work/$name-gpu.json" "$@"
}

export work
export -f build choice tests sanitize calibrate races
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$work/device.txt"
section build 80 bash -c build
section choice 40 bash -c choice
section tests 170 bash -c tests
section sanitize 100 bash -c sanitize
section kernels 110 "$python" benchmarks/roofline.py --output "$work/kernels-gpu.json"
section calibrate 60 bash -c calibrate
# The official procedure takes all gradients, 13 GB, to host memory in every micro-batch: with 64 of them it would need
# five minutes, so it stands here with 8 of as many tokens in all.
whole whole8 340 --rows 8 --batches 8 --check-layers 0 --cases floor loraga lora-step floor-checkpointed \
    loraga-checkpointed lora-step-checkpointed peft-loraga official-loraga
section native 50 "$python" benchmarks/native.py --device cuda --batches 1 32 --repeats 3 \
    --output "$work/native-gpu.json"
whole rank128 110 --rows 8 --batches 8 --rank 128 --check-layers --cases floor loraga lora-step
whole whole1 240 --rows 1 --batches 64 --check-layers --cases floor loraga lora-step loraga-dense loraga-dense-host \
    peft-eva
LORAGA_TRITON=0 whole torch8 60 --rows 8 --batches 8 --check-layers --cases loraga loraga-dense
section operations 110 "$python" -m pytest -q -k "Llama-2-7B or 1024x4096 or small_svd" benchmarks/operations.py \
    --benchmark-json "$work/operations-gpu.json"
section races 90 bash -c races
[ ${#failed[@]} -eq 0 ] || { echo "not done: ${failed[*]}"; exit 1; }
