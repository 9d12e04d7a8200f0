#!/usr/bin/env bash
# benchmarks/gpu_check.sh OUT: builds with CUDA, runs the GPU's tests and benchmarks, and leaves logs and results in OUT.
#
# For a machine with an NVIDIA GPU, torch, triton and nvcc, and without network.  Ends within nine minutes: every part has
# a limit of its own, and one that fails does not keep the others from running.
# Exit code 0: every part passed; 1: one failed (OUT/summary.txt says which); 2: there is no GPU.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu_check.sh OUT" >&2
    exit 64
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
    echo "gpu_check: expected an NVIDIA GPU that $python's torch can use, got none"
    exit 2
fi

: > "$out/summary.txt"
failed=0
limit=540 # seconds for everything

# part NAME SECONDS COMMAND...: at most so long, and never beyond the limit of the whole.
part() {
    local name=$1 most=$2 begin=$SECONDS code=0
    shift 2
    if [ $((SECONDS + most)) -gt $limit ]; then most=$((limit - SECONDS)); fi
    if [ "$most" -lt 5 ]; then
        code=124
    else
        timeout --kill-after=5 "$most" "$@" > "$out/$name.log" 2>&1 || code=$?
    fi
    local verdict=passed
    if [ $code -ne 0 ]; then
        verdict="failed with exit code $code"
        failed=1
        tail -n 30 "$out/$name.log" 2> /dev/null
    fi
    echo "$name: $verdict after $((SECONDS - begin)) s (limit $most s)" | tee -a "$out/summary.txt"
    return $code
}

capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
if [ "$capability" = 9.0 ]; then capability=9.0a; fi
export AVSER_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}

workers=()
if "$python" -c 'import xdist' 2> /dev/null; then workers=(-n 6); fi

# A failed build leaves what an earlier one made, if any: the parts that follow say what they miss.
part build 170 "$python" -m pip install --no-build-isolation --no-deps -e .
part step 80 "$python" -m benchmarks.gpu_training "$out" step
part convolution 60 "$python" -m benchmarks.gpu_training "$out" convolution
part tests 170 "$python" -m pytest -q --tb=short "${workers[@]}" \
    tests/test_training_ops.py tests/test_training_modes.py tests/test_ops.py tests/test_log_mel.py \
    -k "cuda or captured" -m "not slow"
part compiled 200 "$python" -m benchmarks.gpu_training "$out" compiled

cat "$out/summary.txt"
exit $failed
