#!/bin/sh
# Joins the attacks' Ray cluster with no resources of its own, so that a driver in this container can use it; then runs "$@".
# (Ray wants a node where the driver is. Attack workers land on nodes that offer the resource "attack", never here.)
set -eu
until ray start --address="$RAY_HEAD" --num-cpus=0 --num-gpus=0 --resources='{}' --object-store-memory=100000000 \
    --disable-usage-stats; do
    echo "the Ray head at $RAY_HEAD does not answer yet" >&2
    sleep 2
done
exec "$@"
