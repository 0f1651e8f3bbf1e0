#!/usr/bin/env bash
# launch/torchrun.sh GPUS CONFIG [key=value ...]
#
# One machine; a process that dies takes the run down, and it is started again from the last checkpoint, three times at most.
set -euo pipefail
gpus=${1:?usage: launch/torchrun.sh GPUS CONFIG [key=value ...]}
shift
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-570} # seconds to save; torchrun's own are 30
exec torchrun --standalone --nproc_per_node "$gpus" --max-restarts 3 -m trfpp.train "$@"
