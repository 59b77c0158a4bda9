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
sparse-context train -m "black-forest-labs/FLUX.2-klein-base-$SIZE" --data "$DATA/train.jsonl" --output-dir "$OUTPUT" \
    --check-data "$@"

resume=()
if compgen -G "$OUTPUT/step-*" > /dev/null; then resume=(--resume latest); fi
sparse-context train \
    --model "black-forest-labs/FLUX.2-klein-base-$SIZE" \
    --data "$DATA/train.jsonl" \
    --output-dir "$OUTPUT" \
    --resolution 512 \
    --rank 64 --set lora_alpha=64 \
    --learning-rate 1e-4 --set lr_scheduler=constant_with_warmup --set lr_warmup_steps=200 \
    --max-train-steps 10000 --train-batch-size 1 --gradient-accumulation-steps 4 --set gradient_checkpointing=true \
    --set mixed_precision=bf16 --set ema=0.99 \
    --set caption_dropout=0.1 \
    --set dropping.keep_min=0.05 --set dropping.keep_max=0.6 --set dropping.dense=0.06 \
    --set distillation=1 --set subsets=3 --set preservation=15 \
    --set dropping.mix=random=0.1,uniform=0.15,edges=0.2,saliency=0.15,subject=0.4 \
    --set dropping.coverage=0,0.1 \
    --set checkpointing_steps=250 --set checkpoints_total_limit=3 \
    --validation-data "$DATA/validation.jsonl" --set validation_steps=500 --set num_validation_images=4 \
    --set report_to=tensorboard --seed 0 \
    "${resume[@]}" "$@"
