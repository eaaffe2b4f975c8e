#!/usr/bin/env bash
# Writes the lock files of the images, with hashes: cpu.lock and gpu.lock from pyproject.toml, mlflow.lock from
# infra/mlflow/requirements.in. Run it after a change there; a folder as its argument takes them instead.
# The CPU build of torch is on no plain PyPI; set UV_FIND_LINKS to use a folder that holds its wheel. The Dockerfile installs it
# before the rest, so cpu.lock leaves it out.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [[ -z "${UV_FIND_LINKS:-}" ]]; then export UV_EXTRA_INDEX_URL="${UV_EXTRA_INDEX_URL:-https://download.pytorch.org/whl/cpu}"; fi
output="${1:-infra/docker}"
compile=(uv pip compile --python-version 3.11 --python-platform x86_64-manylinux_2_28
         --index-strategy unsafe-best-match --generate-hashes --no-annotate --no-header --quiet)
torch="$(sed -n 's/^ *"\(torch==[^"]*\)",/\1/p' pyproject.toml)"
"${compile[@]}" pyproject.toml --constraint <(echo "$torch+cpu") --no-emit-package torch --output-file "$output/cpu.lock"
env -u UV_EXTRA_INDEX_URL -u UV_FIND_LINKS "${compile[@]}" pyproject.toml --extra vllm --output-file "$output/gpu.lock"
"${compile[@]}" infra/mlflow/requirements.in --output-file "$output/mlflow.lock"
