#!/usr/bin/env bash
# A Cloud TPU slice: creates or reuses it, installs this repository there, runs main.py on all workers.
# The run outlives this script and the connection; the same command again resumes it.
#
#   NAME=ig ZONE=us-east5-a TYPE=v6e-16 RUNTIME=v2-alpha-tpuv6e WORKDIR=gs://bucket/sit_xl \
#     ./launch/tpu_pod.sh --config=configs/sit_xl.py:array_record --config.data.source.path=/data/latents
#
# WORKDIR: a path that every worker sees, or gs://bucket/folder, which gcsfuse mounts.
# SPOT=1: preemptible. QUEUED=1: through a queued resource. DRY_RUN=1: only print the commands.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $1" >&2
  exit 2
}

for setting in NAME ZONE TYPE RUNTIME WORKDIR; do
  [[ -n ${!setting:-} ]] || fail "$setting is not set: launch/README.md says what it is"
done
[[ $# -gt 0 ]] || fail "nothing to run: give what follows python main.py, such as --config=configs/sit_xl.py"

dry=${DRY_RUN:-0}
[[ $dry == 1 ]] || command -v gcloud >/dev/null || fail "gcloud is missing: install the Google Cloud CLI"
spot=()
[[ ${SPOT:-0} == 1 ]] && spot=(--spot)

do_it() {
  if [[ $dry == 1 ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu() { do_it gcloud compute tpus "$1" "$2" "$NAME" "--zone=$ZONE" "${@:3}"; }

everywhere() { tpu tpu-vm ssh --worker=all "--command=$1"; }

state() { # of the slice or the queued resource; nothing if there is none
  [[ $dry == 1 ]] || gcloud compute tpus "$1" describe "$NAME" "--zone=$ZONE" "--format=value($2)" 2>/dev/null || true
}

make_slice() {
  local what=("--accelerator-type=$TYPE" "--runtime-version=$RUNTIME" ${spot[@]+"${spot[@]}"})
  case $(state tpu-vm state) in
    READY) return ;;
    "") ;;
    CREATING | STARTING | RESTARTING | REPAIRING) fail "the slice $NAME is being made: try again in a minute" ;;
    *) [[ ${QUEUED:-0} == 1 ]] || tpu tpu-vm delete --quiet ;; # preempted or stopped
  esac
  if [[ ${QUEUED:-0} != 1 ]]; then
    tpu tpu-vm create "${what[@]}"
    return
  fi
  case $(state queued-resources state.state) in
    SUSPENDED | SUSPENDING | FAILED) tpu queued-resources delete --force --quiet ;;
    "") ;;
    *) wait_for_slice && return ;;
  esac
  tpu queued-resources create "--node-id=$NAME" "${what[@]}"
  wait_for_slice
}

wait_for_slice() {
  [[ $dry == 1 ]] && return
  local now
  while now=$(state queued-resources state.state) && [[ $now != ACTIVE ]]; do
    [[ $now != FAILED ]] || fail "the queued resource $NAME failed: see gcloud compute tpus queued-resources describe $NAME --zone=$ZONE"
    echo "the queued resource $NAME is ${now:-unknown}; looking again in 30 s"
    sleep 30
  done
}

make_slice

# The slice gets what is here, changes included, and a Python of its own.
archive=${TMPDIR:-/tmp}/ig-jax-$NAME.tar.gz
[[ $dry == 1 ]] || trap 'rm -f "$archive"' EXIT
do_it tar --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=./data -czf "$archive" .
do_it gcloud compute tpus tpu-vm scp "$archive" "$NAME:ig-jax.tar.gz" --worker=all "--zone=$ZONE"
install="mkdir -p ig-jax && tar -xzf ig-jax.tar.gz -C ig-jax && cd ig-jax"
install+=" && python3 -m pip install --quiet --user uv"
install+=" && { [ -d .venv ] || python3 -m uv venv --quiet --python 3.12 .venv; }"
install+=" && python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt 'jax[tpu]'"
everywhere "$install"

run_in=$WORKDIR
if [[ $WORKDIR == gs://* ]]; then
  bucket=${WORKDIR#gs://}
  folder=${bucket#*/}
  [[ $bucket == */?* ]] || fail "WORKDIR=$WORKDIR: name a folder of the bucket, gs://bucket/folder"
  bucket=${bucket%%/*}
  mount="mkdir -p bucket && { mountpoint -q bucket || gcsfuse --implicit-dirs $(printf %q "$bucket") bucket; }"
  everywhere "$mount"
  run_in=../bucket/$folder
fi

run="cd ig-jax && if [ -e run.pid ] && kill -0 \$(cat run.pid) 2>/dev/null; then echo 'already running'; else"
run+=" nohup setsid .venv/bin/python main.py$(printf ' %q' "$@" "--workdir=$run_in")"
run+=" >>run.log 2>&1 </dev/null & echo \$! >run.pid; fi"
everywhere "$run"

echo "# follow it: gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=0 --command='tail -F ig-jax/run.log'"
echo "# stop it, saving: gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=0 --command='kill -TERM \$(cat ig-jax/run.pid)'"
