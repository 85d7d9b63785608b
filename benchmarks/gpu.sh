#!/usr/bin/env bash
# Runs all measurements that need a GPU, in less than 9 minutes on an H100: are the losses right, how fast are a step
# of base.py and its parts, and does training run?
# Needs an environment with s2s_jax and a GPU build of JAX: pip install -e '.[cuda12,test]'
#   benchmarks/gpu.sh [OUTPUT_DIR]
# Results go to OUTPUT_DIR. If a part fails or takes too long, this prints FAILED and runs the next one.
# Environment variables:
#   PYTHON, TORCH_PYTHON  Python interpreters; without PyTorch, only ours is timed
#   BUDGET                the seconds for all parts; the remaining parts are skipped
#   WORK                  a directory for logs, checkpoints and compiled programs (default: a temporary one)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"
python=${PYTHON:-python}
torch_python=${TORCH_PYTHON:-$python}
end=$((SECONDS + ${BUDGET:-525}))
if [[ -z ${WORK:-} ]]; then
  WORK=$(mktemp -d)
  trap 'rm -rf "$WORK"' EXIT
fi
source launch/gpu_env.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$WORK/compiled}
failed=()

# part NAME SECONDS COMMAND…: runs the command for at most SECONDS and writes its output to OUTPUT_DIR/NAME.txt.
part() {
  local name=$1 limit=$2 left=$((end - SECONDS)) begin=$SECONDS
  shift 2
  echo
  echo "== $name"
  if ((left < 5)); then
    echo "FAILED: $name, no time left" | tee "$out/$name.txt"
    failed+=("$name")
    return 0
  fi
  timeout -k 5 "$((limit < left ? limit : left))" "$@" 2>&1 | tee "$out/$name.txt" || {
    echo "FAILED: $name" | tee -a "$out/$name.txt"
    failed+=("$name")
  }
  echo "-- $name: $((SECONDS - begin)) s"
}

part devices 60 bash -c 'nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.max.sm,power.limit \
  --format=csv,noheader; "$0" -c "import jax; print(jax.__version__, jax.devices())"' "$python"

# Compares the first 20 losses in float32 and bfloat16 with a CPU's.
part parity 100 "$python" benchmarks/parity.py

# Where the time of a step of base.py goes (16 x 1,024 positions, width 1,024, 8 layers), and how close it is to the
# speed of the device.
base=(--config configs/base.py --model.dtype bfloat16)
part breakdown_cudnn 120 "$python" benchmarks/breakdown.py "${base[@]}" --model.attention cudnn

# Compares the same sizes with PyTorch: eager and compiled, flash attention, fused AdamW. Each needs its own memory.
peer=(--peer_python none)
if "$torch_python" -c 'import torch' 2>/dev/null; then
  peer=(--peer_python "$torch_python" --compiled)
fi
part train_step 130 env XLA_PYTHON_CLIENT_MEM_FRACTION=0.35 "$python" benchmarks/train_step.py \
  --hidden 1024 --layers 8 --batch 16 --seq_len 1024 --dtype bfloat16 \
  --rounds 5 --steps 10 --warmup 10 "${peer[@]}"

part breakdown_xla 100 "$python" benchmarks/breakdown.py "${base[@]}" --model.attention xla --steps 10

# Tables: uniform ids, then a million look-ups of 128 floats with ids from a power law.
part sparse_update 40 "$python" benchmarks/sparse_update.py
part sparse_update_skewed 60 "$python" benchmarks/sparse_update.py --rows 1000000 10000000 \
  --ids 1048576 --width 128 --skew 1.05 --rounds 10
part look_up 40 "$python" benchmarks/look_up.py
part look_up_large 40 "$python" benchmarks/look_up.py --rows 8388608 --rounds 10

# The pairs of base.py, and twice as many.
part loss 60 env XLA_PYTHON_CLIENT_MEM_FRACTION=0.5 "$python" benchmarks/loss.py \
  --pairs 16384 32768 --width 256 1024 --dtype bfloat16

# 300 steps of a tiny model from a log, as a user would train it.
part quickstart_log 30 "$python" -m s2s_jax synthesize --output "$WORK/quickstart_log"
part quickstart 60 "$python" -m s2s_jax.train --config configs/quickstart.py \
  --io.data_paths "$WORK/quickstart_log" --train.output_dir "$WORK/quickstart" --train.train_steps 300

part id_map 90 "$python" benchmarks/id_map.py --width 128 --load 0.5 --rounds 8

# base.py from a log, with a profile. The checkpoint of 7 GB at the end may take longer than the rest.
part base_log 40 "$python" -m s2s_jax synthesize --output "$WORK/base_log" --users 1500 \
  --mean_length 900
part base 110 "$python" -m s2s_jax.train "${base[@]}" --io.data_paths "$WORK/base_log" \
  --train.output_dir "$WORK/base" --train.train_epoch None --train.train_steps 60 \
  --train.profile_steps 40 43

for run in quickstart base; do
  cp "$WORK/$run/metrics.jsonl" "$out/$run.jsonl"
done
cp -r "$WORK/base/profile" "$out/"

echo
echo "results are in $out; failed: ${failed[*]:-none}"
((${#failed[@]} == 0))
