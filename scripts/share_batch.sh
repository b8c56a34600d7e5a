# shellcheck shell=bash
# Sourced by experiments whose total batch is published. share_batch PROCESSES NAME sets PER_PROCESS, each process's
# share of BATCH, or ends the script with 2 and one line; NAME is where the user gives the number of processes.
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
