#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command of at most 9 minutes: builds, runs the GPU tests and the GPU
# benchmarks, writes results and logs under the folder it is given.
#
#   benchmarks/gpu_check.sh OUT
#
# Needs torch with CUDA, triton, pytest, cmake and ninja (and nvcc for the CUDA kernels); no network.  Exit codes: 0 all
# parts passed, 1 some failed (the others ran all the same), 2 no GPU or wrong use.
set -uo pipefail
if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu_check.sh OUT" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> "$out/gpu.log"; then
    echo "gpu_check: expected an NVIDIA GPU that torch can use, found none: nothing was run" >&2
    exit 2
fi

limit=530 # seconds for everything
failed=0
# part NAME SECONDS COMMAND...: runs it with what is left of the time, keeps its output, notes the result.
part() {
    local name=$1 most=$2 left=$((limit - SECONDS)) begin=$SECONDS code
    shift 2
    [ "$left" -lt "$most" ] && most=$left
    if [ "$most" -lt 5 ]; then
        echo "$name: not run, the time is up" | tee -a "$out/summary.txt"
        failed=1
        return 1
    fi
    timeout "$most" "$@" > "$out/$name.log" 2>&1
    code=$?
    [ "$code" -eq 0 ] || failed=1
    echo "$name: exit code $code after $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
    [ "$code" -eq 0 ] || tail -n 15 "$out/$name.log"
    return "$code"
}

: > "$out/summary.txt"
cuda=0
command -v nvcc > /dev/null && cuda=1
# Two instruction sets are enough here, and build in half the time.
# shellcheck disable=SC2329 # called through bash -c below
build() {
    cmake -S . -B build/gpu -G Ninja -DAVSER_CUDA="$cuda" -DAVSER_ISAS="scalar;avx2;avx512_bf16" \
        -DPython_EXECUTABLE="$(command -v "$python")" -DAVSER_OUTPUT_DIR="$PWD/avser_fast" &&
        cmake --build build/gpu
}
export -f build
export python cuda
part build 240 bash -c build
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# A part's name, its most seconds, its command; the tests come first.
part engine_tests 90 env AVSER_FAST_TEST_GPU=1 "$python" -m pytest -q tests/test_gpu_engine.py tests/test_gpu_resnet18.py \
    tests/test_gpu_fusion.py tests/test_gpu_speech.py tests/test_cuda_backend.py tests/test_gpu_streams.py -p no:cacheprovider && engine=1
part engine 120 "$python" -m benchmarks.gpu_engine "$out"
part tests 120 "$python" -m pytest -q tests/test_training_ops.py tests/test_training_modes.py -k "cuda or graph" -m "not slow" -p no:cacheprovider
part log_mel 40 "$python" -m pytest -q tests/test_ops.py -k cuda -p no:cacheprovider
part triton_tests 60 "$python" -m pytest -q tests/test_triton_backend.py -k "not interpreted" -p no:cacheprovider
part triton 60 "$python" -m benchmarks.gpu_inference "$out"
part training 150 "$python" -m benchmarks.gpu_training "$out"
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        part "$tool" 60 env AVSER_FAST_TEST_GPU=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
            "$python" -m pytest -q tests/test_gpu_engine.py tests/test_gpu_speech.py \
            -k "every_schedule and (3 or 8) or networks_read or 3-2-utterance-even-2" -p no:cacheprovider
    done
else
    echo "memcheck, racecheck: not run, compute-sanitizer is missing" | tee -a "$out/summary.txt"
fi
# What `doctor` says of the kernels: the device on which the tests passed.
[ "${engine:-0}" -eq 1 ] && "$python" -m benchmarks.gpu_verified cuda "$out"
exit "$failed"
