#!/usr/bin/env bash
# Everything that only a GPU can show, in one command.
#
#   benchmarks/device.sh [--out DIR] [STAGE...]        DIR receives the logs (default: device-output)
#
# The stages, all of them by default, and the seconds that each should take on an H200 with 16 cores (estimates):
#   build      150   builds for the GPU
#   ptx         40   compares the instructions that kernels are made of with their host versions
#   ops         70   runs every op against float64 on odd and real shapes
#   times      110   times the kernels
#   sanitizer  100   runs the odd shapes again under compute-sanitizer, where there is one that takes the GPU
# The next stage runs whatever became of the one before; the exit status is 1 where one failed or took too long.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

all=(build ptx ops times sanitizer)
declare -A limits=([build]=240 [ptx]=80 [ops]=130 [times]=200 [sanitizer]=180) # s
total=${LIMIT:-570}                                                            # s, of all stages
out=device-output stages=()
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=${2:?"--out: expected a directory"}; shift ;;
    build | ptx | ops | times | sanitizer) stages+=("$1") ;;
    *) echo "device.sh: unknown argument $1; usage: benchmarks/device.sh [--out DIR] [${all[*]}]" >&2; exit 2 ;;
  esac
  shift
done
[ ${#stages[@]} -gt 0 ] || stages=("${all[@]}")
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "device.sh: $python's torch sees no GPU; run it where one is, or name another interpreter with PYTHON" >&2
  exit 2
}
mkdir -p "$out"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/summary.txt"

export SLIDERQUANT_NO_SKIPS=1 # what is skipped was not checked
within() { timeout --kill-after=10 "$limit" "$@"; }

build() {
  within env SLIDERQUANT_CUDA=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}" "$python" setup.py -q build_ext --inplace
}

ptx() { within "$python" -m pytest -q tests/test_cuda_ptx.py -k gpu; }

# Several processes: one that a kernel hangs or breaks is replaced, and the other tests go on.
ops() {
  within env OMP_NUM_THREADS=4 "$python" -m pytest -q -n 4 --dist worksteal --timeout 60 --timeout-method thread \
    tests/test_ops_cuda.py
}

times() { within "$python" -m benchmarks.gpu_kernels --json "$out/times.json"; }

# Without torch's cache every tensor is an allocation of its own, whose ends the sanitizer knows; graphs need the cache.
sanitizer() {
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer on PATH"; return 77; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  within compute-sanitizer "$python" -c 'import torch; torch.ones(9, device="cuda").sum().item()' || return 77
  within compute-sanitizer --error-exitcode 1 "$python" -m pytest -q tests/test_ops_cuda.py \
    -k "not real and not graph and not fp16 and (4- or not odd)"
}

failed=0
for stage in "${stages[@]}"; do
  begin=$SECONDS limit=$((total - SECONDS))
  [ "$limit" -le "${limits[$stage]}" ] || limit=${limits[$stage]}
  if [ "$limit" -lt 10 ]; then
    status=124
  else
    "$stage" 2>&1 | tee "$out/$stage.log"
    status=${PIPESTATUS[0]}
  fi
  case $status in
    0) result=passed ;;
    77) result="not available" ;;
    124 | 137) result="out of time" failed=1 ;;
    *) result="failed ($status)" failed=1 ;;
  esac
  echo "device.sh: $stage: $result, $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
done
exit $failed
