#!/usr/bin/env bash
# infra/gpu/carry.sh FOLDER: puts into FOLDER what `python -m jobs.benchmark gpu` needs on a GPU machine without network: the code,
# wheels and run.sh. Says how large it is, and fails above the limit (LIMIT_MIB, 64). Takes pip from PYTHON (python3).
set -euo pipefail
folder="$(mkdir -p "${1:?give the folder to fill}" && cd "$1" && pwd)"
cd "$(dirname "$0")/../.."
python="${PYTHON:-python3}"
limit="${LIMIT_MIB:-64}"
rm -rf "$folder/wheels" "$folder/code" "$folder/site"
mkdir -p "$folder/wheels" "$folder/code"

pinned() { sed -n "s/^ *\"\($1==[^\"]*\)\",.*/\1/p" pyproject.toml; }

{ grep -v '^#' infra/gpu/wheels.txt | sed 's/ *#.*//'; pinned diffusers; } > "$folder/wheels/list.txt"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest "$folder/wheels" --requirement "$folder/wheels/list.txt"
rm "$folder/wheels/list.txt"
DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder/wheels" "$(pinned deepspeed)"

git archive HEAD sana_model pipelines jobs | tar -x -C "$folder/code"
cp infra/gpu/run.sh "$folder/run.sh"
mib="$(du --summarize --block-size=1M "$folder" | cut -f1)"
echo "$folder: $mib MiB, $(ls "$folder/wheels" | wc -l) wheels; there: bash run.sh OUTPUT_FOLDER [options of jobs.benchmark gpu]"
[ "$mib" -le "$limit" ] || { echo "that is more than $limit MiB" >&2; exit 1; }
