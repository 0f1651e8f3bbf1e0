#!/usr/bin/env bash
# launch/cpu.sh PROCESSES CONFIG [key=value ...]
# `accelerate launch --cpu --num_processes N` starts one process whatever N is; torchrun starts them all.
set -euo pipefail
processes=${1:?usage: launch/cpu.sh PROCESSES CONFIG [key=value ...]}
shift
ACCELERATE_USE_CPU=true exec torchrun --standalone --nproc_per_node "$processes" -m trfpp.train "$@"
