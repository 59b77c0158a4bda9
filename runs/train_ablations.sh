#!/usr/bin/env bash
# Variants of the embedded model's fine-tuning, of 100 steps each, for runs/ablations.py.
# Only some of them, and for longer, as for results/ablations_length.json:
#   STEPS=500 FOLDER=checkpoints/length runs/train_ablations.sh random
#   STEPS=600 FOLDER=checkpoints/length runs/train_ablations.sh dense
# or for results/ablations_control.json, with as many samples as the adapter saw, and results/ablations_sides.json:
#   STEPS=1940 FOLDER=checkpoints/control runs/train_ablations.sh dense
#   FOLDER=checkpoints/peers runs/train_ablations.sh mix downscaled merged
# Needs the assets: python -m recipes.mini data (CONTRIBUTING.md). Each run continues where it was killed.
set -euo pipefail
FOLDER=${FOLDER:-checkpoints/ablations}
mkdir -p "$FOLDER"
ln -sfn "$(realpath checkpoints/assets.safetensors)" "$FOLDER/assets.safetensors"
only=" $* "
train() {
  if [[ $only == "  " || $only == *" $1 "* ]]; then
    python -m recipes.mini sparse --folder "$FOLDER" --steps "${STEPS:-100}" --name "$@"
  fi
}

train mix --full                    # all weights, on sets as selectors make them and scattered ones
train random --full --drop-mix random=1   # scattered sets alone
train random-rate-3 --full --drop-mix random=1 --rate 3   # the same at thrice the learning rates
# and at those rates where a token counts as much whose source was dropped, as in `train`, whose default mix the other has
train random-plain-rate-3 --full --drop-mix random=1 --rate 3 --unseen 1
train default-plain-rate-3 --full --rate 3 --unseen 1 \
  --drop-mix random=0.4,blobs=0.15,bands=0.05,edges=0.15,saliency=0.15,outside=0.1
train random-plain-lora --rank 8 --drop-mix random=1 --unseen 1 --distillation 0 --preservation 0
train dense --full --dense          # the control: as many more samples, with all tokens
train coverage-0 --full --coverage 0
train coverage-0.3 --full --coverage 0.3   # three tenths of every set are spread evenly
train lora --distillation 0         # a LoRA, against the truth
train lora-distilled                # a LoRA, against the base's answers with all tokens
for method in downscaled merged; do
  if [[ $only == "  " || $only == *" $method "* ]]; then
    python runs/train_peers.py "$method" --steps "${STEPS:-100}" --checkpoints "$FOLDER"
  fi
done
