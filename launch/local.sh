#!/usr/bin/env bash
# This machine: one process for all its devices, or PROCESSES=n of them, each with one GPU.
#
#   ./launch/local.sh --config=configs/digits.py
#   PROCESSES=2 ./launch/local.sh --config=configs/digits.py
#
# PYTHON: the interpreter, .venv/bin/python if not set. DRY_RUN=1: only print the commands.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
processes=${PROCESSES:-1}

fail() {
  echo "error: $1" >&2
  exit 2
}

[[ $# -gt 0 ]] || fail "nothing to run: give what follows python main.py, such as --config=configs/digits.py"
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES=$processes: must be a number from 1"
command -v "$python" >/dev/null || fail "PYTHON=$python: not found; make demo installs it, or set PYTHON"

show() {
  printf '%q ' "$@"
  echo
}

if [[ $processes == 1 ]]; then
  [[ ${DRY_RUN:-0} == 1 ]] && { show "$python" main.py "$@"; exit; }
  exec "$python" main.py "$@"
fi

free_port='import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
port=$("$python" -c "$free_port")
children=()
signalled=0
# Ctrl-C too becomes SIGTERM: a shell's background processes ignore SIGINT.
stop() {
  signalled=1
  [[ ${#children[@]} == 0 ]] || kill -TERM "${children[@]}" 2>/dev/null || true
}
trap stop INT TERM
for ((i = 0; i < processes; i++)); do
  # jax gives a process only these GPUs; without GPUs it means nothing.
  job=(env "JAX_LOCAL_DEVICE_IDS=$i" "$python" main.py "$@"
    "--coordinator=localhost:$port" "--num_processes=$processes" "--process_id=$i")
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    show "${job[@]}"
  else
    [[ $signalled == 0 ]] || break
    "${job[@]}" &
    children+=($!)
  fi
done
[[ ${DRY_RUN:-0} == 1 ]] && exit

[[ $signalled == 0 ]] || stop # the process that was being started then, too
status=0
for child in "${children[@]}"; do
  signalled=1
  while [[ $signalled == 1 ]]; do # a signal ends `wait` before the process ends
    signalled=0
    ended=0
    wait "$child" || ended=$?
  done
  [[ $status != 0 ]] || status=$ended
done
exit "$status"
