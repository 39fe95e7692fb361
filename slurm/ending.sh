# shellcheck shell=bash disable=SC2154 # common.sh, which reads this file, sets what both share
# How jobs end: signals that are passed on, statuses, requeueing, and what the last lines of a log say.

heard="" num_heard=0 is_late="" insisting=""
# The script that Slurm runs is a copy of that name. Other scripts, a Jupyter server's for one, requeue no job of theirs.
is_batch() { [ "${CROSSDIFF_BATCH:-}" = 1 ] || [ "$(basename -- "$0")" = slurm_script ]; }

say() { echo "== $(date '+%F %T') $label: $*"; }

fail() {
  echo "error: $*" >&2
  ended 2
}

listen() {
  trap 'hear USR1' USR1
  trap 'hear TERM' TERM
  trap 'hear INT' INT
  trap 'is_late=yes num_heard=$((num_heard + 1))' USR2 # of insist
}

# Bash handles a signal once the command in the foreground has ended, or wait was interrupted.
hear() {
  heard=$1 num_heard=$((num_heard + 1))
  case $1 in
    USR1) say "Slurm says that this job is about to end: its processes save and end" ;;
    *) say "SIG$1 asks to end; to continue: $again" ;; # said now: Slurm kills this script too if processes take long
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
    sleep 3
    [ -z "$end" ] || [ "$(date +%s)" -lt $((end - 20)) ] || kill -USR2 $$
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
  if is_batch; then
    [ "$status" -lt 70 ] || sleep 1 # who cancels a job asks its processes and this shell at about the same time
    ! may_continue "$status" || requeue "$status"
  fi
  [ "$heard" != TERM ] || what="ended by SIGTERM (scancel, preemption or the end of its time). What was saved is kept; unless Slurm requeues it, to continue: $again"
  say "$what"
  exit "$status"
}

# Whether the same command would continue: stopped (75, and 130 where there is no more to save), hung, killed, or ended
# anyhow after Slurm said that time is up. At pre-emption with a GraceTime Slurm sends SIGTERM to the processes alone, and
# a job that ends then is not requeued unless it asks. Where this shell hears SIGTERM too, the job is being cancelled, or
# requeued by Slurm itself.
may_continue() {
  [ "$1" != 2 ] && [ "$heard" != TERM ] && [ "$heard" != INT ] || return 1
  [ "$1" = 70 ] || [ "$1" = 75 ] || [ "$1" -ge 130 ] || [ "$heard" = USR1 ]
}

# Restarts without progress are bounded by Python (extract/restarts.py), but for a process that dies before it gets there.
max_early_deaths=10
is_in_vain() {
  [ "$1" != 75 ] && [ "$1" != 130 ] && [ -z "$heard" ] && [ "$SECONDS" -lt 900 ] &&
    [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_early_deaths" ]
}

# A controller that does not answer for a moment is asked again.
requeue() {
  if is_in_vain "$1"; then
    say "this job was restarted $SLURM_RESTART_COUNT times, and died $SECONDS s after this start: it is not requeued."
    return
  fi
  say "status $1: not finished, what was saved is kept; this job is requeued and continues by itself. To prevent that: scancel $this_job"
  trap 'exit 75' TERM
  local end=$((SECONDS + 60))
  until scontrol requeue "$this_job"; do
    if [ "$SECONDS" -ge "$end" ]; then
      say "it could not be requeued: see above."
      return
    fi
    sleep 5
  done
  sleep 60 & # Slurm ends this script now
  wait $!
  exit "$1"
}
