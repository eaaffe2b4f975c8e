#!/usr/bin/env bash
# The preStop hook of every worker pod: Ray hears that this node goes away, starts nothing new on it, and tells a training, which
# then saves a checkpoint. The pod lives on until the training's workers are gone from it, at most the seconds given.
# usage: drain.sh SECONDS    (fewer than terminationGracePeriodSeconds)
set -euo pipefail
seconds="$1"

# The arguments of every process in this container, one on a line.
arguments() { cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\0' '\n' || true; }

node_id="$(arguments | sed -n 's/^--node_id=\([0-9a-f]\{56\}\)$/\1/p' | sort -u)"
ray drain-node --node-id "$node_id" --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the pod is being deleted" \
    --deadline-remaining-seconds "$seconds"
for ((waited = 0; waited < seconds; waited++)); do
    if ! arguments | grep '^ray::RayTrainWorker' >/dev/null; then exit 0; fi
    sleep 1
done
