#!/usr/bin/env bash
# What tpu-vm.sh runs on each host: bash tpu-host.sh BUCKET IMAGE. The set is written to the host's own disk, and copied
# to the bucket every five minutes and at the end. Files whose names begin with a dot are locks, and what is not whole.
set -euo pipefail
bucket=$1 image=$2 sets=$HOME/sets
mkdir -p "$sets/cifar10" "$sets/fifty"
copy() { gcloud storage rsync --recursive --exclude='^\..*' "$1" "$2"; }

copy "$bucket/cifar10" "$sets/cifar10"
copy "$bucket/fifty" "$sets/fifty" || printf 'nothing is copied from %s/fifty: the set begins anew\n' "$bucket" >&2
while sleep 300; do copy "$sets/fifty" "$bucket/fifty" || true; done >"$sets/copying.log" 2>&1 </dev/null &
copying=$!
trap 'kill "$copying" 2>/dev/null || true; copy "$sets/fifty" "$bucket/fifty"' EXIT
sudo docker run --rm --privileged --net=host -v "$sets:/sets" "$image" \
  bulk cifar10 fifty --num 50000 --steps 50 --batch-size 256 --dtype bfloat16 --distributed
