#!/usr/bin/env bash
# All figures of one GPU in at most 8 minutes: train step, sampler, each against torch, and more.
#
#   benchmarks/gpu.sh [FOLDER]
#
# appends one line of JSON a run to FOLDER/DATE-DEVICE.jsonl, FOLDER being benchmarks/results. The
# project need not be installed. What is missing of jaxtyping, safetensors, diffusers (for torch), ml_collections,
# grain and so on (for the loop's overhead) is fetched by pip into $PACKAGES, build/packages; where
# no network is, fill that folder elsewhere and bring it along:
#
#   pip install --no-deps --target build/packages jaxtyping wadler_lindig safetensors diffusers peft accelerate
#
# A run that fails, out of memory say, or for which something is missing, is reported in one line
# and the rest go on. From the environment: PYTHON, the interpreter; SIZE (sd15), BATCH (16), REPEAT
# (10), DTYPE (bfloat16), DEVICE_NAME, and SECONDS_IN_ALL (480), after which nothing new is started.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
folder=${1:-benchmarks/results}
size=${SIZE:-sd15} batch=${BATCH:-16} repeat=${REPEAT:-10} dtype=${DTYPE:-bfloat16}
seconds_in_all=${SECONDS_IN_ALL:-480}
packages=${PACKAGES:-$PWD/build/packages}
# Where torch runs in the same process JAX must leave it half of the device.
alone=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
export TF_CPP_MIN_LOG_LEVEL=2 TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error
started=$SECONDS

# has MODULE...: whether all can be imported; missing ones are fetched without what they ask for.
has() {
    local module failed=0
    for module in "$@"; do
        "$python" -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$module'))" && continue
        timeout 60 "$python" -m pip install --quiet --disable-pip-version-check --retries 0 \
            --no-deps --target "$packages" "$module" >/dev/null 2>&1 || failed=1
    done
    return "$failed"
}

has jaxtyping wadler_lindig safetensors ||
    { echo "error: jaxtyping, wadler_lindig or safetensors is missing, and pip cannot fetch it" >&2; exit 1; }
device=${DEVICE_NAME:-$("$python" -c 'import jax; print(jax.devices()[0].device_kind)')} || exit 1
device=$(tr -cs 'A-Za-z0-9\n' '-' <<<"${device,,}")
mkdir -p "$folder"
out=$folder/$(date -u +%F)-$device.jsonl

failed=0
# run PROGRAM OPTION...
run() {
    local left=$((seconds_in_all - (SECONDS - started)))
    if ((left < 20)); then
        echo "skipped, since $seconds_in_all s are over: $*" >&2
        failed=1
        return 1
    fi
    echo "$* ($((SECONDS - started)) s)" >&2
    local status=0
    timeout "$left" "$python" -W ignore "benchmarks/$1.py" "${@:2}" 2>/tmp/gpu.sh.$$ | tee -a "$out" ||
        { echo "failed: $*: $(tail -n 1 /tmp/gpu.sh.$$)" >&2; failed=1 status=1; }
    rm -f /tmp/gpu.sh.$$
    return "$status"
}

impl=(jax)
if has diffusers transformers; then
    impl=(jax torch torch_compile)
else
    echo "skipped: everything of torch, since diffusers is missing and pip cannot fetch it" >&2
fi
case $size in tiny) peak=(--side 256 --mb 10) ;; *) peak=() ;; esac
common=(--size "$size" --dtype "$dtype" --repeat "$repeat")

# Dearest knowledge first, in case the time runs out.
export XLA_PYTHON_CLIENT_MEM_FRACTION=$alone
run peak --dtype "$dtype" "${peak[@]}"
run train_step "${common[@]}" --batch "$batch" --cached
# From here on by cuDNN, if it can.
run train_step "${common[@]}" --batch "$batch" --cached --attention cudnn && common+=(--attention cudnn)
[[ ${#impl[@]} == 1 ]] || export XLA_PYTHON_CLIENT_PREALLOCATE=false
run train_step "${common[@]}" --batch "$batch" --cached --impl "${impl[@]}"
run sampler "${common[@]}" --batch "$batch" --steps 4 --impl "${impl[@]}"
run sampler "${common[@]}" --batch 1 --steps 4 --impl "${impl[@]}" --compile_mode reduce-overhead
unset XLA_PYTHON_CLIENT_PREALLOCATE
for steps in 1 2 4; do
    for images in 1 "$batch"; do
        run sampler "${common[@]}" --batch "$images" --steps "$steps" --no_decode
    done
done
run train_step "${common[@]}" --batch "$batch" --remat all
if has ml_collections grain array_record tensorboardX tqdm tokenizers msgpack; then
    run overhead --size "$size" --batch "$batch"
    run compile --config "configs/$size.py" --batch "$batch" "${common[@]:6}"
else
    echo "skipped: the loop's overhead and compiling, since packages are missing and pip cannot fetch them" >&2
fi
echo "results are in $out" >&2
exit "$failed"
