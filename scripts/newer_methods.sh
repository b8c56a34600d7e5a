# shellcheck shell=bash
# Sourced by scripts/voc/newer.sh and scripts/ade/newer.sh, whose table sets, for METHOD on TASK:
#   tasks            tasks with published settings
#   batch lr epochs  of step 0, and of each later step
#   more             further options
# CLASSES is the number of classes of DATASET. Runs step 0, then the later steps.
. "$(dirname "${BASH_SOURCE[0]}")/share_batch.sh"
[ -n "$tasks" ] || fail "METHOD is '$METHOD'; give $METHODS, then the task"
[[ " $tasks " == *" $TASK "* ]] || fail "TASK is '$TASK'; published for $METHOD are $tasks"
shift 2

GIVEN=${BATCH-}
NAME=${NAME:-$METHOD-resnet101}
PROTOCOL=${PROTOCOL:-overlapped}
BATCH=${GIVEN:-${batch[0]}}
. "$(dirname "${BASH_SOURCE[0]}")/run_task.sh"

FIRST=${TASK%-*} EACH=${TASK#*-}
read -r -a LATER <<<"$(seq -s ' ' $(((CLASSES - FIRST + EACH - 1) / EACH)))"
common=(--dataset "$DATASET" --task "$TASK" --method "$METHOD" --opt_level O1 ${more[@]+"${more[@]}"})
train "${common[@]}" --step 0 --lr "${lr[0]}" --epochs "${epochs[0]}" "$@"
BATCH=${GIVEN:-${batch[1]}}
share_batch "$GPUS" GPUS
train "${common[@]}" --step "${LATER[@]}" --lr "${lr[1]}" --epochs "${epochs[1]}" "$@"
