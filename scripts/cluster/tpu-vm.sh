#!/usr/bin/env bash
# One set by a Cloud TPU slice of 16 chips, without Kubernetes. The bucket holds the checkpoint cifar10, and gets the set.
#
#   BUCKET=gs://mine IMAGE=REGISTRY/jddim:tpu ZONE=us-west4-a scripts/cluster/tpu-vm.sh
#
# Spot machines may be taken away at any time: run it again, and it goes on. The slice is deleted at the end, whatever
# the end is.
set -euo pipefail
: "${BUCKET:?}" "${IMAGE:?}" "${ZONE:?}"
name=jddim-bulk
slices=(gcloud compute tpus queued-resources)
hosts=(gcloud compute tpus tpu-vm)

"${slices[@]}" create "$name" --node-id="$name" --zone="$ZONE" --spot \
  --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite
trap '"${slices[@]}" delete "$name" --zone="$ZONE" --force --quiet' EXIT
while
  state=$("${slices[@]}" describe "$name" --zone="$ZONE" --format='value(state.state)')
  [ "$state" != ACTIVE ]
do
  case $state in FAILED | SUSPEND*) printf 'no slice: %s\n' "$state" >&2 && exit 1 ;; esac
  sleep 30
done
"${hosts[@]}" scp "$(dirname -- "$0")/tpu-host.sh" "$name:" --zone="$ZONE" --worker=all
"${hosts[@]}" ssh "$name" --zone="$ZONE" --worker=all --command="bash tpu-host.sh $BUCKET $IMAGE"
