#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command of at most 9 minutes: builds, runs the GPU tests and the GPU
# benchmarks, writes summary.txt, log.txt and the results (*.json) into the folder it is given, each as soon as it is
# there.
#
#   benchmarks/gpu_check.sh OUT
#
# Needs torch with CUDA, triton, pytest, cmake and ninja (and nvcc for the CUDA kernels); no network.  With pytest-xdist
# the tests run side by side, and one that breaks its process breaks no other.  Exit codes: 0 all parts passed, 1 some
# failed (the others ran all the same), 2 no GPU or wrong use.
set -uo pipefail
if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu_check.sh OUT" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
: > "$out/summary.txt"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' > "$out/log.txt" 2>&1; then
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
    echo "==== $name" >> "$out/log.txt"
    timeout -k 5 "$most" "$@" >> "$out/log.txt" 2>&1
    code=$?
    [ "$code" -eq 0 ] || failed=1
    echo "$name: exit code $code after $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
    [ "$code" -eq 0 ] || tail -n 15 "$out/log.txt"
    return "$code"
}

command -v nvcc > /dev/null || PATH=$PATH:/usr/local/cuda/bin
cuda=0
command -v nvcc > /dev/null && cuda=1
# Two instruction sets and this GPU's architecture are enough here, and build in a third of the time.
# shellcheck disable=SC2329 # called through bash -c below
build() {
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}.{b}" + "a" * (a > 8))') \
        cmake -S . -B build/gpu -G Ninja -DAVSER_CUDA="$1" -DAVSER_ISAS="scalar;avx2;avx512_bf16" \
        -DPython_EXECUTABLE="$(command -v "$python")" -DAVSER_OUTPUT_DIR="$PWD/avser_fast" &&
        cmake --build build/gpu -- -k 0
}
export -f build
export python OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1 # or what is stopped in the middle has said nothing
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
part device 20 nvidia-smi -q -d CLOCK,PERFORMANCE,COMPUTE
if ! part build 220 bash -c "build $cuda" && [ "$cuda" -eq 1 ]; then
    part build_without_cuda 120 bash -c "build 0" # for the Triton kernels
fi

# shellcheck disable=SC2207 # words, by intention
spread=($("$python" -c 'import importlib.util as u; print("-n 8" * bool(u.find_spec("xdist")), "--timeout 60" * bool(u.find_spec("pytest_timeout")))'))
tests=("$python" -m pytest -q -rs -p no:cacheprovider -o faulthandler_timeout=50)
passed=()
part engine_tests 100 env AVSER_FAST_TEST_GPU=1 "${tests[@]}" "${spread[@]}" tests/test_gpu_engine.py tests/test_gpu_resnet18.py \
    tests/test_gpu_fusion.py tests/test_gpu_speech.py tests/test_cuda_backend.py tests/test_gpu_streams.py && passed+=(cuda)
# A process each: after some faults one gets nothing else from its GPU.
for of in ceilings utterances-1 stages-1 utterances-205 samples log_mel utterances-16 stages-205; do
    part "engine_$of" 40 "$python" -m benchmarks.gpu_engine "$out" "$of"
done
part log_mel_tests 40 "${tests[@]}" tests/test_ops.py -k cuda
part triton_tests 90 "${tests[@]}" "${spread[@]}" tests/test_triton_backend.py -k "not interpreted" && triton=1
# Up to 500 kernels are compiled here, half a second each, by all workers; `training` then finds its own in the cache.
part training_tests 170 "${tests[@]}" "${spread[@]}" tests/test_training_ops.py tests/test_training_modes.py \
    -k "cuda or graph" -m "not slow" && [ "${triton:-0}" -eq 1 ] && passed+=(triton)
# What `doctor` says of the kernels: the device on which the tests passed.
[ "${#passed[@]}" -gt 0 ] && "$python" -m benchmarks.gpu_verified "$out" "${passed[@]}"
part training 120 "$python" -m benchmarks.gpu_training "$out" gradients pair step peak_mb
part triton 50 "$python" -m benchmarks.gpu_inference "$out" mdscm-published default
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck synccheck; do
        part "$tool" 45 env AVSER_FAST_TEST_GPU=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
            "${tests[@]}" "tests/test_gpu_engine.py::test_float32_agrees_with_the_reference_under_every_schedule[8]" \
            "tests/test_gpu_speech.py::test_networks_read_those_clips_from_the_host_and_from_the_gpu"
    done
else
    echo "memcheck, racecheck, synccheck: not run, compute-sanitizer is missing" | tee -a "$out/summary.txt"
fi
# What compiles for a minute before it is measured comes last.
for of in blocks compiled-half-1 compiled-half-205 compiled-1 compiled-205; do
    part "engine_$of" 100 "$python" -m benchmarks.gpu_engine "$out" "$of"
done
part training_compiled 100 "$python" -m benchmarks.gpu_training "$out" compiled
part triton_compiled 60 "$python" -m benchmarks.gpu_inference "$out" mdscm-published-compiled default-compiled
exit "$failed"
