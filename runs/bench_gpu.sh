#!/bin/sh
# Whole calls of klein 4B and 9B on a CUDA GPU, random weights, four steps: runs/bench_gpu.sh [PYTHON]
# klein-9B with its text encoder wants about 45 GB. The figures to reach, at 1024x1024 with keep 0.1 and four references,
# denoising alone: sparse + KV >= 5.0x dense and >= 2.0x KV only, sparse alone >= 4.0x; one reference >= 1.75x; peak
# memory of denoising above the weights <= 0.35 of dense's; selection <= 5 % of the sparse call.
# runs/check_gpu.py reads them from what is written here.
set -eu
cd "$(dirname "$0")/.."
python="${1:-python}"
mkdir -p checkpoints
for shape in klein-9b klein-4b; do
    "$python" -m sparse_context bench --random-weights "$shape" --device cuda --size 1024 --size 512 \
        --references 1 --references 2 --references 4 --references 8 --references 10 --keep 0.3 --keep 0.2 --keep 0.1 \
        --turns 5 --minutes 20 --output "results/bench_gpu_$shape.json" --plot "checkpoints/bench-gpu-$shape.png"
done
"$python" runs/check_gpu.py --table
"$python" runs/check_gpu.py
