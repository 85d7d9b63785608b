#!/usr/bin/env bash
# What only a GPU shows, in one go: the sparse update of tables in its memory, and the step of base.py.
# Needs an environment with s2s_jax and a GPU build of JAX: pip install -e '.[cuda12,test]'
#   benchmarks/gpu.sh [OUTPUT_DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
python -c 'import jax; print(jax.__version__, jax.devices())'

echo "== sparse-row update"
python benchmarks/sparse_update.py | tee "$out/sparse_update.txt"

echo "== configs/base.py: 16 x 1,024 positions a device, bfloat16"
python -m s2s_jax.data.synthesize --out "$out/log" --users 4000 --mean_length 900 --overwrite True
python -m s2s_jax.train --config configs/base.py --io.data_paths "$out/log" \
  --train.output_dir "$out/base" --train.train_epoch None --train.train_steps 100 \
  --train.profile_steps 50 55 | tee "$out/base.txt"
