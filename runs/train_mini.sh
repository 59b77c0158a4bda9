#!/usr/bin/env bash
# The embedded model's two adapters, fine-tuned with dropped reference tokens on its own scenes; before them, if asked
# for, its base, trained further. For a CPU; runs/train_mini_gpu.py is for a GPU.
#
#   runs/train_mini.sh                                             # adapters for the base that the package holds;
#                                                                  # needs python -m recipes.mini data
#   BASE_STEPS=3800 FOLDER=checkpoints/further runs/train_mini.sh  # first that base for so many steps more, with other
#                                                                  # scenes; it takes the place of the package's
#
# FOLDER (checkpoints) keeps assets, checkpoints, logs and sample sheets. Run again as it was, each part continues where
# it was killed. What FOLDER holds already goes on, so to start from the package's weights the base needs a FOLDER
# without one; runs of adapters for another base are refused. A link to assets.safetensors there saves fetching it again.
set -euo pipefail
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}   # recipes/ is not in the wheel
FOLDER=${FOLDER:-checkpoints}
mini() { python -m recipes.mini "$@" --folder "$FOLDER"; }

if [ -n "${BASE_STEPS:-}" ]; then
    [ -f "$FOLDER/assets.safetensors" ] || mini data
    [ -d "$FOLDER/base" ] || mini restore
    mini base --steps "$BASE_STEPS"
    mini export   # removes the adapters of the former base from the package
fi

mini sparse --name sparse-full --full --steps 1900   # all weights, of whose change the adapter is a share
mini adapter --name sparse-full --scale 0.6 --rank 44
mini sparse --name sparse-kv --kv   # a LoRA for Flux2KleinKVPipeline
mini adapter --name sparse-kv
