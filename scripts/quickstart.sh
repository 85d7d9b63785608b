#!/usr/bin/env bash
# Writes a synthetic log and trains on it. Stops half-way, as a cluster would (SIGTERM), and starts again to
# continue. Then evaluates the model and shows its recommendations.
# For a shorter run: QUICKSTART_STEPS=100 make quickstart
set -euo pipefail
cd "$(dirname "$0")/.."

steps=${QUICKSTART_STEPS:-400}
data=data/quickstart
run=runs/quickstart
config=(--config configs/quickstart.py --train.train_steps "$steps")
train=(s2s train "${config[@]}")

rm -rf "$run"
echo "== a log of 2,000 users, in $data"
s2s synthesize --output "$data" --overwrite True
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

echo
echo "== the test: how often the item of the last event is among the first ten (hr@10), and so on"
s2s evaluate "${config[@]}"

echo
echo "== what comes next for some users; in this log, lamp 8 follows lamp 7 more often than not"
s2s recommend "${config[@]}" --input "$data" --output "$run/recommendations.parquet" \
  --top_k 10 --user_column user_id
python scripts/show_recommendations.py "$run/recommendations.parquet" "$data" "$data/titles.csv"

echo
echo "== a page with these results and more"
s2s report "$run" --titles "$data/titles.csv"
echo "everything of this run is in $run: config.json, metrics.jsonl, checkpoints/, tensorboard/, report.html"
