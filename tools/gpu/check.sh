#!/usr/bin/env bash
# Everything that needs a GPU, on one card, in at most 8 minutes: tools/gpu/check.sh OUT [--dry]
#
# Runs tests/gpu, then measures scoring in bfloat16 and FP8, the update, the rollout, and one RL step. Each part has a
# time limit of its own and leaves OUT/gpu_*.json (or .xml), written as it goes; the exit status is the number of parts
# that failed. --dry runs the same with tiny sizes on a machine without a GPU; the tests then skip themselves.
# REAL_DIR=FOLDER, with SmolLM2-135M-Instruct in FOLDER/model (docs/real.md), adds two minutes of `make real` on one rank,
# which goes on at the next call, and leaves its figures as gpu_real.json.
set -uo pipefail
out=$(mkdir -p "${1:?an output folder}" && cd "$1" && pwd)
dry=${2:-}
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore::UserWarning
export NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 # read when Transformer Engine is imported; fp8.scales=float32 needs it
python=${PYTHON:-python3}

# Transformer Engine prefers a cuDNN of the system to the one that came with torch, and two in one process fail with
# CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED.
cudnn=$("$python" -c 'import nvidia.cudnn as package; print(package.__path__[0])' 2>/dev/null || true)
if [ -n "$cudnn" ] && [ -z "${CUDNN_HOME:-}" ]; then
  export CUDNN_HOME=$cudnn LD_PRELOAD=$cudnn/lib/libcudnn.so.9${LD_PRELOAD:+:$LD_PRELOAD}
fi

failed=0
part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$out/gpu_$name.log" 2>&1
  local status=$?
  echo "gpu_$name: status $status, $((SECONDS - start)) s"
  if [ "$name" = real ] && [ $status -eq 124 ]; then return; fi # as far as it came
  if [ $status -ne 0 ]; then
    failed=$((failed + 1))
    tail -n 25 "$out/gpu_$name.log" | cut -c1-300
  fi
}

[ -n "$dry" ] && step="--hidden 64 --layers 2 --vocab 500 --tokens 8 --steps 1" ||
  step="--hidden 2048 --layers 4 --vocab 32000 --tokens 128 --group-size 16 --steps 2 --dtype bfloat16"
part tests 150 "$python" -m pytest -q tests/gpu --junitxml "$out/gpu_tests.xml" --durations 5
part scoring 110 "$python" -m tools.gpu.scoring "$out/gpu_scoring.json" $dry
part training 100 "$python" -m tools.gpu.training "$out/gpu_training.json" $dry
# shellcheck disable=SC2086
part step 90 "$python" -m tools.bench.step $step --out "$out/gpu_step.json"
if [ -n "${REAL_DIR:-}" ]; then
  part real 120 "$python" -m tools.real.run "$REAL_DIR" --ranks 1
  "$python" -m tools.real.run "$REAL_DIR" --ranks 1 --report >>"$out/gpu_real.log" 2>&1
  cp "$REAL_DIR/real.json" "$out/gpu_real.json"
fi
exit $failed
