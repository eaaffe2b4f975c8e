#!/usr/bin/env bash
# run.sh OUTPUT_FOLDER [options]: on the GPU machine, in the folder that carry.sh has filled. Installs the wheels beside themselves,
# not into the machine's Python, and runs `python -m jobs.benchmark gpu`. PYTHON: the one with torch (python3). Installing, imports and
# the end of the last line come on top of --minutes (10): where a command is ended after ten minutes, give --minutes 8.
set -euo pipefail
output="$(mkdir -p "${1:?give the folder for the page}" && cd "$1" && pwd)"
shift
cd "$(dirname "$0")"
python="${PYTHON:-python3}"
"$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target site wheels/*.whl
export PYTHONPATH="$PWD/code:$PWD/site" PYTHONUNBUFFERED=1
cd code
exec "$python" -m jobs.benchmark gpu --output_dir "$output" "$@"
