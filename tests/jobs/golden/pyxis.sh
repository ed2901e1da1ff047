#!/bin/bash
#SBATCH --job-name=run-1
#SBATCH --partition=gpu
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=96
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=/home/me/runs/run-1/job.log
#SBATCH --requeue
#
# run-1: resnet20-mnist on 4 x 8 processes.
# Written by paperscale VERSION. Each start of this script is one attempt of the run: it continues from
# the newest verified checkpoint, and asks to be run again if the training says so (exit code 75).

cd /home/me/work || exit

# The environment, as the profile pyxis has it.
export OMP_NUM_THREADS=12

set -uo pipefail
run=/home/me/runs/run-1
python=python3

export PYTHONPATH="$run/code"  # without the node's own packages, which are not the container's
export PYTHONUNBUFFERED=1
export PAPERSCALE_HANG_S=  # seconds without a step; none: from the time of a step
export PAPERSCALE_START_S=600  # seconds to the first step

# SLURM: one task on each node, which starts and watches the node's processes.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol show node "$(head -n 1 <<<"$nodes")" --oneliner | grep -oP ' NodeAddr=\K\S+')
export MASTER_ADDR
export SRUN_CPUS_PER_TASK=96  # srun has ceased to take it from the job
export SLURM_EXPORT_ENV=ALL  # where sbatch was told to export nothing, srun would do the same
export USER=${USER:-$SLURM_JOB_USER}

mounts=(
    /home/me/work:/home/me/work
    /home/me/runs/run-1:/home/me/runs/run-1
    /data/imagenet:/data/imagenet
    /shared:/shared
)
container=(
    --container-image=/shared/images/paperscale.sqsh
    --container-mounts="$(IFS=,; echo "${mounts[*]}")"
    --container-workdir=/home/me/work
    --container-env="PYTHONPATH,PYTHONUNBUFFERED,OMP_NUM_THREADS"  # ours win over the image's
    --no-container-mount-home
)
launch() {
    srun --kill-on-bad-exit=1 --output="${logs//%/%%}/node-%n.log" "${container[@]}" "$@"
}
again() { scontrol requeue "$job"; }

# -- one attempt of the run, and what is next -------------------------------------------------------------------------

max_requeues=100  # attempts after the first
max_stalled=3  # attempts in a row without a new checkpoint

say() { echo "$(date +%FT%T) $*"; }
stop() { say "stopped: $*"; exit "$code"; }
newest_checkpoint() { ls "$run/checkpoints" | tail -n 1; }  # names sort by step; an unfinished one is hidden

# SLURM: the scheduler runs this script again, or the next job of the train takes over.
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi  # the number alone may mean all

# What the scheduler means to do with the job. It ends a job's steps before the job, so it can still be asked.
scheduler() {
    local facts
    facts=" $(scontrol show job "$job" --oneliner 2>/dev/null) "
    if [[ $facts != *" JobState="* ]]; then
        echo unknown  # the controller does not answer
    elif [[ $facts =~ \ Restarts=([0-9]+)\  ]] && ((BASH_REMATCH[1] > ${SLURM_RESTART_COUNT:-0})); then
        echo requeue
    elif [[ $facts == *" Reason=TimeLimit "* ]]; then
        echo time-limit
    elif [[ $facts =~ \ PreemptTime=[0-9] ]]; then
        echo preemption
    elif [[ $facts != *" JobState=RUNNING "* ]]; then
        echo cancel
    else
        echo running
    fi
}

# Why the attempt has ended, in a word: what the ranks say of themselves, and the scheduler of the rest.
cause() {
    case $code in
    0) echo finished; return ;;
    1 | 2) echo failed; return ;;
    77) echo hang; return ;;
    78) echo bad-node; return ;;
    80) echo rollback; return ;;
    81) echo out-of-memory; return ;;
    esac
    if [[ $scheduler != running ]]; then
        echo "$scheduler"
    elif ((code == 76)); then
        echo lost
    elif ((code != 75)); then
        echo killed
    elif [[ -e $run/stop ]]; then
        echo stop
    elif grep -qs '"reason": "SIGUSR1' "$logs/attempt.json"; then
        echo time-limit
    else
        echo signal
    fi
}

leave_train() {
    if ((1 > 1)); then scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" 2>/dev/null; fi
}

# The controller may be away for a while; the allocation waits for it, for five minutes at most.
requeue() {
    if ((1 > 1 && SLURM_ARRAY_TASK_ID < SLURM_ARRAY_TASK_MAX)); then exit 0; fi
    local deadline=$((SECONDS + 300))
    until again; do
        if ((SECONDS > deadline)); then return 1; fi
        sleep 5
    done
    exclude
}

# Nodes that were found bad within twelve hours are left out, as long as enough others are up.
exclude() {
    if [[ -s $logs/suspects ]]; then cat "$logs/suspects" >>"$run/excluded"; fi
    if [[ ! -s $run/excluded ]]; then return 0; fi
    local hosts all
    hosts=$(awk -v now="$(date +%s)" 'now - $2 < 43200 { print $1 }' "$run/excluded" | sort -u)
    all=$(sinfo -h -N -r -t idle,mix,alloc,comp -p "$SLURM_JOB_PARTITION" -o %N | sort -u)
    if (($(comm -23 <(echo "$all") <(echo "$hosts") | wc -l) < 4)); then
        say "WARNING without $(paste -sd, <<<"$hosts") too few nodes would be left: they are tried again"
        return 0
    fi
    if scontrol update JobId="$job" ExcNodeList="$(paste -sd, <<<"$hosts")"; then
        say "without $(paste -sd, <<<"$hosts") from now on"
    fi
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
