#!/usr/bin/env bash
# runpod/launch.sh recipes/qwen14b.yaml [KEY=VALUE]... [options of `emogen pod launch`]
# Rents a GPU, trains there, prints the log, fetches the run, and terminates the pod.
set -euo pipefail
exec emogen pod launch --follow "$@"
