#!/usr/bin/env bash
# Run the tests with the oldest and with the newest versions that pyproject.toml allows, each in a
# virtual environment of its own:
#   scripts/test_versions.sh [lowest|newest]… [-- options of pytest]
# About 6 GB of disk for the time of one environment; half an hour on two cores for both.
set -euo pipefail
cd "$(dirname "$0")/.."

which=() options=()
while (($#)); do
  case $1 in
    lowest | newest) which+=("$1") ;;
    --) options=("${@:2}") && break ;;
    *) echo "usage: $0 [lowest|newest]… [-- options of pytest]" >&2 && exit 2 ;;
  esac
  shift
done
((${#which[@]})) || which=(lowest newest)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The lower bound of everything that users install, as its only version.
lowest() {
  "$1" - <<'PYTHON'
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["studies"]:
    print(requirement.replace(">=", "=="))
PYTHON
}

for versions in "${which[@]}"; do
  began=$SECONDS
  python3 -m venv "$work/venv"
  python="$work/venv/bin/python"
  constraints=()
  if [ "$versions" = lowest ]; then
    lowest "$python" >"$work/lowest.txt"
    constraints=(-c "$work/lowest.txt")
  fi
  "$python" -m pip install -q "${constraints[@]}" -e ".[test]"
  echo "== $versions: $("$python" -m pip list --format=freeze |
    grep -E "^(torch|torchvision|timm|transformers|accelerate)==" | tr '\n' ' ')" \
    "installed in $((SECONDS - began)) s"
  "$python" -m pytest -q -p no:cacheprovider "${options[@]}"
  echo "== $versions: passed, $((SECONDS - began)) s"
  rm -rf "$work/venv"
done
