#!/usr/bin/env bash
# Makes a log, trains on it, stops half-way as a cluster would (SIGTERM), and starts again to continue.
# For a shorter run: QUICKSTART_STEPS=100 make quickstart
set -euo pipefail
cd "$(dirname "$0")/.."

steps=${QUICKSTART_STEPS:-400}
data=data/quickstart
run=runs/quickstart
train=(python -m s2s_jax.train --config configs/quickstart.py --train.train_steps "$steps")

rm -rf "$run"
echo "== a log of 2,000 users, in $data"
s2s synthesize --out "$data" --overwrite True
s2s inspect "$data" --rows 1

echo
echo "== training, until SIGTERM half-way"
"${train[@]}" &
job=$!
trap 'kill "$job" 2>/dev/null || true' EXIT
while kill -0 "$job" 2>/dev/null; do
  seen=$(wc -l 2>/dev/null <"$run/metrics.jsonl" || echo 0)
  if ((seen * 10 >= steps / 2)); then
    kill -TERM "$job"
    break
  fi
  sleep 0.2
done
code=0
wait "$job" || code=$?
trap - EXIT
if ((code != 75)); then
  echo "expected exit code 75 (stopped and saved), got $code" >&2
  exit 1
fi

echo
echo "== the same command again: it continues from the checkpoint"
"${train[@]}"
echo "everything of this run is in $run: config.json, metrics.jsonl, checkpoints/, tensorboard/"
