# shellcheck shell=bash
# What all job scripts share: they source this file and call `run_job COMMAND CONFIG.yaml [KEY=VALUE]...`, or `run_alone`
# for a command of one process.
#
# A job ends with 0 (done) or 2 (bad input), or it goes back into the queue under the same job id:
#   saved and ended early (a signal, or no time for another step)   always
#   a failure                          at most RLT_MAX_FAILURES times in a row without a new finished step
#   a node lost, preempted             Slurm requeues by itself (--requeue)
# The run folder continues from its last checkpoint, whatever happened.
set -euo pipefail

refuse() { echo "megatron-rlt: error: $1" >&2; exit 2; }

RLT_HOME=${RLT_HOME:-$SLURM_SUBMIT_DIR}           # Slurm runs a copy of the script elsewhere: $0 does not tell
if [ -n "${RLT_SITE:-}" ] && [ ! -r "$RLT_SITE" ]; then refuse "RLT_SITE=$RLT_SITE: no such file; correct it, or leave it out"; fi
RLT_SITE=${RLT_SITE:-$RLT_HOME/slurm/site.env}
# shellcheck source=/dev/null
if [ -f "$RLT_SITE" ]; then . "$RLT_SITE"; fi

RLT_PROGRAM=${RLT_PROGRAM:-$RLT_HOME/.venv/bin/megatron-rlt}
RLT_CONTAINER=${RLT_CONTAINER:-none}              # none, pyxis or apptainer
RLT_PREFLIGHT=${RLT_PREFLIGHT:-1}                 # 0: do not run `doctor` before the command
RLT_MAX_FAILURES=${RLT_MAX_FAILURES:-3}
case $RLT_MAX_FAILURES in *[!0-9]*) refuse "RLT_MAX_FAILURES=$RLT_MAX_FAILURES: must be a whole number" ;; esac
case ${RLT_END_TIME:-} in *[!0-9]*) refuse "RLT_END_TIME=$RLT_END_TIME: must be seconds since the epoch" ;; esac
SERVER_NODES=${SERVER_NODES:-0}                   # how many of the job's nodes, its last ones, run vLLM's servers

run_job() {
    local command=$1 status
    shift
    open_attempt "$@"
    set_environment
    if [ "$RLT_PREFLIGHT" != 0 ]; then preflight "$command" "$@"; fi
    if [ "$SERVER_NODES" -gt 0 ]; then start_servers "$command" "$@" "world_size=$RLT_RANKS"; fi
    run_ranks "$command" "$@" "world_size=$RLT_RANKS" && status=0 || status=$?
    if [ "$SERVER_NODES" -gt 0 ]; then end_servers; fi
    finish "$status"
}

# A command of one process, which writes its result whole or not at all: `run_alone COMMAND ARGUMENT...`. Its status is
# the job's; only Slurm puts such a job back, after a lost node or a preemption.
run_alone() {
    check_container
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    in_container alone --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" -- "$RLT_PROGRAM" "$@"
}

# ---- before the ranks -------------------------------------------------------------------------------------------

# output_dir as the program will read it; a rank refuses to run if it reads something else. Not within other words: only
# then does its refusal end the script.
output_dir() {
    local word found
    if [ $# -eq 0 ]; then refuse "no configuration given: sbatch slurm/SCRIPT.sbatch CONFIG.yaml [KEY=VALUE]..."; fi
    if [ ! -f "$1" ]; then refuse "$1: no such configuration file"; fi
    found=$(sed -n 's/\r$//; s/^output_dir:[[:space:]]*//p' "$1" | sed 's/[[:space:]][[:space:]]*#.*//; s/[[:space:]]*$//; s/^["'\'']//; s/["'\'']$//' | head -n 1)
    for word in "${@:2}"; do
        case $word in output_dir=*) found=${word#output_dir=} ;; esac
    done
    if [ -z "$found" ]; then refuse "$1: has no output_dir; add output_dir=FOLDER"; fi
    if [ "${found%%/*}" = "~" ]; then found=$HOME${found#\~}; fi   # as the program reads it
    realpath -m -- "$found"
}

# One folder per attempt, so that nothing is overwritten. The rank that gets the run's lock lets `latest` point to it.
open_attempt() {
    RLT_RUN_DIR=$(output_dir "$@")
    export RLT_ATTEMPT_DIR=$RLT_RUN_DIR/attempts/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    mkdir -p "$RLT_ATTEMPT_DIR/ranks" || refuse "output_dir: $RLT_RUN_DIR cannot be written; give a folder you may write to"
}

check_container() {
    case $RLT_CONTAINER in
        none) ;;
        pyxis | apptainer) : "${RLT_IMAGE:?set it in slurm/site.env}" "${RLT_MOUNTS:?set it in slurm/site.env}" ;;
        *) refuse "RLT_CONTAINER=$RLT_CONTAINER: must be none, pyxis or apptainer" ;;
    esac
}

