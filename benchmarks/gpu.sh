#!/usr/bin/env bash
# Check and measure bayes_klrl on one CUDA card, without a network, in four minutes.
#
#     bash benchmarks/gpu.sh [--out FOLDER] [--tiny] [--device cpu|cuda] [--seconds 235]
#
# It installs nothing, unless wheels lie in benchmarks/wheels (or in the folder that WHEELS names): those are then installed, with
# --no-index, into an environment of their own in FOLDER, on top of the packages that are there. Otherwise it takes the first Python
# that can import torch and transformers: $PYTHON, the repository's .venv, python3, python. FOLDER/gpu.json has every result, written
# as soon as it is there; FOLDER/gpu.txt is the same as a table, which is printed too. It fails if a check fails.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
wheels="${WHEELS:-$here/wheels}"
out="gpu-results"
arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out="${2:?--out needs a folder}"; shift 2 ;;
        --out=*) out="${1#--out=}"; shift ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) arguments+=("$1"); shift ;;
    esac
done
mkdir -p "$out"

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false XLA_PYTHON_CLIENT_PREALLOCATE=false

usable() { "$1" -c 'import torch, transformers' >/dev/null 2>&1; }

if compgen -G "$wheels/*.whl" >/dev/null; then
    base="${PYTHON:-$(command -v python3 || command -v python)}"
    "$base" -m venv --system-site-packages "$out/environment"
    "$out/environment/bin/python" -m pip install --quiet --no-index --find-links "$wheels" "$wheels"/*.whl
    candidates=("$out/environment/bin/python")
else
    candidates=(${PYTHON:+"$PYTHON"} "$root/.venv/bin/python" python3 python)
fi
for python in "${candidates[@]}"; do
    if usable "$python"; then
        exec "$python" -m benchmarks.gpu.main --out "$out" ${arguments[@]+"${arguments[@]}"}
    fi
done
echo "No Python here can import torch and transformers: tried ${candidates[*]}. Set PYTHON, or put wheels into $wheels." >&2
exit 2
