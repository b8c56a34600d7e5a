#!/usr/bin/env bash
# Demo on generated data: trains 20 classes in two steps with fine-tuning and MiB, in two processes on the CPU.
# Ends with a table and a report. About 6 minutes on 2 cores after installation.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt

DATA=${DATA:-data/shapes}
LOGDIR=${LOGDIR:-logs/demo}
TASK=${TASK:-15-5}
[ -d "$DATA" ] || python data/make_shapes.py --out "$DATA"

common=(--dataset shapes --data_root "$DATA" --task "$TASK" --overlap --logdir "$LOGDIR"
    --backbone mobilenet_v2 --no_pretrained --crop_size 96 --pooling 0 --batch_size "${BATCH:-12}"
    --where_to_sim CPU --val_interval 100 --print_interval 50 --void_label ignore --sample_num 6 --fresh)
export OMP_NUM_THREADS=1
train() { python -m torch.distributed.run --standalone --nproc_per_node=2 run.py "${common[@]}" "$@"; }

train --name FT --method FT --step 0 --lr 0.05 --epochs "${EPOCHS_0:-14}"
for method in FT MIB; do
    train --name "$method" --method "$method" --step 1 --lr 0.01 --epochs "${EPOCHS_1:-10}" \
        --step_ckpt "$LOGDIR/$TASK-shapes_FT/$TASK-shapes_FT_0.pth"
done
python -m report "$LOGDIR/$TASK-shapes_FT" "$LOGDIR/$TASK-shapes_MIB"
