#!/usr/bin/env bash
# What the scripts of this folder share: the site, how processes start and find each other, signals, requeueing, and how
# a job says that it ended. For other scripts:
#
#   prepare LABEL SHAPE [ARGUMENT...]    look before anything is done; sets python, nodes, per_node, gpus
#   run COMMAND...                       run COMMAND, say how it ended, exit with its status
#   job LABEL SHAPE COMMAND...           both
#
# SHAPE is ranks (one process for each GPU of all nodes, which find each other through MASTER_ADDR and MASTER_PORT),
# workers (as many, each for itself) or one (one process). In a Slurm job srun starts them; elsewhere this shell does, for
# the GPUs of this machine, or one for its CPU. LABEL is the name of the script; AGAIN the command that continues it.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2
site=${CROSSDIFF_SITE:-$root/slurm/site.sh}
setup() { :; }
CONTAINER=() SRUN_ARGS=()
# shellcheck source=/dev/null
[ ! -r "$site" ] || . "$site"

label=crossdiff again=${AGAIN:-} heard="" num_heard=0 is_late="" insisting="" pids=() nodes=1 per_node=1 gpus=0 num_cpus=1 cpus=1
# The number of an array's task: one of them has that of the whole array as SLURM_JOB_ID.
this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
this_job=${this_job:-${SLURM_JOB_ID:-}}
in_slurm() { [ -n "${SLURM_JOB_ID:-}" ] && command -v srun >/dev/null; }
# The script that Slurm runs is a copy of that name. Other scripts, a Jupyter server's for one, requeue no job of theirs.
is_batch() { [ "${CROSSDIFF_BATCH:-}" = 1 ] || [ "$(basename -- "$0")" = slurm_script ]; }

