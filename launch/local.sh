#!/usr/bin/env bash
# N processes of one job on this machine, one GPU each where there are GPUs, else CPU devices:
#   launch/local.sh 2 --config configs/base.py --io.data_paths /path/to/log
# RESTARTS=3: starts again, up to so often, if the job ends with 75 though nobody stopped this script
# (a process was lost, say). DEVICES=2: CPU devices of each process. PYTHON: the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

processes=${1:?usage: launch/local.sh PROCESSES --config FILE [--section.key value ...]}
shift
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
restarts=${RESTARTS:-0}
stopped=
interrupted=
ended=0
pids=()

stop() {
  stopped=1 interrupted=1
  # All get the signal; they agree on the step after which they stop.
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
}
trap stop TERM INT

# Waits for process $1 and leaves its exit code in `ended`. A signal ends `wait` early, with a code of its own;
# the process may have ended by then, and its code is still there to be asked for.
wait_for() {
  while :; do
    interrupted=
    ended=0
    wait "$1" || ended=$?
    if [[ -z $interrupted ]] || ((ended <= 128)); then return 0; fi
  done
}

free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}

run_once() {
  S2S_JAX_COORDINATOR="localhost:$(free_port)"
  export S2S_JAX_COORDINATOR S2S_JAX_NUM_HOSTS="$processes"
  pids=()
  for ((host = 0; host < processes; host++)); do
    (
      export S2S_JAX_HOST=$host
      if [[ ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi >/dev/null; then
        export CUDA_VISIBLE_DEVICES=$host
        source launch/gpu_env.sh
      else
        export JAX_PLATFORMS=cpu
        export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
      fi
      # A terminal's Ctrl-C reaches this script, which passes it on once.
      trap '' INT
      exec "$python" -m s2s_jax.train "$@"
    ) &
    pids+=($!)
  done
  # The worst code of all: a mistake (2) or loss (3) says more than "start again" (75) or done.
  local code=0
  for pid in "${pids[@]}"; do
    wait_for "$pid"
    if ((ended != 0 && (code == 0 || code == 75))); then code=$ended; fi
  done
  return "$code"
}

while :; do
  code=0
  run_once "$@" || code=$?
  if ((code != 75 || restarts == 0)) || [[ -n $stopped ]]; then exit "$code"; fi
  restarts=$((restarts - 1))
  echo "launch/local.sh: starting again, $restarts restarts left" >&2
done
