#!/usr/bin/env bash
# Tokens per second in vLLM on a machine with a GPU and no network: a Llama of random weights, by default in the shape of
# TinyLlama (1.1B), in 16 bits, W4A16, W4A4, as stock vLLM's GPTQ int4, and W2A16, in this order.
#
#   benchmarks/device_vllm.sh --wheels DIR [--out DIR] [--work DIR] [--shape NAME]
#
# --wheels holds vLLM for the torch that is installed (0.26.0 for torch 2.11), and what it needs beyond that. It goes into
# an environment of its own, which sees the packages that are installed; that and the models stand in --work and are used
# again. --out receives what each model reached as soon as that is known: a table, JSON, and the log of one that failed.
# On an H200 with 16 cores installing and building should take three minutes, the models one, an engine one (estimates).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=device-output work=${TMPDIR:-/tmp}/sliderquant-device wheels= shape=tinyllama-1.1b
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=${2:?"--out: expected a directory"} ;;
    --work) work=${2:?"--work: expected a directory"} ;;
    --wheels) wheels=${2:?"--wheels: expected a directory"} ;;
    --shape) shape=${2:?"--shape: expected a name"} ;;
    *)
      echo "device_vllm.sh: unknown argument $1;" \
        "usage: benchmarks/device_vllm.sh --wheels DIR [--out DIR] [--work DIR] [--shape NAME]" >&2
      exit 2
      ;;
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
mkdir -p "$out" "$work"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/served.md"

# --system-site-packages would show the packages of the system, not those of an environment that $base belongs to.
python=$work/venv/bin/python
"$base" -m venv --without-pip "$work/venv"
"$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sep="\n")' \
  >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/installed.pth"
PATH=$PATH:$(dirname "$(command -v "$base")") # cmake and ninja
"$python" -m pip install --no-index --find-links "$wheels" --quiet vllm 2>&1 | tee "$out/install.log"
SLIDERQUANT_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
  "$python" -m pip install --no-deps --no-build-isolation --quiet -e . 2>&1 | tee -a "$out/install.log"

models=$work/$shape
"$python" - "$shape" "$models" <<'PYTHON'
import sys
from pathlib import Path

from benchmarks.served import write_models

write_models(sys.argv[1], ["W4A16", "W4A4", "W2A16"], None, Path(sys.argv[2]))
PYTHON

status=0 baseline=auto # the 16-bit model, beside the first one
for model in W4A16 W4A4 gptq W2A16; do
  if "$python" -m benchmarks.throughput --model "$models/$model" --baseline $baseline --rounds 1 --no-plot \
    --output-dir "$work/$model" 2>&1 | tee -a "$out/served.md"; then
    cp "$work/$model/throughput.json" "$out/$model.json"
  else
    status=1
    cat "$work/$model"/*.log >>"$out/failed.log"
  fi
  baseline=none
done
exit $status
