#!/usr/bin/env bash
# A LoRA for FLUX.2 klein that keeps its quality with dropped reference tokens: runs/train_klein.sh {4B,9B}
#
# Not run yet on the real weights: the settings are a start, not a result. What has to be there first:
#   - a GPU with bf16; transformer and text encoder of the 9B together are twice those of the 4B;
#   - pip install 'sparse-context[train]';
#   - the base model: black-forest-labs/FLUX.2-klein-base-4B (Apache-2.0), or -9B (its own licence: accept it on the hub,
#     then `hf auth login`);
#   - the data: two sets by hub name, written as one manifest by the first command (some 40 GB are fetched).
#
# Its target is what the base says with all tokens: a LoRA of the embedded model learns about as much from that as from
# the truth (docs/benchmarks/quality.md). It is trained on the undistilled base; the LoRA is then loaded into that model,
# or tried on its distilled sibling.
# Several GPUs: put `accelerate launch --multi_gpu -m sparse_context.training` in the place of
# `sparse-context train`. Run again after a kill, it continues from its last checkpoint.
set -euo pipefail
case ${1:-} in
    4B | 9B) SIZE=$1 && shift ;;
    *) echo "usage: runs/train_klein.sh {4B,9B} [options of sparse-context train]" >&2 && exit 2 ;;
esac
DATA=${DATA:-data/klein}
OUTPUT=${OUTPUT:-checkpoints/klein-${SIZE,,}-sparse}

[ -f "$DATA/train.jsonl" ] || python runs/prepare_klein_data.py "$DATA"
sparse-context train --data "$DATA/train.jsonl" --check-data

resume=()
if compgen -G "$OUTPUT/step-*" > /dev/null; then resume=(--resume latest); fi
sparse-context train \
    --model "black-forest-labs/FLUX.2-klein-base-$SIZE" \
    --data "$DATA/train.jsonl" \
    --output-dir "$OUTPUT" \
    --resolution 512 \
    --rank 64 --lora-alpha 64 \
    --learning-rate 1e-4 --lr-scheduler constant_with_warmup --lr-warmup-steps 200 \
    --max-train-steps 10000 --train-batch-size 1 --gradient-accumulation-steps 4 --gradient-checkpointing \
    --mixed-precision bf16 --ema 0.99 \
    --caption-dropout 0.1 \
    --keep-min 0.05 --keep-max 0.6 --dense 0.06 --distillation 1 --subsets 3 --preservation 15 \
    --drop-mix random=0.1,uniform=0.15,edges=0.2,saliency=0.15,subject=0.4 \
    --coverage 0 --coverage 0.1 \
    --checkpointing-steps 250 --checkpoints-total-limit 3 \
    --validation-data "$DATA/validation.jsonl" --validation-steps 500 --num-validation-images 4 \
    --report-to tensorboard --seed 0 \
    "${resume[@]}" "$@"
