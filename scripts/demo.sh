#!/usr/bin/env bash
# Demo on generated data: learns 15 classes, then 5 others with fine-tuning, MiB and SATS, in two processes on the CPU.
# Ends with a table and a report. About 3 minutes on 2 cores after installation.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt

DATA=${DATA:-data/shapes-96}
LOGDIR=${LOGDIR:-logs/demo}
TASK=${TASK:-15-5}
log=$LOGDIR/demo.log
step_0=$LOGDIR/$TASK-shapes_FT/$TASK-shapes_FT_0.pth
mkdir -p "$LOGDIR"
: >"$log"
[ -d "$DATA" ] || python data/make_shapes.py --out "$DATA" --train 400 --val 120 --size 96

common=(--dataset shapes --data_root "$DATA" --task "$TASK" --overlap --logdir "$LOGDIR" --fresh
    --model segformer_b0 --no_pretrained --crop_size 64 --batch_size "${BATCH:-6}" --where_to_sim CPU
    --val_interval 100 --print_interval 50 --void_label ignore --sample_num 6 --random_seed 1)
export OMP_NUM_THREADS=1

# The trainings of the demo and their shares of its time, measured; the time left is estimated from what is done.
shares=(45 25 31 31)
done_share=0
number=0
train() { # TITLE OPTIONS...
    local left=0 share title=$1 time=
    shift
    for share in "${shares[@]:number}"; do left=$((left + share)); done
    [ "$done_share" = 0 ] || time=", about $((SECONDS * left / done_share)) seconds left"
    done_share=$((done_share + shares[number]))
    number=$((number + 1))
    echo
    echo "[$number/${#shares[@]}] $title$time"
    python -m torch.distributed.run --standalone --nproc_per_node=2 run.py "${common[@]}" "$@" 2>&1 |
        tee -a "$log" | grep --line-buffered -E 'epoch [0-9/]+: [a-z]|^mIoU (old.*with background|new|all) ' || {
        tail -n 20 "$log" >&2
        echo "the demo failed; its whole output is in $log" >&2
        exit 1
    }
}

SECONDS=0
train "step 0: the first classes" --name FT --method FT --step 0 --lr 0.05 --epochs "${EPOCHS_0:-10}"
for method in FT MIB SATS; do
    train "step 1 with $method: five more classes" --name "$method" --method "$method" --step 1 --lr 0.02 \
        --epochs "${EPOCHS_1:-8}" --step_ckpt "$step_0"
done
echo
python -m report "$LOGDIR/$TASK-shapes_"{FT,MIB,SATS} --out "$LOGDIR/report" | tee -a "$log"
cat <<END

Next ($(dirname "$PYTHON_BIN") has python and torchrun; the log of the demo is $log):
  python run.py --predict $DATA/JPEGImages --ckpt $LOGDIR/$TASK-shapes_MIB/$TASK-shapes_MIB_1.pth --out $LOGDIR/masks
  python run.py --help                                # all options; docs/tutorial.md: your own images
  python -m scripts.experiment scripts/shapes.yaml    # all methods, three steps, three seeds (hours)
END
