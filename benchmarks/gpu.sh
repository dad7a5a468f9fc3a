#!/usr/bin/env bash
# Both programs at Stable Diffusion 1.5's size on one GPU, in bfloat16 and float32.
#
#   benchmarks/gpu.sh [FOLDER]
#
# appends one line a run to FOLDER/DATE-DEVICE.jsonl, FOLDER being benchmarks/results. Needs no
# installation: jax, flax, optax and jaxtyping are enough. A run that fails (out of memory, say)
# is reported and the rest go on. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-benchmarks/results}
# The networks alone take 20 GB in training: leave JAX nearly all of the device.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

device=$("$python" -c 'import jax; print(jax.devices()[0].device_kind)') || exit 1
device=$(tr -cs 'A-Za-z0-9\n' '-' <<<"${device,,}")
mkdir -p "$folder"
out=$folder/$(date -u +%F)-$device.jsonl

failed=0
run() {
    echo "$*" >&2
    "$python" "benchmarks/$1.py" --size sd15 "${@:2}" | tee -a "$out" ||
        { echo "failed: $*" >&2; failed=1; }
}

# Dearest knowledge first, in case the machine's time runs out.
run train_step --dtype bfloat16 --batch 16
run sampler --dtype bfloat16 --batch 16 --steps 4
run train_step --dtype bfloat16 --batch 16 --remat
run train_step --dtype float32 --batch 8
run sampler --dtype float32 --batch 16 --steps 4
run sampler --dtype bfloat16 --batch 1 --steps 4
echo "results are in $out" >&2
exit "$failed"