set_environment() {
    check_container
    case $SERVER_NODES in *[!0-9]*) SERVER_NODES=$SLURM_JOB_NUM_NODES ;; esac   # no number: refused as too many
    if [ "$SERVER_NODES" -ge "$SLURM_JOB_NUM_NODES" ]; then
        refuse "SERVER_NODES must be a number below --nodes=$SLURM_JOB_NUM_NODES: ranks need nodes, too"
    fi
    export RLT_SERVER_NODES=$SERVER_NODES                               # ranks wait for so many
    local nodes=$((SLURM_JOB_NUM_NODES - SERVER_NODES))
    local per_node=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}   # one rank per GPU
    RLT_RANKS=$((nodes * per_node))
    RLT_STEP=(--ntasks="$RLT_RANKS" --ntasks-per-node="$per_node"
        --cpus-per-task=$((SLURM_CPUS_ON_NODE / per_node)))   # since Slurm 22.05 a step does not inherit this
    if [ "$SERVER_NODES" -gt 0 ]; then RLT_STEP+=(--nodes="$nodes" --relative=0); fi   # the first ones
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}              # Megatron works on the GPU; loaders are processes
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    MASTER_PORT=${MASTER_PORT:-$(free_port)}
    export MASTER_ADDR MASTER_PORT
    set_max_connections
    # The program saves in time by it, also where no signal comes. Not every Slurm says it, and one inherited from the
    # shell that submitted would be wrong. RLT_END_TIME: an earlier end of your own, in seconds since the epoch.
    local end
    end=$(squeue --noheader --job "$SLURM_JOB_ID" --format %e | head -n 1)
    case $end in *:*) end=$(date --date "$end" +%s) ;; *) end= ;; esac   # else NONE: no limit
    export SLURM_JOB_END_TIME=${RLT_END_TIME:-$end}
    cat <<EOF
$(date '+%F %T') job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $nodes nodes x $per_node ranks, $SERVER_NODES nodes of servers, on $SLURM_JOB_NODELIST
  run folder   $RLT_RUN_DIR
  rank logs    $RLT_ATTEMPT_DIR/rank-*.log
  first rank   $MASTER_ADDR:$MASTER_PORT
  container    $RLT_CONTAINER ${RLT_IMAGE:-}
  ends         ${SLURM_JOB_END_TIME:+$(date --date "@${SLURM_JOB_END_TIME:-0}" '+%F %T')}
EOF
}

# From the job id, below Linux's ephemeral ports (32768 and up), and not one that something listens on already.
free_port() {
    local port=$((20000 + (7 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 12000))
    while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

# Up to Hopper, tensor and context parallelism overlap only if kernels are issued in order: one connection.
set_max_connections() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) || capability=
    if [ -n "$capability" ] && [ "${capability%%.*}" -lt 10 ]; then
        export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    fi
}

# ---- ranks ------------------------------------------------------------------------------------------------------

