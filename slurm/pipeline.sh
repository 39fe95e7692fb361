#!/usr/bin/env bash
# Submit a whole study, each job after those whose outputs it reads, and print the jobs' numbers:
#
#   bash slurm/pipeline.sh [experiment=STUDY] [key=value ...]     tokens -> extract (array) -> train (each pair) -> analysis
#
# What can be refused is refused before the first job is submitted. Each setting goes to the stages that know it. Run it
# again, once its jobs have ended, to do what is missing. Where there is no Slurm, the stages run here one after another.
# From slurm/site.sh or the environment:
#
#   EXTRACT_TASKS=4  TRAIN_NODES=1     array tasks of the extraction, nodes of a training
#   GPUS_PER_NODE=8  GPU=h100          of the nodes; with the name memory is checked against the plan
#   RANKS_PER_NODE=8                   processes on a node, if not one for each GPU
#   SBATCH_ARGS, TOKENS_ARGS, EXTRACT_ARGS, TRAIN_ARGS, ANALYSIS_ARGS      options of sbatch, for all jobs and for each

# shellcheck source=slurm/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

main() {
  label=pipeline.sh again="bash slurm/pipeline.sh$([ $# -eq 0 ] || printf ' %q' "$@")"
  has_slurm=$(command -v sbatch)
  [ -n "$has_slurm" ] || listen
  arguments_of gemma2_9b "$@"
  find_python
  sort_arguments
  preflight
  mkdir -p "$outputs/logs" || fail "$outputs/logs cannot be made: choose another place, outputs=PATH."
  if [ -z "$has_slurm" ]; then
    study
    ended 0
  fi
  refuse_twice
  testing=yes
  study
  testing=""
  study
  report
}

# Settings by the stages that know them: all, training and analysis, the analysis alone.
sort_arguments() {
  local argument name
  extract=() train=() analysis=()
  for argument in "${arguments[@]}"; do
    name=${argument#"${argument%%[!+~]*}"}
    case ${name%%[.=@]*} in
      analysis) analysis+=("$argument") ;;
      crosscoder | training | data | engine) train+=("$argument") analysis+=("$argument") ;;
      *) extract+=("$argument") train+=("$argument") analysis+=("$argument") ;;
    esac
  done
}

# Settings and memory of every pair; which pairs there are, and where the study writes.
preflight() {
  local per_node=${RANKS_PER_NODE:-${GPUS_PER_NODE:-1}} num_nodes=${TRAIN_NODES:-1} gpu=${GPU:-none} more found
  [ -n "$has_slurm" ] || per_node=${RANKS_PER_NODE:-$gpus} num_nodes=1 gpu=auto
  [ "$per_node" -gt 0 ] || per_node=1
  more=("gpus=$((per_node * num_nodes))" "gpus_per_node=$per_node" "gpu=$gpu" needs_store=false)
  [ "${more[0]}" = gpus=1 ] || has engine "${train[@]}" || more+=(engine=latent)
  ! asked --nodes N || fail "TRAIN_ARGS and SBATCH_ARGS cannot have --nodes: TRAIN_NODES says how many, and what is checked."
  if [ -n "$has_slurm" ] && ! asked --time t; then
    more+=("walltime=${SBATCH_TIMELIMIT:-24:00:00}")
    asked --partition p || more+=("partition_limit=$(partition_limit)")
  fi
  found=$("${python[@]}" -m train.preflight "${train[@]}" "${more[@]}") || ended $?
  mapfile -t pairs < <(sed -n 's/^pair //p' <<<"$found")
  outputs=$(sed -n 's/^outputs //p' <<<"$found")
}

# asked --LONG SHORT: whether options for training name this one of sbatch.
asked() { [[ " ${SBATCH_ARGS[*]} ${TRAIN_ARGS[*]} " =~ \ ("$1"[=\ ]|-"$2") ]]; }

# The longest time of the partition that jobs go to; one that asks for more would wait for ever.
partition_limit() {
  local chosen=${SBATCH_PARTITION:-}
  chosen=${chosen%%,*}
  sinfo --noheader --format="%P %l" | awk -v chosen="$chosen" '$1 == chosen || $1 == chosen "*" || chosen == "" && /\*/ { print $2; exit }' |
    grep . || echo UNLIMITED
}

