#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command of a few minutes: builds, tests, sanitizes, measures.
#
#   benchmarks/gpu_session.sh OUT [SECTION...]
#
# Sections, most valuable first: build tests sanitize kernels native whole8 whole1 rank128 operations. Each has a time
# limit; build to native fit into one call of nine minutes, the others into a second. Results are JSON files and logs in
# OUT. A section that is done leaves OUT/SECTION.done and is skipped the next time, so that an interrupted session goes
# on where it was. Nothing is downloaded; python3, torch and triton are taken as they are. PYTHON names another Python.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?where results go}
shift
sections=("$@")
[ ${#sections[@]} -gt 0 ] || sections=(build tests sanitize kernels native whole8 whole1 rank128 operations)
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
failed=()

section() { # section NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    [[ " ${sections[*]} " == *" $name "* ]] || return 0
    if [ -e "$out/$name.done" ]; then
        echo "== $name: done before"
        return 0
    fi
    echo "== $name"
    local start=$SECONDS
    if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
        touch "$out/$name.done"
        echo "   $((SECONDS - start)) s"
    else
        failed+=("$name")
        echo "   failed ($?) after $((SECONDS - start)) s; the end of $out/$name.log:"
        tail -n 15 "$out/$name.log"
    fi
}

# One test of every kernel on real shapes: memcheck sees each access outside an allocation, racecheck each hazard between
# threads of a block. The interpreter runs programs one by one and can see neither.
sanitize() {
    local tool
    for tool in memcheck racecheck; do
        timeout 70 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
            "$python" -m pytest -q -x tests/kernels/smoke.py || return 1
    done
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/device.txt"
export TRITON_INTERPRET=0
section build 120 env LORAGA_CUDA=1 LORAGA_CUDA_ARCHITECTURES="${LORAGA_CUDA_ARCHITECTURES:-90}" \
    "$python" -m pip install --no-build-isolation --no-deps --no-index -e .
section tests 120 "$python" -m pytest -q --deselect tests/kernels/test_aot.py tests/kernels tests/native
section sanitize 150 sanitize
section kernels 120 "$python" benchmarks/roofline.py --output "$out/kernels-gpu.json"
section native 30 "$python" benchmarks/native.py --device cuda --batches 1 32 224 --output "$out/native-gpu.json"
# Llama-2-7B shape in bfloat16, random weights, 64 x 1024 tokens
whole() { # whole NAME SECONDS ROWS BATCHES RANK CASE...
    local name=$1 limit=$2 rows=$3 batches=$4 rank=$5
    shift 5
    section "$name" "$limit" "$python" benchmarks/whole_run.py --device cuda --shape llama-2-7b --length 1024 \
        --rows "$rows" --batches "$batches" --rank "$rank" --repeats 1 --check-layers 0 --cases "$@" \
        --output "$out/$name-gpu.json"
}
whole whole8 200 8 8 8 floor loraga lora-step floor-checkpointed loraga-checkpointed lora-step-checkpointed peft-loraga
whole whole1 150 1 64 8 floor loraga loraga-dense loraga-dense-host official-loraga peft-eva lora-step
whole rank128 100 8 8 128 floor loraga lora-step
section operations 120 "$python" -m pytest -q benchmarks/operations.py --benchmark-json "$out/operations-gpu.json"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
