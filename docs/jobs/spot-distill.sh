#!/bin/bash
# Distillation on a machine that may be taken away at any time: spot or preemptible instances, whose
# agent, container or service manager sends SIGTERM first. Ends with 75 then, and whatever started
# it starts it again elsewhere; a crash is tried again here.
#
#   docs/jobs/spot-distill.sh configs/k400_hiera_base.yaml train.num_workers=8 train.use_gpu=true
#
# The cache and run_dir lie on storage that outlives the machine.
set -uo pipefail
: "${1:?usage: spot-distill.sh CONFIG [KEY=VALUE ...]}"

stopping=
trap 'stopping=1; kill -TERM "$work"' TERM INT
for attempt in 1 2 3; do
  kdhiera distill "$@" &
  work=$!
  while :; do # a signal ends `wait`, not what it waits for
    wait "$work"
    code=$?
    kill -0 "$work" 2>/dev/null || break
  done
  [ -n "$stopping" ] && [ "$code" -gt 128 ] && code=75 # stopped before its first step
  case "$code" in
    0 | 2 | 3 | 75) exit "$code" ;; # done, to be corrected, or stopped: not to be tried again
  esac
  echo "attempt $attempt ended with $code" >&2
done
exit "$code"