# has NAME ARGUMENT...: whether a setting NAME=, +NAME= or NAME.x= is among the arguments.
has() {
  local name=$1 argument
  for argument in "${@:2}"; do
    case ${argument#+} in "$name="* | "$name."*) return 0 ;; esac
  done
  return 1
}

# arguments_of EXPERIMENT ARGUMENT...: the arguments with an experiment, in `arguments`: theirs, EXPERIMENT's or that one.
arguments_of() {
  arguments=("${@:2}")
  has experiment "${arguments[@]}" || arguments=("experiment=${EXPERIMENT:-$1}" "${arguments[@]}")
}

job() {
  prepare "$1" "$2" "${@:3}"
  run "${@:3}"
}

prepare() {
  label=$1
  [ -n "$again" ] || again=$(in_slurm && echo sbatch || echo bash)" slurm/$label${3:+$(printf ' %q' "${@:3}")}"
  trap 'hear USR1' USR1
  trap 'hear TERM' TERM
  trap 'hear INT' INT
  trap 'is_late=yes num_heard=$((num_heard + 1))' USR2 # of insist
  find_python
  count_processes "$2" "${@:3}"
  if in_slurm; then
    say "job $this_job, start $((${SLURM_RESTART_COUNT:-0} + 1)), $nodes node(s) ($SLURM_JOB_NODELIST) x $per_node process(es)"
    compare_with_site
    rendezvous
  else
    say "no Slurm job: $per_node process(es) on this machine ($gpus GPUs)"
  fi
}

say() { echo "== $(date '+%F %T') $label: $*"; }

fail() {
  echo "error: $*" >&2
  ended 2
}

# The Python of the site's environment, which must have the packages; what it sees of GPUs.
find_python() {
  setup || fail "setup() of $site failed with status $?."
  if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$root/.venv/bin/python" ] || PYTHON=$root/.venv/bin/python
  fi
  python=("${CONTAINER[@]}" "$PYTHON")
  local found status
  found=$("${python[@]}" - "$root" 2>&1 <<'PROBE'
import importlib.util, sys
if sys.version_info < (3, 11):
    sys.exit("is Python %d.%d, and 3.11 is needed" % sys.version_info[:2])
sys.path.insert(0, sys.argv[1])
names = ("torch", "transformers", "hydra", "safetensors", "webdataset", "extract", "train", "analysis")
missing = [name for name in names if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("lacks " + ", ".join(missing))
import torch
print("gpus", torch.cuda.device_count())
PROBE
  )
  status=$?
  gpus=$(sed -n 's/^gpus //p' <<<"$found")
  if [ "$status" != 0 ] || [ -z "$gpus" ]; then
    tail -n 1 <<<"$found" >&2
    fail "${python[*]} cannot run crossdiff: see the line above. Say in setup() of slurm/site.sh how its environment" \
      "is entered (slurm/site.example.sh), or set PYTHON; README, \"On a cluster\", says what to install."
  fi
}

# count_processes SHAPE ARGUMENT...: processes on each node, and the CPUs of each.
count_processes() {
  local given=${SLURM_GPUS_ON_NODE:-0} tasks=${SLURM_NTASKS_PER_NODE:-}
  nodes=${SLURM_JOB_NUM_NODES:-1}
  in_slurm || { given=0 tasks="" nodes=1; }
  if [ "$given" != 0 ] && [ "$gpus" = 0 ] && [ "$1" != one ] && [[ "$*" != *device=cpu* ]]; then
    fail "Slurm gave this job $given GPUs on a node, of which $PYTHON sees none: its torch is one for CPUs, or does" \
      "not fit the driver. Install another, or choose the CPU: training.device=cpu, activations.device=cpu."
  fi
  if [ -z "$tasks" ] && in_slurm && [ "${SLURM_NTASKS:-0}" -gt "$nodes" ]; then
    tasks=$((SLURM_NTASKS / nodes))
  fi
  per_node=${RANKS_PER_NODE:-${tasks:-$gpus}}
  [ "$per_node" -gt 0 ] || per_node=1
  [ "$1" != one ] || { per_node=1 nodes=1; }
  num_cpus=$(tr ',' '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-$(nproc)}" | sed 's/(.*//' | sort -n | head -n 1)
  cpus=$((num_cpus / per_node))
  [ "$cpus" -gt 0 ] || cpus=1
  shape=$1
}

# What only sbatch reads is not applied to a job that was submitted without it: say so.
compare_with_site() {
  if [ -n "${SBATCH_PARTITION:-}" ] && [[ ",$SBATCH_PARTITION," != *",$SLURM_JOB_PARTITION,"* ]]; then
    say "note: this job is in partition $SLURM_JOB_PARTITION, and $site says $SBATCH_PARTITION. Before sbatch: . slurm/site.sh"
  fi
  if [ -n "${SBATCH_ACCOUNT:-}" ] && [ -n "${SLURM_JOB_ACCOUNT:-}" ] && [ "$SBATCH_ACCOUNT" != "$SLURM_JOB_ACCOUNT" ]; then
    say "note: this job is of account $SLURM_JOB_ACCOUNT, and $site says $SBATCH_ACCOUNT. Before sbatch: . slurm/site.sh"
  fi
  if [ "${GPUS_PER_NODE:-0}" != 0 ] && [ "$gpus" = 0 ] && [ "$shape" != one ]; then
    fail "This job has no GPUs, and $site says GPUS_PER_NODE=$GPUS_PER_NODE. Enter \`. slurm/site.sh\` before sbatch," \
      "or ask for them: sbatch --gpus-per-node=$GPUS_PER_NODE slurm/$label"
  fi
}

# Where ranks meet: the first node, by a name that the others can resolve, else by the address that Slurm knows; a port
# that depends on the job and its restart, so that nothing of an earlier start answers.
rendezvous() {
  local first address
  MASTER_ADDR=127.0.0.1
  if [ "$nodes" -gt 1 ]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=$first${HEAD_SUFFIX:-}
    if ! getent hosts "$MASTER_ADDR" >/dev/null; then
      address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
      MASTER_ADDR=${address:-$first}
    fi
  fi
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 37 + ${SLURM_RESTART_COUNT:-0} * 101) % 12000))
  free_port
  export MASTER_ADDR MASTER_PORT
}

free_port() { while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done; }

# Bash handles a signal once the command in the foreground has ended, or wait was interrupted.
hear() {
  heard=$1 num_heard=$((num_heard + 1))
  case $1 in
    USR1) say "Slurm says that this job is about to end: its processes save and end" ;;
    *) say "SIG$1 asks to end" ;;
  esac
  forward
}