# srun with the container of site.env; `in_container NAME SRUN_OPTION... -- PROGRAM ARGUMENT...`
in_container() {
    local name=$1 options=()
    shift
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    case $RLT_CONTAINER in
        none) ;;
        pyxis)   # the name carries the job, so that no other job's container is taken; the image is not changed
            options+=(--container-image="$RLT_IMAGE" --container-name="rlt-$SLURM_JOB_ID-$name" --container-readonly
                --container-mounts="$RLT_MOUNTS" --container-workdir="$PWD" --no-container-mount-home) ;;
        apptainer)   # an image is read-only unless told otherwise
            set -- apptainer exec --nv --bind "$RLT_MOUNTS" --pwd "$PWD" "$RLT_IMAGE" "$@" ;;
    esac
    exec srun "${options[@]}" "$@"
}

# Seconds that save hours: nodes, folder, GPUs and network, before models load. A bad node is left out of the next start.
preflight() {
    local log=$RLT_ATTEMPT_DIR/doctor.log status bad
    (RLT_ATTEMPT_DIR='' in_container doctor "${RLT_STEP[@]}" \
        -- "$RLT_PROGRAM" doctor "$@" "world_size=$RLT_RANKS" >"$log" 2>&1) && status=0 || status=$?
    sed 's/^/  /' "$log"
    if [ "$status" -eq 0 ]; then return; fi
    if [ "$status" -eq 2 ]; then exit 2; fi
    bad=$(sed -n 's/^bad node \([^:]*\):.*/\1/p' "$log" | sort -u | paste -s -d ,)
    count_failure "preflight failed${bad:+ on $bad}" "$bad"
}

# vLLM's servers: a step of their own on the last nodes. The ranks learn from its folder where they are, or why there are
# none. One that dies is started again there.
start_servers() {
    local folder=$RLT_ATTEMPT_DIR/servers status
    local step=(--nodes="$SERVER_NODES" --relative=$((SLURM_JOB_NUM_NODES - SERVER_NODES)) --ntasks="$SERVER_NODES"
        --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE")
    mkdir -m 700 "$folder"
    (umask 077 && od -An -v -tx1 -N32 /dev/urandom | tr -d ' \n' >"$folder/key")   # random, and for this attempt alone
    # What the configuration lacks for it is bad input, and known before anything starts.
    (in_container servers "${step[@]}" --nodes=1 --ntasks=1 \
        -- "$RLT_PROGRAM" serve "$@" --dry-run >"$folder/command") && status=0 || status=$?
    if [ "$status" -eq 2 ]; then exit 2; fi
    if [ "$status" -ne 0 ]; then count_failure "a server's node failed"; fi
    (in_container servers "${step[@]}" --job-name=rlt-servers --kill-on-bad-exit=1 --output="$folder/node-%t.log" \
        -- "$RLT_PROGRAM" serve "$@" 2>>"$folder/srun.log") &
    RLT_SERVERS=$!
    # Servers normally say themselves why they end; this is for those that were killed.
    (while kill -0 "$RLT_SERVERS" 2>/dev/null; do sleep 2; done
     set -o noclobber; echo "the step of vLLM's servers ended: $folder" >"$folder/failed") 2>/dev/null &
    RLT_WATCHER=$!
}

# They end themselves when they are told to; srun, told instead, would kill them, and they leave shared memory behind then.
end_servers() {
    local step
    kill "$RLT_WATCHER" 2>/dev/null || true
    step=$(squeue --noheader --steps --job "$SLURM_JOB_ID" --format '%i %j' | sed -n 's/ *rlt-servers *$//p')
    if [ -n "$step" ]; then scancel --signal=TERM "$step" || true; fi
    for _ in {1..60}; do
        kill -0 "$RLT_SERVERS" 2>/dev/null || break
        sleep 1
    done
    kill "$RLT_SERVERS" 2>/dev/null || true
    wait "$RLT_SERVERS" || true
}

# All ranks of a command; signals are passed on while they run. Returns 0, 2, 75 or 1.
run_ranks() {
    local asked=0 step status
    trap 'asked=1' USR1
    trap ':' TERM   # Slurm sends the ranks their own; this script stays to see how they end
    (in_container ranks "${RLT_STEP[@]}" --kill-on-bad-exit=1 --output="$RLT_ATTEMPT_DIR/rank-%t.log" \
        -- "$RLT_PROGRAM" "$@" 2>>"$RLT_ATTEMPT_DIR/srun.log") &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        if [ "$asked" = 0 ]; then
            wait "$step" || true   # a trapped signal ends the wait, too
        elif [ "$asked" = 1 ] && tell_rank; then
            asked=2
        else
            sleep 1
        fi
    done
    wait "$step" && status=0 || status=$?
    trap - USR1
    cat "$RLT_ATTEMPT_DIR/srun.log" >&2
    status_of_ranks "$status"
}

# Ask one rank of this node to save and end; all ranks then agree at the end of their step. Only the process that
# recorded itself: a signal to the whole step would end servers and loaders that do not know it.
tell_rank() {
    local file=$RLT_ATTEMPT_DIR/ranks/listens-0 pid name_space step
    [ -f "$file" ] || return 1   # still loading; asked again in a second
    read -r pid name_space step <"$file"
    if [ "$name_space" = "$(readlink /proc/self/ns/pid)" ]; then
        kill -USR1 "$pid" 2>/dev/null || return 1
    else   # a container with process ids of its own
        scancel --signal=USR1 "$step" || return 1
    fi
    echo "$(date '+%F %T') asked the ranks to save and end after this step"
}

# srun's status is the largest, also of ranks that it ended itself.
status_of_ranks() {
    if [ "$1" -eq 0 ]; then return "$(cat "$RLT_ATTEMPT_DIR/ranks/status-0" 2>/dev/null || echo 0)"; fi
    if [ "$1" -eq 75 ]; then return 75; fi   # a single rank says it itself
    if grep -q 'xited with exit code 2$' "$RLT_ATTEMPT_DIR/srun.log"; then return 2; fi   # also before any rank began
    return 1
}

# ---- after the ranks --------------------------------------------------------------------------------------------

finish() {
    case $1 in
        0)
            if declare -F when_done >/dev/null; then when_done; fi   # a script's own closing work
            echo "$(date '+%F %T') done"
            exit 0 ;;
        75) requeue "saved and ended early" ;;
    esac
    explain
    if [ "$1" -eq 2 ]; then exit 2; fi
    count_failure "failed"
}

