#!/usr/bin/env bash
# Tokens per second in vLLM on a machine with a GPU and no network: a Llama of random weights, by default in the shape of
# Llama-3-8B, in 16 bits, W4A16, W2A16, W4A4 and as stock vLLM's GPTQ int4.
#
#   benchmarks/device_vllm.sh --wheels DIR [--out DIR] [--shape NAME]
#
# --wheels holds vLLM for the torch that is installed (0.26.0 for torch 2.11), and what it needs beyond that. It goes into
# an environment of its own, under --out, which sees the packages that are installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=device-output wheels= shape=llama3-8b
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=${2:?"--out: expected a directory"} ;;
    --wheels) wheels=${2:?"--wheels: expected a directory"} ;;
    --shape) shape=${2:?"--shape: expected a name"} ;;
    *) echo "device_vllm.sh: unknown argument $1; usage: benchmarks/device_vllm.sh --wheels DIR [--out DIR]" >&2; exit 2 ;;
  esac
  shift 2
done
if ! compgen -G "$wheels/vllm-*.whl" >/dev/null; then
  echo "device_vllm.sh: expected a wheel of vllm in --wheels DIR, found none in '$wheels'" >&2
  exit 2
fi
base=${PYTHON:-python3}
"$base" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "device_vllm.sh: $base's torch sees no GPU; run it where one is, or name another interpreter with PYTHON" >&2
  exit 2
}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"

"$base" -m venv --system-site-packages "$out/venv"
python=$out/venv/bin/python
"$python" -m pip install --no-index --find-links "$wheels" --quiet vllm 2>&1 | tee "$out/install.log"
SLIDERQUANT_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
  "$python" -m pip install --no-deps --no-build-isolation --quiet -e . 2>&1 | tee "$out/build.log"
"$python" -m benchmarks.served --shape "$shape" --output-dir "$out/served" 2>&1 | tee "$out/served.md"
