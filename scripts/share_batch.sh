# shellcheck shell=bash
# Sourced by experiments with a published total batch. share_batch PROCESSES NAME sets PER_PROCESS to BATCH divided by
# PROCESSES, or ends the script with code 2 and one line; NAME is the option that sets the number of processes.
fail() {
    echo "$0: error: $1" >&2
    exit 2
}

share_batch() {
    [[ $1 =~ ^[1-9][0-9]*$ && $BATCH =~ ^[1-9][0-9]*$ ]] || fail "$2=$1 BATCH=$BATCH; give whole numbers"
    ((BATCH % $1 == 0)) || fail "$2=$1 cannot share a batch of $BATCH evenly; give another $2 or BATCH"
    # shellcheck disable=SC2034  # for the script that sources this
    PER_PROCESS=$((BATCH / $1))
}
