#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: builds for it, compares the instructions that kernels are made of
# with their host versions, runs every op against float64 on odd and real shapes, the odd ones again under
# compute-sanitizer where there is one, and times the kernels.
#
#   benchmarks/device.sh [--out DIR]        DIR receives the logs (default: device-output)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=device-output
case "${1:-}" in
  --out) out=${2:?"--out: expected a directory"} ;;
  "") ;;
  *) echo "device.sh: unknown argument $1; usage: benchmarks/device.sh [--out DIR]" >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "device.sh: $python's torch sees no GPU; run it where one is, or name another interpreter with PYTHON" >&2
  exit 2
}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"

SLIDERQUANT_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} "$python" setup.py -q build_ext --inplace 2>&1 | tee "$out/build.log"
export SLIDERQUANT_NO_SKIPS=1
"$python" -m pytest -q tests/test_cuda_ptx.py -k gpu 2>&1 | tee "$out/ptx.log"
"$python" -m pytest -q tests/test_ops_cuda.py 2>&1 | tee "$out/ops.log"
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --error-exitcode 1 "$python" -m pytest -q -x tests/test_ops_cuda.py \
    -k "not real and (odd and 4- or not odd)" 2>&1 | tee "$out/sanitizer.log"
else
  echo "device.sh: no compute-sanitizer on PATH, memory checks left out" | tee "$out/sanitizer.log"
fi
"$python" -m benchmarks.gpu_kernels --json "$out/times.json" 2>&1 | tee "$out/times.md"