# Jobs of an earlier pipeline of this study that have not ended do the same work.
refuse_twice() {
  local left
  [ -f "$outputs/logs/jobs" ] || return 0
  left=$(squeue --me --noheader --format="%F %T" | awk 'NR == FNR { name[$2] = $1; next } $1 in name { print name[$1], $1, $2 }' "$outputs/logs/jobs" - |
    sort -u -k 2,2n)
  [ -z "$left" ] || fail "this study's jobs of an earlier pipeline.sh have not ended: $(paste -sd , <<<"$left" | sed 's/,/, /g')." \
    "Wait for them, or cancel them first: scancel $(awk '{ print $2 }' <<<"$left" | sort -un | paste -sd ' ')"
}

# All jobs of the study, in order.
study() {
  local pair choice script own trained=""
  jobs=() report=()
  stage tokens tokens.sh "" "${TOKENS_ARGS[*]}" "${extract[@]}"
  stage extract extract.sh "$job" "--array=0-$((${EXTRACT_TASKS:-4} - 1)) ${EXTRACT_ARGS[*]}" "${extract[@]}"
  for pair in "${pairs[@]}"; do
    choice=${pair#* } pair=${pair%% *} script=train_$pair.sh
    [ "$choice" = "experiment=gemma2_9b/$pair" ] && [ -f "slurm/$script" ] || script=train.sh
    own=("$choice" "${train[@]}") # a pair that has an experiment of its own, or is chosen by pair=
    [ "${choice%%=*}" != experiment ] || own=("${train[@]/#experiment=*/$choice}")
    stage "train_$pair" "$script" "${jobs[1]}" "--nodes=${TRAIN_NODES:-1} ${TRAIN_ARGS[*]}" "${own[@]}"
    trained+=${trained:+:}$job
  done
  stage analysis analysis.sh "$trained" "$(one_gpu) ${ANALYSIS_ARGS[*]}" "${analysis[@]}"
}

# stage NAME SCRIPT AFTER OPTIONS ARGUMENT...: submit one job, its number in `job`; or ask Slurm whether it would take it.
stage() {
  local name=$1 script=slurm/$2 after=$3 options=() said
  local submit=(sbatch)
  if [ -z "$has_slurm" ]; then
    run_here bash "$script" "${@:5}"
    return
  fi
  # shellcheck disable=SC2206 # options are words
  options=(${SBATCH_ARGS[*]} $4 --job-name="$name" --output="$outputs/logs/%x-%j.log")
  [ "$name" != extract ] || options+=(--output="$outputs/logs/%x-%A_%a.log")
  [ "$name" != tokens ] || submit=(env -u SBATCH_GPUS -u SBATCH_GPUS_PER_NODE -u SBATCH_GRES -u SBATCH_CPUS_PER_GPU \
    -u SBATCH_MEM_PER_GPU sbatch)
  if [ -n "$testing" ]; then
    said=$("${submit[@]}" --test-only "${options[@]}" "$script" "${@:5}" 2>&1) || refused "$name" "$said"
    return
  fi
  [ -z "$after" ] || options+=(--dependency="afterok:$after" --kill-on-invalid-dep=yes)
  if ! said=$("${submit[@]}" --parsable "${options[@]}" "$script" "${@:5}"); then
    [ ${#jobs[@]} -eq 0 ] || scancel "${jobs[@]}"
    fail "Slurm refused $script, see above; the ${#jobs[@]} jobs submitted before it are cancelled."
  fi
  job=${said%%;*}
  printf '%s %s\n' "$name" "$job" >>"$outputs/logs/jobs"
  jobs+=("$job") report+=("$(printf '%-24s %s' "$name" "$job")")
}

# A stage on this machine, to its end. Asked to end, this script asks the stage, whose last lines have said what is left.
run_here() {
  [ -z "$heard" ] || ended 130
  "$@" &
  pids=($!)
  await
  pids=()
  [ "$status" = 0 ] || ended "$status"
}

# One GPU of as many as each node is asked for, of the same kind.
one_gpu() {
  case ${SBATCH_GPUS_PER_NODE:-0} in
    0) ;;
    *:*) echo "--gpus-per-node=${SBATCH_GPUS_PER_NODE%:*}:1" ;;
    *) echo "--gpus-per-node=1" ;;
  esac
}

# Nodes that are down for the moment are no reason: jobs wait for them.
refused() {
  [[ $2 != *"down, drained or reserved"* ]] || return 0
  echo "$2" >&2
  fail "Slurm would not take the job $1, see above; nothing is submitted. Mend SBATCH_PARTITION=${SBATCH_PARTITION:-}," \
    "SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-} or what else is asked for in $site."
}

report() {
  printf '%s\n' "${report[@]}"
  say "logs: $outputs/logs. To watch: squeue --me. To cancel all: scancel ${jobs[*]}"
  say "a job that fails takes those after it along. Mend what its log's last lines say, then: $again"
}

main "$@"
