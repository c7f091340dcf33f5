#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command of a few minutes: builds, tests, sanitizes, measures.
#
#   benchmarks/gpu_session.sh OUT [SECTION...]
#
# Sections, most valuable first: build tests sanitize kernels. Results are JSON files and logs in OUT. A section that is
# done leaves OUT/SECTION.done and is skipped the next time, so that an interrupted session goes on where it was. Nothing
# is downloaded; python3, torch and triton are taken as they are. PYTHON names another Python.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?where results go}
shift
sections=("$@")
[ ${#sections[@]} -gt 0 ] || sections=(build tests sanitize kernels)
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
        timeout 100 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
            "$python" -m pytest -q -x tests/kernels/smoke.py || return 1
    done
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/device.txt"
export TRITON_INTERPRET=0
section build 120 env LORAGA_CUDA=1 LORAGA_CUDA_ARCHITECTURES="${LORAGA_CUDA_ARCHITECTURES:-90}" \
    "$python" -m pip install --no-build-isolation --no-deps --no-index -e .
section tests 150 "$python" -m pytest -q --deselect tests/kernels/test_aot.py tests/kernels tests/native
section sanitize 210 sanitize
section kernels 180 "$python" benchmarks/kernels.py --output "$out/kernels-gpu.json"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