# Elsewhere processes are told at once. Under Slurm srun passes USR1 on; it takes TERM and INT as a wish to kill at once,
# and Slurm itself sends those to all processes.
forward() {
  [ ${#pids[@]} -gt 0 ] || return
  if ! in_slurm; then
    kill -TERM "${pids[@]}" 2>/dev/null
  elif [ "$heard" != TERM ] && [ -z "$insisting" ]; then
    insist &
    insisting=$!
  fi
}

# Ask again until they have ended: one that is about to listen (see start_steps) has not heard it before. Where they do
# not end in time, this shell is told so.
insist() {
  local end
  end=$(squeue --noheader --jobs="$this_job" --format=%e | head -n 1)
  end=$(date -d "${end:-unknown}" +%s 2>/dev/null)
  while kill -USR1 "${pids[@]}" 2>/dev/null; do
    sleep 5
    [ -z "$end" ] || [ "$(date +%s)" -lt $((end - 20)) ] || kill -USR2 $$
  done
}

run() {
  export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
  [ -t 2 ] || export TQDM_MININTERVAL=${TQDM_MININTERVAL:-60} # a line of a log
  [ -z "${INTERFACE:-}" ] || export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
  [ -z "$heard" ] || ended 130
  if in_slurm; then start_steps "$@"; else start_here "$@"; fi
  [ -z "$heard" ] || forward
  await
  if [ -n "$is_late" ]; then
    say "its processes have not saved in time: what they had saved before is kept"
    status=75
  fi
  ended "$status"
}

# Everything that srun takes from its environment is said on its command line: which variables it heeds, and which
# exclude each other, differs between releases of Slurm. A rank that ends badly ends the others by itself. Until one
# listens to USR1 it ignores it, rather than die of it.
start_steps() {
  local overcommit=()
  [ $((cpus * per_node)) -le "$num_cpus" ] || overcommit=(--overcommit)
  (
    trap - TERM INT
    trap '' USR1
    unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_TASKS_PER_NODE SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK \
      SLURM_TRES_PER_TASK SLURM_CPUS_PER_GPU SLURM_DISTRIBUTION SLURM_EXPORT_ENV
    exec srun --mpi=none --export=ALL --kill-on-bad-exit=0 --wait=0 --distribution=block --nodes="$nodes" \
      --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node" --cpus-per-task="$cpus" \
      "${overcommit[@]}" "${SRUN_ARGS[@]}" bash -c "trap '' USR1; exec \"\$@\"" rank "$@"
  ) &
  pids=($!)
}

start_here() {
  local rank
  MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + $$ % 12000))
  free_port
  if [ "$per_node" -gt 1 ]; then
    export MASTER_ADDR MASTER_PORT WORLD_SIZE=$per_node LOCAL_WORLD_SIZE=$per_node
  fi
  for ((rank = 0; rank < per_node; rank++)); do
    (
      trap - USR1 TERM INT
      [ "$per_node" -eq 1 ] || export RANK=$rank LOCAL_RANK=$rank
      exec "$@"
    ) &
    pids+=($!)
  done
}

# The largest status of all processes, in `status`. A wait that a signal interrupted is begun again.
await() {
  local pid own next before
  status=0
  for pid in "${pids[@]}"; do
    own=""
    while :; do
      before=$num_heard
      wait "$pid"
      next=$?
      [ "$next" = 127 ] && [ -n "$own" ] || own=$next # 127: it had ended when the signal came
      [ "$num_heard" != "$before" ] || break
      [ -z "$is_late" ] || break 2
    done
    [ "$own" -le "$status" ] || status=$own
  done
}

# ended STATUS: what happened and what to do, in the last lines of the log; requeue where that is what to do.
ended() {
  local status=$1 what
  trap '' USR1 USR2
  case $status in
    0) say "finished." && exit 0 ;;
    2) what="a setting, a file or the environment must be mended: the line that begins with \"error:\" says which. Then: $again" ;;
    70) what="a process hung or died: the error above says which. What was saved is kept; to continue: $again" ;;
    75 | 130) what="stopped before the end; what was saved is kept. To continue: $again" ;;
    *) what="ended with status $status, which is a defect or a broken installation: see the messages above. To continue once that is mended: $again" ;;
  esac
  if [ "$status" -gt 130 ]; then
    what="a process was killed by signal $((status - 128)) (9: most often out of memory). What was saved is kept; to continue: $again"
  fi
  if may_continue "$status" && is_batch; then
    requeue "$status"
  fi
  [ "$heard" != TERM ] || what="ended by SIGTERM (scancel, preemption or the end of its time). What was saved is kept; to continue: $again"
  say "$what"
  exit "$status"
}

# Whether the same command would continue: stopped, hung, killed, or ended anyhow after Slurm said that time is up.
may_continue() {
  [ "$1" != 2 ] && [ "$heard" != TERM ] && [ "$heard" != INT ] || return 1
  [ "$1" = 70 ] || [ "$1" = 75 ] || [ "$1" -gt 130 ] || [ "$heard" = USR1 ]
}

requeue() {
  say "status $1: not finished, what was saved is kept; this job is requeued and continues by itself. To prevent that: scancel $this_job"
  trap 'exit 75' TERM
  if scontrol requeue "$this_job"; then
    sleep 60 & # Slurm ends this script now
    wait $!
    exit "$1"
  fi
  say "it could not be requeued: see above."
}
