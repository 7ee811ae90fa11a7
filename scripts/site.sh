#!/usr/bin/env bash
# Usage: scripts/site.sh [words for mkdocs build ...]
# Makes the pages of docs/ into build/site, without a network; build/site/index.html opens in a browser, its search works from the disk, too.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh" --dev
NO_MKDOCS_2_WARNING=1 "$root/.venv/bin/python" -m mkdocs build --strict --config-file "$root/scripts/site/mkdocs.yml" "$@"
echo "$root/build/site/index.html"
