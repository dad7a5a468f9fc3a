#!/usr/bin/env bash
# Runs a job under Open MPI, MPICH or Intel MPI, started on the machine of the first process:
#
#   launch/mpi.sh -n 16 --hostfile hosts.txt -- --config configs/sd15.py --workdir /shared/runs/sd15
#
# What precedes -- goes to mpirun, what follows goes to every process. There is one process per
# GPU (JAX_LOCAL_DEVICE_IDS changes that). mpirun tells each its rank; nothing is sent through
# MPI itself. After exit status 42 (a process got SIGTERM and all have saved) the job is started
# again. Ctrl-C ends it at once; the next start goes on from the last checkpoint.

set -u

MODULE=${MODULE:-slam_jax.main}                  # or slam_jax.prepare
PYTHON=${PYTHON:-python}                         # the interpreter with slam_jax installed, everywhere
MPIRUN=${MPIRUN:-mpirun}                         # the launcher: mpirun, mpiexec
COORDINATOR=${COORDINATOR:-$(hostname -f):8476}  # HOST:PORT at which all reach the first process

options=()
while (($#)) && [[ $1 != -- ]]; do
  options+=("$1")
  shift
done
if ((!$#)); then
  echo "usage: launch/mpi.sh [options of mpirun] -- [flags of $MODULE]" >&2
  exit 2
fi
shift

while true; do
  "$MPIRUN" ${options[@]+"${options[@]}"} "$PYTHON" -m "$MODULE" --coordinator="$COORDINATOR" "$@"
  status=$?
  if ((status != 42)); then exit "$status"; fi
done
