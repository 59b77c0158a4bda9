#!/usr/bin/env bash
# The embedded model's fine-tuning with dropped reference tokens, and what it is compared with, on its own scenes.
# Needs the assets: python -m sparse_context.mini data (CONTRIBUTING.md). Each run continues where it was killed.
set -euo pipefail
FOLDER=${FOLDER:-checkpoints}
train() { python -m sparse_context.mini sparse --folder "$FOLDER" --name "$@"; }

train sparse                                # LoRA, the whole mix, against the base's answers with all tokens
train sparse-random --random-only           # random sets alone
train sparse-averages --merge 0.3           # three tenths of the kept tokens are averages of others
train sparse-truth --distillation 0         # sets with dropped tokens against the truth
train sparse-free --preservation 0          # batches with all tokens count like the others
train sparse-full --full                    # all weights; the package's own is 0.6 of this (`adapter --scale 0.6`)
train dense --dense                         # the control: as many more samples, with all tokens
train sparse-kv --kv                        # for Flux2KleinKVPipeline
for coverage in 0 0.1 0.3; do train "sparse-coverage-$coverage" --coverage "$coverage"; done
