#!/usr/bin/env bash
# What only a GPU can show: the tests that need one, and what TrAct costs there, eager and compiled.
#   scripts/on_a_gpu.sh [folder of the results]
# About six minutes on an H100 or H200, most of them for compiling; torch_tract is measured beside
# where it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-docs/results/bench-gpu}
bench=(python -m tract_hub bench --device cuda --bf16 --channels-last --budget 8)

python -m pytest -q tests/test_gpu.py
"${bench[@]}" --out "$out/eager"
"${bench[@]}" --compiled --no-memory --out "$out/compiled"
python -m tract_hub bench --device cuda --budget 8 --no-memory --out "$out/float32"
