#!/bin/sh
# What is to be known of a CUDA GPU, in two commands: runs/gpu.sh 6 [PYTHON], and runs/gpu.sh 3 [PYTHON] for the rest.
# The number is that of minutes. klein-9B with its text encoder wants about 45 GB. Parts that are done are left out, so
# a command that was cut short is run again. See runs/gpu.py, also for a rehearsal on a CPU.
set -eu
cd "$(dirname "$0")/.."
exec "${2:-python}" runs/gpu.py --minutes "${1:?pass the minutes, such as 6}"
