#!/usr/bin/env bash
# Runs a job on all hosts of a Cloud TPU pod slice that exists and has this repository in $FOLDER:
#
#   TPU=my-slice ZONE=us-central2-b launch/tpu_pod.sh --config configs/sd15.py --workdir gs://bucket/run
#
# The hosts find each other by the slice's metadata. --workdir is a bucket, since the hosts share
# no disk. After exit status 42 (a host got SIGTERM and all have saved) the job is started again.
# A slice that was taken away (spot) has to be created again first; a queued resource does so.

set -u

TPU=${TPU:?the name of the slice}
ZONE=${ZONE:?its zone, such as us-central2-b}
PROJECT=${PROJECT:-$(gcloud config get-value project)} # the Google Cloud project
FOLDER=${FOLDER:-slam_jax}                             # the repository, on every host, below ~
PYTHON=${PYTHON:-python3}                              # the interpreter with slam_jax[gcs] installed there
MODULE=${MODULE:-slam_jax.main}                        # or slam_jax.prepare

# Quoted once more, because a shell on every host reads it.
printf -v command '%q ' "$PYTHON" -m "$MODULE" "$@"
printf -v folder '%q' "$FOLDER"

while true; do
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --project="$PROJECT" --worker=all \
    --command="cd $folder && exec $command"
  status=$?
  if ((status != 42)); then exit "$status"; fi
done
