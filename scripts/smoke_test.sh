#!/usr/bin/env bash
# Build the wheel and the sdist; install each, with the run-time dependencies alone, into an empty
# virtual environment; see there that it works, and that the tract-hub command says what it
# lacks. About 6 GB of disk, and ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# From a copy: a build in place would pick up what earlier builds have left.
mkdir "$work/source"
git ls-files -z --cached --others --exclude-standard |
  tar --null --files-from=- --ignore-failed-read -c | tar -x -C "$work/source"
python3 -m venv "$work/tools"
"$work/tools/bin/pip" install -q build
"$work/tools/bin/python" -m build -q --outdir "$work/dist" "$work/source"
python3 scripts/smoke_checks.py contents "$work/source" "$work/dist"/*

cp scripts/smoke_checks.py "$work"
for file in "$work"/dist/*; do
  began=$SECONDS
  python3 -m venv "$work/empty"
  "$work/empty/bin/pip" install -q "$file"
  (cd "$work" && empty/bin/python smoke_checks.py installed)
  rm -rf "$work/empty"
  echo "== ${file##*/}: works, $((SECONDS - began)) s"
done
