#!/usr/bin/env bash
# Variants of the embedded model's fine-tuning, of 100 steps each, for runs/ablations.py.
# Needs the assets: python -m sparse_context.mini data (CONTRIBUTING.md). Each run continues where it was killed.
set -euo pipefail
FOLDER=${FOLDER:-checkpoints/ablations}
if [[ -n ${LENGTH:-} ]]; then FOLDER=checkpoints/length; fi
mkdir -p "$FOLDER"
ln -sfn "$(realpath checkpoints/assets.safetensors)" "$FOLDER/assets.safetensors"
train() { python -m sparse_context.mini sparse --folder "$FOLDER" --steps 100 --name "$@"; }

# LENGTH=1: random sets alone for as many samples as the package's own adapter saw, some three hours of a core
if [[ -n ${LENGTH:-} ]]; then
  torchrun --nproc_per_node 2 -m sparse_context.mini sparse --folder "$FOLDER" --steps 969 --name random --full --random-only
  exit
fi

train mix --full                    # all weights, on sets as selectors make them and scattered ones
train random --full --random-only   # scattered sets alone
train dense --full --dense          # the control: as many more samples, with all tokens
train coverage-0 --full --coverage 0
train coverage-0.3 --full --coverage 0.3   # three tenths of every set are spread evenly
train lora --distillation 0         # a LoRA, against the truth
train lora-distilled                # a LoRA, against the base's answers with all tokens
for method in downscaled merged; do python runs/train_peers.py "$method" --steps 100 --checkpoints "$FOLDER"; done
