#!/usr/bin/env bash
# Run the complete audits and write docs/audit: about half an hour for timm, more for Hugging Face.
set -euo pipefail
cd "$(dirname "$0")/.."
jobs="${JOBS:-1}"
for zoo in timm torchvision huggingface; do
  OMP_NUM_THREADS=1 python -m tract_hub audit "$zoo" --out docs/audit --jobs "$jobs" "$@"
done
