#!/usr/bin/env bash
# Variants of the embedded model's fine-tuning, of 100 steps each, for runs/ablations.py.
# Only some of them, and for longer, as for results/ablations_length.json:
#   STEPS=500 FOLDER=checkpoints/length runs/train_ablations.sh random
#   STEPS=600 FOLDER=checkpoints/length runs/train_ablations.sh dense
# Needs the assets: python -m sparse_context.mini data (CONTRIBUTING.md). Each run continues where it was killed.
set -euo pipefail
FOLDER=${FOLDER:-checkpoints/ablations}
mkdir -p "$FOLDER"
ln -sfn "$(realpath checkpoints/assets.safetensors)" "$FOLDER/assets.safetensors"
only=" $* "
train() {
  if [[ $only == "  " || $only == *" $1 "* ]]; then
    python -m sparse_context.mini sparse --folder "$FOLDER" --steps "${STEPS:-100}" --name "$@"
  fi
}

train mix --full                    # all weights, on sets as selectors make them and scattered ones
train random --full --random-only   # scattered sets alone
train random-rate-0.3 --full --random-only --rate 0.3   # the same at other learning rates
train random-rate-3 --full --random-only --rate 3
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
