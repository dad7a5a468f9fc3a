#!/usr/bin/env bash
# Runs a job of N processes on this machine, to try what a cluster would do:
#
#   launch/local.sh 2 --config configs/tiny.py --workdir runs/two
#
# What follows N goes to every process. Ctrl-C and SIGTERM are passed on as SIGTERM, after which
# a training run saves and ends; a second one kills. When a process fails, all end, and the exit
# status is that of the first that failed. After status 42 (a process got SIGTERM and all
# have saved) the job is started again, unless it was this script that was told to stop. After
# Ctrl-C the exit status is 130.

set -u

MODULE=${MODULE:-slam_jax.main} # or slam_jax.prepare
PYTHON=${PYTHON:-python}        # the interpreter with slam_jax installed
PORT=${PORT:-}                  # where process 0 listens; empty takes a free one
GRACE_S=${GRACE_S:-15}          # how long the others of a failed job have for their last words

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh NUMBER_OF_PROCESSES [flags of $MODULE]" >&2
  exit 2
fi
num=$1
shift

pids=()
told=0        # how often this script was told to stop
interrupted=0 # whether by Ctrl-C

send() { # to all that still run
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null; done
}

stop() {
  told=$((told + 1))
  if ((told == 1)); then
    echo "told all processes to end; once more kills them" >&2
    send TERM
  else
    send KILL
  fi
}
trap stop TERM
trap 'interrupted=1; stop' INT

start() {
  local port=$PORT id
  if [[ -z $port ]]; then
    port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  fi
  pids=()
  for ((id = 0; id < num; id++)); do
    # Process i gets GPU i; elsewhere the variable changes nothing.
    JAX_LOCAL_DEVICE_IDS=$id "$PYTHON" -m "$MODULE" "$@" \
      --coordinator="localhost:$port" --num_processes="$num" --process_id="$id" &
    pids+=($!)
  done
}

# Waits until all have ended; status: of the first that failed, else 42 if any ended so, else 0.
finish() {
  local running=("${pids[@]}") rest pid code failed_at=-1
  status=0
  while ((${#running[@]})); do
    rest=()
    for pid in "${running[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        rest+=("$pid")
        continue
      fi
      wait "$pid"
      code=$?
      if ((code == 42 && failed_at < 0)); then
        status=42
      elif ((code != 0 && failed_at < 0)); then
        status=$code
        failed_at=$SECONDS
      fi
    done
    running=(${rest[@]+"${rest[@]}"})
    if ((failed_at >= 0 && SECONDS - failed_at >= GRACE_S)); then send KILL; fi
    sleep 0.2
  done
}

while true; do
  start "$@"
  if ((told)); then send TERM; fi
  finish
  # 143 and 137 are what SIGTERM and SIGKILL make of a program that does not save on SIGTERM.
  if ((interrupted && (status == 42 || status == 143 || status == 137))); then exit 130; fi
  if ((status != 42 || told)); then exit "$status"; fi
done