# The earliest failure of all ranks with its traceback; later connection errors are folded.
explain() {
    (in_container status --ntasks=1 --nodes=1 --overlap -- "$RLT_PROGRAM" status "$RLT_RUN_DIR" >&2) || true
}

# `count_failure WHAT [NODE,...]`: back into the queue, without these nodes, unless it fails too often. A rank that
# finishes a step for the first time removes the count.
count_failure() {
    local file=$RLT_RUN_DIR/attempts/failures_in_a_row count
    if ! is_running; then exit 75; fi   # cancelled or taken away: what failed then is no failure of the run
    count=$(($(cat "$file" 2>/dev/null || echo 0) + 1))
    echo "$count" >"$file"
    if [ "$count" -gt "$RLT_MAX_FAILURES" ]; then
        echo "megatron-rlt: error: $1, $count times in a row without a new finished step: not requeued" >&2
        exit 1
    fi
    requeue "$1 (at most $RLT_MAX_FAILURES times in a row without a new finished step, this is $count)" "${2:-}"
}

# `requeue WHY [NODE,...]`. Only a running job: one that was cancelled, or that Slurm requeues itself, must not come
# back twice.
requeue() {
    trap '' TERM   # Slurm ends this script and what it calls; ignored, by both, until the last thing is done
    if is_running; then
        echo "$(date '+%F %T') $1: back into the queue"
        scontrol requeue "$SLURM_JOB_ID" || exit 75
        if [ -n "${2:-}" ]; then exclude "$2"; fi
    fi
    exit 75
}

is_running() { [ "$(squeue --noheader --job "$SLURM_JOB_ID" --format %T)" = RUNNING ]; }

# Slurm takes this only of a job that waits, which this one now does. Nodes that were left out before stay out.
exclude() {
    local before
    before=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
    case $before in '' | '(null)') before= ;; *) before=,$before ;; esac
    for _ in 1 2 3 4 5; do   # it waits a moment after it was told to
        if scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$1$before"; then
            echo "  left out from now on: $1$before"
            return
        fi
        sleep 1
    done
}
