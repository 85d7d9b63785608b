#!/usr/bin/env bash
# Tests launch/slurm.sbatch with a real SLURM (Debian's): a controller and two node daemons on this machine.
#   scripts/slurm_test.sh          # as root; installs slurm-wlm and munge with apt-get if they are missing
# Checks which of some fake GPUs tasks use, and submits jobs of two tasks, one per node, on CPU devices. One job
# gets the signal of a time limit, saves, is queued again, continues and ends. One finds a damaged file during
# training, another a mistake in its arguments, and both end with 2 and are not queued again. One reaches its
# real time limit, is queued again, is then cancelled and stays so. One evaluates, and one recommends, is stopped,
# queued again and ends. The daemons run in separate namespaces, so
# they always end with this script, and nothing else on this machine changes. KEEP=DIR keeps logs and runs
# there. Exits with 77 if SLURM is not available.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)

cannot() {
  echo "scripts/slurm_test.sh: $*" >&2
  exit 77
}

if [[ ${1:-} != inside ]]; then
  ((EUID == 0)) || cannot "must be root, to start SLURM's daemons"
  # One after the other: `command -v` is content with any one of several.
  if ! { command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null; then
    command -v apt-get >/dev/null || cannot "no apt-get to install slurm-wlm and munge with"
    echo "== installing slurm-wlm and munge"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >/dev/null 2>&1 ||
      cannot "apt-get could not install slurm-wlm and munge"
  fi
  unshare --mount --pid --fork true 2>/dev/null || cannot "no permission to make namespaces (unshare)"
  export work=${KEEP:-$(mktemp -d)}
  mkdir -p "$work"
  if [[ -z ${KEEP:-} ]]; then trap 'rm -rf "$work"' EXIT; fi
  unshare --mount --pid --fork --mount-proc --kill-child "$0" inside
  exit
fi

# From here on, this runs in separate namespaces. Only they know the names of the nodes.
user=$(id -un)
python=${PYTHON:-$([[ -x $home/.venv/bin/python ]] && echo "$home/.venv/bin/python" || echo python3)}
cd "$work"
{
  cat /etc/hosts
  echo "127.0.0.1 n1 n2"
} >hosts
mount --bind hosts /etc/hosts
mkdir -p etc run spool state "runs and logs"
chmod 755 "$work" etc run
dd if=/dev/urandom of=etc/munge.key bs=1024 count=1 status=none
chmod 400 etc/munge.key
munged --force --key-file "$work/etc/munge.key" --socket "$work/run/munge" --pid-file "$work/run/munged.pid" \
  --log-file "$work/munged.log" --seed-file "$work/run/munge.seed"

# Ports that are free now.
read -r controller first second < <("$python" -c '
import socket
sockets = [socket.create_server(("", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))')
cat >etc/slurm.conf <<EOF
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CryptoType=crypto/munge
# A job that was queued again may only start after its credentials have expired.
AuthInfo=socket=$work/run/munge,cred_expire=5
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool/%n
SlurmctldPidFile=$work/run/slurmctld.pid
SlurmdPidFile=$work/run/%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/%n.log
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$first CPUs=4 Gres=gpu:4
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$second CPUs=4 Gres=gpu:4
PartitionName=all Nodes=n1,n2 Default=YES State=UP MaxTime=60
EOF
# Device files without devices: SLURM assigns them and sets variables as for real GPUs.
for i in 0 1 2 3; do mknod "etc/gpu$i" c 195 "$i" || cannot "no permission to make device files (mknod)"; done
echo "Name=gpu File=$work/etc/gpu[0-3]" >etc/gres.conf
export SLURM_CONF=$work/etc/slurm.conf
slurmctld -c
slurmd -N n1
slurmd -N n2

# Fails unless $2, the value found for $1, equals $3.
expect() {
  if [[ $2 != "$3" ]]; then
    echo "FAILED: $1: expected $3, found $2" >&2
    cat "$work"/*.out >&2 || true
    exit 1
  fi
}

# Waits at most $1 seconds until the command in the other arguments succeeds.
wait_until() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    if ((SECONDS >= end)); then
      echo "FAILED: timed out while waiting for: $*" >&2
      tail -n 40 "$work"/*.out "$work"/*.log >&2 || true
      exit 1
    fi
    sleep 0.5
  done
}
nodes_idle() { [[ $(sinfo --noheader --format %D%t) == 2idle ]]; }
wait_until 60 nodes_idle
echo "== SLURM $(slurmctld -V | cut -d' ' -f2) with the nodes $(sinfo --noheader --format %N)"

# Node and GPU of all tasks: each GPU must be used exactly once.
probe() {
  srun --quiet "$@" "$python" -c '
import os
from s2s_jax.cluster.place import find_place
place = find_place(os.environ)
seen = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
for i in place.devices:
    print(os.environ["SLURM_NODEID"], seen[i], sep="/")' | sort | paste -sd ' '
}
echo "== GPUs of tasks"
all="0/0 0/1 0/2 0/3 1/0 1/1 1/2 1/3"
export PYTHONPATH=$home
expect "one task a node" "$(probe --nodes 2 --ntasks-per-node 1 --gpus-per-node 4)" "$all"
expect "one task a GPU" "$(probe --nodes 2 --ntasks-per-node 4 --gpus-per-node 4)" "$all"
expect "one task a GPU, bound" "$(probe --nodes 2 --ntasks-per-node 4 --gpus-per-task 1)" "$all"
expect "two GPUs a task" "$(probe --nodes 2 --ntasks-per-node 2 --gpus-per-node 4)" "$all"
expect "two GPUs a task, bound" "$(probe --nodes 2 --ntasks-per-node 2 --gpus-per-task 2)" "$all"
expect "two of four, bound" "$(probe --nodes 2 --ntasks-per-node 2 --gpus-per-task 1)" "0/0 0/1 1/0 1/1"
unset PYTHONPATH

# Like a user: in their own directory, with relative paths that contain a space.
cd "runs and logs"
export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_backend_optimization_level=0 ${XLA_FLAGS:-}" PYTHON=$python
PYTHONPATH=$home "$python" -m s2s_jax synthesize --output "a log" --users 400 >/dev/null
cat >mine.py <<EOF
import dataclasses
from s2s_jax.config import LastEvents, load_file

def get_config():
    base = load_file("$home/configs/quickstart.py")
    io = dataclasses.replace(base.io, data_paths="a log", batch_size=4)
    model = dataclasses.replace(base.model, num_layers=1)
    held_out = dataclasses.replace(base.eval, split=LastEvents())
    return dataclasses.replace(base, io=io, model=model, eval=held_out)
EOF
# Submits a job, with options of sbatch before --, and after it the command and its arguments; prints the number of the
# job.
submit() {
  local options=()
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  sbatch --parsable --nodes 2 --ntasks-per-node 1 --cpus-per-task 1 --output "$work/%j.out" "${options[@]}" \
    "$home/launch/slurm.sbatch" "$@" --config mine.py
}
says() { grep -q -- "$2" "$work/$1.out" 2>/dev/null; }
is() { [[ $(squeue --noheader --jobs "$1" --states all --format %T 2>/dev/null) == "$2" ]]; }
# State, exit code and number of restarts of a job.
ended() { scontrol show job "$1" | grep -oE '(JobState|ExitCode|Restarts)=[^ ]*' | sort | paste -sd ' '; }

echo "== a job of two tasks that gets the signal of a time limit"
job=$(submit -- --train.output_dir "my run" --train.train_steps 150 --train.log_steps 5)
lines() { (($(wc -l 2>/dev/null <"my run/metrics.jsonl" || echo 0) >= $1)); }
wait_until 240 lines 2
# The same as SLURM does because of --signal=B:TERM@600 in the script.
scancel --batch --signal=TERM "$job"
wait_until 120 says "$job" "queued again to continue"
echo "   $(grep -m1 "queued again" "$work/$job.out")"
wait_until 240 says "$job" "continuing from the checkpoint of step"
echo "   $(grep -m1 "continuing" "$work/$job.out")"
wait_until 240 is "$job" COMPLETED
expect "the job" "$(ended "$job")" "ExitCode=0:0 JobState=COMPLETED Restarts=1"
[[ -d "my run/checkpoints/150" ]] || expect "the last checkpoint" "$(ls "my run/checkpoints")" 150

echo "== a job of two tasks that evaluates this run"
job=$(submit -- evaluate --train.output_dir "my run")
wait_until 240 is "$job" COMPLETED
echo "   $(grep -m1 "ndcg@10" "$work/$job.out")"
[[ -f "my run/evaluation_test_150.json" ]] || expect "the evaluation" none "a file"

echo "== a job of two tasks that recommends, and is stopped"
job=$(submit -- recommend --train.output_dir "my run" --input "a log" --output recs)
wait_until 240 test -f recs/_made_for.json
scancel --batch --signal=TERM "$job"
wait_until 120 says "$job" "queued again to continue"
echo "   $(grep -m1 "queued again" "$work/$job.out")"
wait_until 240 is "$job" COMPLETED
[[ -f recs/_SUCCESS ]] || expect "the recommendations" "$(ls recs)" "a file _SUCCESS"
echo "   $(grep -m1 "wrote up to" "$work/$job.out")"
expect "the job" "$(ended "$job")" "ExitCode=0:0 JobState=COMPLETED Restarts=1"

echo "== a job with a damaged log, which one of its tasks finds"
cp -r "a log" "bad log"
for file in "bad log"/*.orc; do break; done
# The end of the file, which all tasks read at the start, stays intact.
dd if=/dev/urandom of="$file" bs=1000 seek=1 count=8 conv=notrunc status=none
job=$(submit -- --train.output_dir "bad run" --io.data_paths "bad log" --train.train_steps 60)
wait_until 240 is "$job" FAILED
echo "   $(grep -m1 "error:" "$work/$job.out")"
expect "the job" "$(ended "$job")" "ExitCode=2:0 JobState=FAILED Restarts=0"

echo "== a job with a key that does not exist"
job=$(submit -- --train.output_dir "bad run" --train.steps 10)
wait_until 60 is "$job" FAILED
echo "   $(grep -m1 "error:" "$work/$job.out")"
expect "the job" "$(ended "$job")" "ExitCode=2:0 JobState=FAILED Restarts=0"

echo "== a job that runs into its time limit, and is cancelled later"
job=$(submit --time 2 --signal B:TERM@60 -- --train.output_dir "long run" --train.train_steps 1000000)
wait_until 200 says "$job" "queued again to continue"
echo "   $(grep -m1 "queued again" "$work/$job.out")"
wait_until 200 says "$job" "continuing from the checkpoint of step"
scancel "$job"
wait_until 120 is "$job" CANCELLED
# Long enough for a job that is queued again to start.
sleep 8
is "$job" CANCELLED || expect "the job" "$(ended "$job")" "JobState=CANCELLED"
echo "== all checks passed"
