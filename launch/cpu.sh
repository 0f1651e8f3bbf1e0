#!/usr/bin/env bash
# launch/cpu.sh PROCESSES CONFIG [key=value ...]
# `accelerate launch --cpu --num_processes N` starts one process whatever N is; torchrun starts them all.
set -euo pipefail
processes=${1:?usage: launch/cpu.sh PROCESSES CONFIG [key=value ...]}
shift
export ACCELERATE_USE_CPU=true
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-570} # seconds to save; torchrun's own are 30
exec torchrun --standalone --nproc_per_node "$processes" -m trfpp.train "$@"
