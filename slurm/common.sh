#!/usr/bin/env bash
# What the scripts of this folder share: the site, and how processes start and find each other; ending.sh is how they end.
# For other scripts:
#
#   prepare LABEL SHAPE [ARGUMENT...]    look before anything is done; sets python, nodes, per_node, gpus
#   run COMMAND...                       run COMMAND, say how it ended, exit with its status
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

# shellcheck source=slurm/ending.sh
. "$root/slurm/ending.sh"

label=crossdiff again=${AGAIN:-} pids=() nodes=1 per_node=1 gpus=0 num_cpus=1 cpus=1 threads=1 needs_gpus=yes
# The number of an array's task: one of them has that of the whole array as SLURM_JOB_ID.
this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
this_job=${this_job:-${SLURM_JOB_ID:-}}
in_slurm() { [ -n "${SLURM_JOB_ID:-}" ] && command -v srun >/dev/null; }

# has NAME ARGUMENT...: whether NAME=, +NAME= or NAME.name=, by which a group is chosen too, is among the arguments.
has() {
  local name=$1 argument
  for argument in "${@:2}"; do
    case ${argument#+} in "$name="* | "$name.name="*) return 0 ;; esac
  done
  return 1
}

# arguments_of EXPERIMENT ARGUMENT...: the arguments with an experiment, in `arguments`: theirs, EXPERIMENT's or that one.
arguments_of() {
  check_settings "${@:2}"
  arguments=("${@:2}")
  has experiment "${arguments[@]}" || arguments=("experiment=${EXPERIMENT:-$1}" "${arguments[@]}")
}

# Settings alone: what sbatch is to read comes before the script's name.
check_settings() {
  local argument
  for argument; do
    case $argument in
      -*) fail "$argument is no setting. Options of sbatch come first: sbatch $argument slurm/$label; those for jobs of pipeline.sh in SBATCH_ARGS." ;;
      *=* | \~*) ;;
      *) fail "$argument is no setting. Settings are KEY=VALUE, for example experiment=demo." ;;
    esac
  done
}

prepare() {
  label=$1
  [ -n "$again" ] || again=$(in_slurm && echo sbatch || echo bash)" slurm/$label${3:+$(printf ' %q' "${@:3}")}"
  listen
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
  [ "$1" != one ] && [[ "$*" != *device=cpu* ]] || needs_gpus=""
  local given=${SLURM_GPUS_ON_NODE:-0} tasks=${SLURM_NTASKS_PER_NODE:-}
  nodes=${SLURM_JOB_NUM_NODES:-1}
  in_slurm || { given=0 tasks="" nodes=1; }
  if [ "$given" != 0 ] && [ "$gpus" = 0 ] && [ -n "$needs_gpus" ]; then
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
  threads=$cpus
}

# What only sbatch reads is not applied to a job that was submitted without it: say so.
compare_with_site() {
  if [ -n "${SBATCH_PARTITION:-}" ] && [[ ",$SBATCH_PARTITION," != *",$SLURM_JOB_PARTITION,"* ]]; then
    say "note: this job is in partition $SLURM_JOB_PARTITION, and $site says $SBATCH_PARTITION. Before sbatch: . slurm/site.sh"
  fi
  if [ -n "${SBATCH_ACCOUNT:-}" ] && [ -n "${SLURM_JOB_ACCOUNT:-}" ] && [ "$SBATCH_ACCOUNT" != "$SLURM_JOB_ACCOUNT" ]; then
    say "note: this job is of account $SLURM_JOB_ACCOUNT, and $site says $SBATCH_ACCOUNT. Before sbatch: . slurm/site.sh"
  fi
  if [ "${GPUS_PER_NODE:-0}" != 0 ] && [ "$gpus" = 0 ] && [ -n "$needs_gpus" ]; then
    fail "This job has no GPUs, and $site says GPUS_PER_NODE=$GPUS_PER_NODE. Enter \`. slurm/site.sh\` before sbatch," \
      "ask for them, sbatch --gpus-per-node=$GPUS_PER_NODE slurm/$label, or choose the CPU: training.device=cpu," \
      "activations.device=cpu."
  fi
}

# Where ranks meet: the first node, by a name that the others can resolve, else by the address that Slurm knows; a port
# that depends on the job and its restart, so that nothing of an earlier start answers.
rendezvous() {
  local names
  MASTER_ADDR=127.0.0.1
  if [ "$nodes" -gt 1 ]; then
    mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=${names[0]}${HEAD_SUFFIX:-}
    getent hosts "$MASTER_ADDR" >/dev/null || MASTER_ADDR=$(address_of "${names[0]}")
    find_interface "$(address_of "${names[1]}")"
  fi
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 37 + ${SLURM_RESTART_COUNT:-0} * 101) % 12000))
  free_port
  export MASTER_ADDR MASTER_PORT
}

address_of() {
  local found
  found=$(getent hosts "$1" || scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  echo "${found%% *}"
}

# Gloo listens at the address of the node's own name. Where that is one of the loopback (Debian's 127.0.1.1), which
# others cannot reach: at the interface that leads to ADDRESS, another node.
find_interface() {
  local found
  [ -z "${INTERFACE:-}${GLOO_SOCKET_IFNAME:-}" ] && [[ $(getent hosts "$(hostname)") == @(127.|::1)* ]] || return 0
  found=$(ip -oneline route get "$1" 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p')
  [ "${found:-lo}" = lo ] || export GLOO_SOCKET_IFNAME=$found
}

free_port() { while (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done; }

run() {
  export PYTHONUNBUFFERED=1
  [ -z "$threads" ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
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
