#!/usr/bin/env bash
# The embedded model's two adapters, fine-tuned with dropped reference tokens on its own scenes. Needs the assets:
# python -m sparse_context.mini data (CONTRIBUTING.md). Each run continues where it was killed.
set -euo pipefail
FOLDER=${FOLDER:-checkpoints}
mini() { python -m sparse_context.mini "$@" --folder "$FOLDER"; }

mini sparse --name sparse-full --full --steps 1900   # all weights, of whose change the adapter is a share
mini adapter --name sparse-full --scale 0.6 --rank 44
mini sparse --name sparse-kv --kv   # a LoRA for Flux2KleinKVPipeline
mini adapter --name sparse-kv
