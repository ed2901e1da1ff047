#!/bin/bash
#SBATCH --job-name=run-1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/run-1/job.log
#SBATCH --requeue
#
# run-1: resnet20-mnist on 1 x 1 processes.
# Written by paperscale VERSION. Each start of this script is one attempt of the run: it continues from
# the newest verified checkpoint, and asks to be run again if the training says so (exit code 75).

cd /home/me/work || exit

# The environment, as the profile local has it.
export OMP_NUM_THREADS=2

set -uo pipefail
run=/home/me/runs/run-1
python=/home/me/venv/bin/python

export PYTHONPATH="$run/code${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
export PAPERSCALE_HANG_S=  # seconds without a step; none: from the time of a step
export PAPERSCALE_START_S=600  # seconds to the first step

# This machine is the only node.
launch() { "$@" >"$logs/node-0.log" 2>&1; }

# -- one attempt of the run, and what is next -------------------------------------------------------------------------

max_requeues=100  # attempts after the first
max_stalled=3  # attempts in a row without a new checkpoint

say() { echo "$(date +%FT%T) $*"; }
stop() { say "stopped: $*"; exit "$code"; }
newest_checkpoint() { ls "$run/checkpoints" | tail -n 1; }  # names sort by step; an unfinished one is hidden

# This machine: the script runs itself again.
scheduler() { echo running; }
cause() {
    case $code in
    0) echo finished ;;
    1 | 2) echo failed ;;
    75) if [[ -e $run/stop ]]; then echo stop; else echo signal; fi ;;
    76) echo lost ;;
    77) echo hang ;;
    78) echo bad-node ;;
    80) echo rollback ;;
    81) echo out-of-memory ;;
    *) echo killed ;;
    esac
}
leave_train() { :; }
requeue() {
    if ((code == 78)); then stop "this machine did not pass its preflight: $error"; fi
    exec bash "$0"
}

trap : TERM USR1 USR2  # a signal to the job is for the training; this script outlives it to decide what is next

code=0
if [[ -e $run/results.json ]]; then stop "the run is finished"; fi
if [[ -e $run/cancelled ]]; then stop "the run is cancelled"; fi
if [[ -e $run/stop ]]; then stop "there is a file $run/stop"; fi

attempt=$(($(ls "$run/attempts" | wc -l) + 1))
previous=$run/attempts/$(printf %04d $((attempt - 1)))
if ((attempt > 1)) && [[ ! -e $previous/cause ]]; then echo node-failure >"$previous/cause"; fi  # nobody was left to say
logs=$run/attempts/$(printf %04d "$attempt")
mkdir "$logs" || { say "failed for good: $logs cannot be made"; exit 1; }
before=$(newest_checkpoint)
say "attempt $attempt on $HOSTNAME, from ${before:-the start}"

launch "$python" -m paperscale.jobs.agent "$run" "$attempt"
code=$?
trap '' TERM USR1 USR2  # and from here on for nobody: a trapped signal would still end the commands below
if [[ -s $logs/verdict ]]; then
    code=$(<"$logs/verdict")  # of what failed first: the other ranks and nodes end with codes of their own
elif ((code != 0 && code != 75 && code < 128)) || [[ $code == 0 && ! -e $run/results.json ]]; then
    code=76  # no agent has come to a verdict: it is the launch that failed
fi
echo "$code" >"$logs/exit_code"
if ((code == 79)); then stop "$(cat "$logs/error")"; fi  # another start of this script owns the run
scheduler=$(scheduler)
cause=$(cause)
echo "$cause" >"$logs/cause"

if ((code == 0)); then
    say "finished"
    leave_train
    exit 0
fi
error=$(cat "$logs/error" 2>/dev/null || echo "see $logs")
if ((code == 1 || code == 2)); then
    say "failed for good (exit code $code): $error"
    leave_train
    exit "$code"
fi

# Run again, unless nobody wants that or it leads nowhere.
say "attempt $attempt ended: $cause (exit code $code)$( ((code == 75)) || echo ", $error")"
stalled=$(cat "$run/stalled" 2>/dev/null || echo 0)
if [[ $(newest_checkpoint) != "$before" ]]; then
    stalled=0
elif [[ $scheduler == preemption || $scheduler == requeue ]]; then
    :  # the scheduler's doing, not the run's
elif ((code != 80 && code != 81)); then  # the next attempt does otherwise
    stalled=$((stalled + 1))
fi
echo "$stalled" >"$run/stalled"

if [[ $scheduler == cancel && ! -e $run/cancelled ]]; then echo scancel >"$run/cancelled"; fi
if [[ -e $run/cancelled ]]; then stop "cancelled by $(cat "$run/cancelled")"; fi
if [[ -e $run/stop ]]; then stop "there is a file $run/stop"; fi
if [[ $scheduler == requeue ]]; then stop "the scheduler runs this job again by itself"; fi
if ((attempt > max_requeues)); then stop "$attempt attempts are the most allowed"; fi
if ((stalled >= max_stalled)); then stop "$stalled attempts in a row without a new checkpoint"; fi
say "run again"
requeue || stop "it could not be requeued; continue with: paperscale resume run-1"
