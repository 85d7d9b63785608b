#!/usr/bin/env bash
# Starts one job of N processes on this machine. Each process gets one GPU or, without GPUs, CPU devices:
#   launch/local.sh 2 --config configs/base.py --io.data_paths /path/to/log
# It trains, evaluates or recommends:
#   launch/local.sh 2 evaluate --config configs/base.py --io.data_paths /path/to/log
#   launch/local.sh 2 recommend --config configs/base.py --input /path/to/log --output /path/to/directory
# Relative paths start from the current directory. Environment variables:
#   CUDA_VISIBLE_DEVICES  the GPUs to use
#   DEVICES=2             the number of CPU devices per process
#   PYTHON                the Python interpreter
#   RESTARTS=3            restarts the job at most this many times if it exits with 75 although this script was not
#                         stopped, for example after a process was killed
#   PATIENCE=60           when a process has failed, the others must exit within this many seconds, unless they
#                         recommend, which each does without the others
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "launch/local.sh: $*" >&2
  exit 2
}

processes=${1:-}
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "usage: launch/local.sh PROCESSES [train|evaluate|recommend] --config FILE [--section.key value ...]"
shift
command=train
if [[ ${1:-} =~ ^(train|evaluate|recommend)$ ]]; then
  command=$1
  shift
fi
python=${PYTHON:-$([[ -x $home/.venv/bin/python ]] && echo "$home/.venv/bin/python" || echo python)}
command -v "$python" >/dev/null || fail "there is no $python; set PYTHON to an interpreter that has s2s_jax installed"
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}
restarts=${RESTARTS:-0}
# Processes that recommend do not need each other, so the others go on.
patience=${PATIENCE:-$([[ $command == recommend ]] && echo 1000000 || echo 60)}
[[ $restarts =~ ^[0-9]+$ ]] || fail "RESTARTS: expected a whole number, found $restarts"
[[ $patience =~ ^[0-9]+$ ]] || fail "PATIENCE: expected a whole number of seconds, found $patience"

# The GPUs, one per process, and the variable that assigns them. Without GPUs, processes use CPU devices or the
# platform that JAX_PLATFORMS names.
gpus=() visible=CUDA_VISIBLE_DEVICES
if [[ ${JAX_PLATFORMS:-} == *rocm* ]]; then visible=ROCR_VISIBLE_DEVICES; fi
if [[ ${JAX_PLATFORMS:-} =~ cuda|gpu|rocm ]] || { [[ -z ${JAX_PLATFORMS:-} ]] && command -v nvidia-smi >/dev/null; }; then
  if [[ -n ${!visible+set} ]]; then
    if [[ ${!visible} != -1 ]]; then IFS=, read -r -a gpus <<<"${!visible}"; fi
  elif command -v nvidia-smi >/dev/null; then
    while read -r; do gpus+=("${#gpus[@]}"); done < <(nvidia-smi -L 2>/dev/null | grep '^GPU ')
  else
    for ((host = 0; host < processes; host++)); do gpus+=("$host"); done
  fi
fi
if ((${#gpus[@]} > 0 && ${#gpus[@]} < processes)); then
  fail "$processes processes need a GPU each, but there are ${#gpus[@]} (${gpus[*]});" \
    "start fewer, or set JAX_PLATFORMS=cpu"
fi

stopped=
pids=()
stop() {
  stopped=1
  # All processes get the signal; they agree on the step after which they stop.
  signal_all TERM
}
signal_all() {
  local pid
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}
trap stop TERM INT HUP

# A free port outside the range from which Linux assigns ports.
free_port() {
  "$python" -c '
import random, socket
for port in random.sample(range(61440, 65536), 4096):
    try:
        socket.create_server(("", port)).close()
    except OSError:
        continue
    print(port)
    break'
}

start() {
  export S2S_JAX_HOST=$1
  shift
  if ((${#gpus[@]} > 0)); then
    export "$visible=${gpus[S2S_JAX_HOST]}"
    # Otherwise a process whose driver fails would train on the CPU.
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
    source "$home/launch/gpu_env.sh"
  else
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
    export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"
  fi
  exec "$python" -m "s2s_jax.$command" "$@"
}

# Ranks exit codes, to find the worst. A mistake (2), a loss that is not finite (3) or a crash (1) ranks above
# "start again" (75), and 75 above death by a signal, because the other processes then exit with 75.
rank() {
  if (($1 == 0)); then echo 0; elif (($1 > 128)); then echo 1; elif (($1 == 75)); then echo 2; else echo 3; fi
}

run_once() {
  local port pid ended left worst=0 deadline=
  port=$(free_port)
  export S2S_JAX_COORDINATOR=localhost:$port S2S_JAX_NUM_HOSTS=$processes
  pids=()
  for ((host = 0; host < processes; host++)); do
    # In a separate process group: Ctrl-C in a terminal then only reaches this script, which passes it on once.
    # A second signal would end the process at once.
    set -m
    start "$host" "$@" </dev/null &
    set +m
    pids+=($!)
  done
  # Passes on a signal that arrived while the processes were being started.
  if [[ -n $stopped ]]; then signal_all TERM; fi
  while ((${#pids[@]} > 0)); do
    left=()
    for pid in "${pids[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        left+=("$pid")
        continue
      fi
      ended=0
      wait "$pid" || ended=$?
      if (($(rank "$ended") > $(rank "$worst"))); then worst=$ended; fi
    done
    pids=(${left[@]+"${left[@]}"})
    if ((worst != 0 && ${#pids[@]} > 0)); then
      deadline=${deadline:-$((SECONDS + patience))}
      if ((SECONDS >= deadline)); then
        echo "launch/local.sh: a process exited with $worst, and the others did not within $patience s: killing them" >&2
        signal_all KILL
      fi
    fi
    if ((${#pids[@]} > 0)); then sleep 0.2; fi
  done
  return "$worst"
}

while :; do
  code=0
  run_once "$@" || code=$?
  if ((code != 75 && code <= 128 || restarts == 0)) || [[ -n $stopped ]]; then exit "$code"; fi
  restarts=$((restarts - 1))
  echo "launch/local.sh: the job exited with $code; starting it again, $restarts restarts left" >&2
done
