#!/usr/bin/env bash
# Usage: scripts/setup.sh [--dev]
# Makes .venv beside this folder and installs smezo into it with the pinned versions of constraints.txt, each file compared
# with the sha256 in scripts/lock/ (SMEZO_LOCK=0: not compared, for a build of PyTorch that is not listed there); --dev adds
# the tools of the tests. Safe to repeat: when nothing has changed since, nothing is done and no network is needed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
need_gb=${SMEZO_NEED_GB:-10}

case ${1:-} in
  "") extras="" kind=run parts="torch build run" ;;
  --dev) extras="[dev]" kind=dev parts="torch build run dev triton" ;;
  *) echo "setup: unknown option $1; the only one is --dev." >&2; exit 2 ;;
esac

fail() { echo "setup: $1" >&2; exit 1; }

case ${SMEZO_LOCK:-1} in
  0 | 1) ;;
  *) fail "SMEZO_LOCK=$SMEZO_LOCK is neither 1 (compare every download with scripts/lock) nor 0 (do not)." ;;
esac

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
runs_supported() { "$1" -c "$supported" >/dev/null 2>&1; }

lock=$root/scripts/lock
wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" "$lock"/*.txt | sha256sum | cut -d' ' -f1)
stamp=$venv/.smezo
# A stamp holds the place too: a moved folder must be installed anew. What the tests need includes what a run needs.
is_done() { [ -f "$stamp-$1" ] && [ "$(cat "$stamp-$1")" = "$wanted $root" ]; }
if runs_supported "$venv/bin/python" && { is_done dev || { [ "$kind" = run ] && is_done run; }; }; then
  exit 0
fi

find_python() {
  local candidate seen=""
  for candidate in python3.13 python3.12 python3.11 python3 python; do
    if runs_supported "$candidate"; then
      if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
        python=$candidate
        return
      fi
      seen=$candidate
    fi
  done
  if [ -n "$seen" ]; then
    fail "$seen has no venv module; on Debian and Ubuntu install it with: apt install $("$seen" -c \
      'import sys; print("python%d.%d-venv" % sys.version_info[:2])')."
  fi
  fail "smezo needs Python 3.11, 3.12 or 3.13 and found $(python3 --version 2>/dev/null || echo 'no Python at all'); \
install one of them, for example with: apt install python3 python3-venv."
}

if ! runs_supported "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  find_python
  free_gb=$(($(df -Pk "$root" | awk 'NR == 2 {print $4}') / 1024 / 1024))
  if [ "$free_gb" -lt "$need_gb" ]; then
    fail "$root has $free_gb GB free and PyTorch with its CUDA libraries takes up to $need_gb GB; make room, or, where \
pip finds a build of PyTorch for the CPU alone (3 GB), set SMEZO_NEED_GB=3."
  fi
  echo "setup: making $venv (seconds) with $("$python" --version)"
  rm -rf "$venv"
  "$python" -m venv "$venv" || fail "$python could not make $venv; its message is above."
fi

rm -f "$stamp-run" "$stamp-dev"
log=$venv/pip.log
say() { echo "setup: $1"; }
# On a terminal pip shows its progress and keeps the log itself; elsewhere there is the log alone.
run_pip() {
  local verb=$1
  shift
  if [ -t 1 ]; then
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip "$verb" --log "$log" "$@"
  else
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip "$verb" "$@" >>"$log" 2>&1
  fi
}

has_torch='
import sys
from importlib.metadata import version
sys.exit("torch==" + version("torch").split("+")[0] != sys.argv[1])'
needs_cuda='
import re, sys
from importlib.metadata import requires
locked = re.findall("^([a-z0-9-]+)==", open(sys.argv[1]).read(), re.M)
sys.exit(not any(re.match("[A-Za-z0-9_-]+", need)[0] in locked for need in requires("torch")))'

# Nothing is built with what the lock does not name: build.txt comes before what is built, and pip fetches no builders itself.
install_locked() {
  local torch part count=0 words=()
  torch=$(grep -o '^torch==[0-9.]*' "$lock/torch.txt")
  if ! "$venv/bin/python" -c "$has_torch" "$torch" 2>/dev/null; then
    # Which build of PyTorch it is stays the choice of pip's own settings, which hashes would change (pip prefers files whose
    # hash an index tells beforehand): so it is fetched first, and installed if it is a listed one.
    rm -rf "$venv/torch"
    say "fetching $torch (200 MB for CPUs, 900 MB for CUDA: seconds to minutes, as the network is)"
    run_pip download --no-deps --only-binary :all: --dest "$venv/torch" "$torch" || return
    say "installing $torch (up to a minute)"
    run_pip install --require-hashes --no-deps --no-index --find-links "$venv/torch" --requirement "$lock/torch.txt" || return
    rm -rf "$venv/torch"
  fi
  if "$venv/bin/python" -c "$needs_cuda" "$lock/cuda.txt"; then parts="${parts% triton} cuda triton"; fi
  say "installing what builds packages (seconds)"
  run_pip install --require-hashes --no-deps --requirement "$lock/build.txt" || return
  for part in $parts; do
    words+=(--requirement "$lock/$part.txt")
    count=$((count + $(grep -c '^[a-z0-9-]*==' "$lock/$part.txt")))
  done
  say "installing the $count packages of scripts/lock (one to two minutes the first time)"
  run_pip install --require-hashes --no-build-isolation "${words[@]}" || return
  say "installing smezo itself (seconds)"
  run_pip install --no-deps --no-build-isolation --editable "$root"
}

install() {
  : >"$log"
  if [ "${SMEZO_LOCK:-1}" = 1 ]; then
    install_locked
  else
    say "SMEZO_LOCK=0: what is downloaded is not compared with scripts/lock"
    say "installing the packages of constraints.txt (one to three minutes the first time)"
    run_pip install --constraint "$root/constraints.txt" --editable "$root$extras"
  fi
}

last_lines() { [ -t 1 ] || tail -n 5 "$log" >&2; }  # on a terminal they are there already

if ! install; then
  if grep -qiE 'no space left' "$log"; then
    fail "the disk is full; make room and run this again (all of pip's messages: $log)."
  elif grep -qiE 'name resolution|connection (refused|reset|timed|broken)|max retries|unreachable|newconnectionerror|proxyerror' "$log"; then
    fail "the package registry cannot be reached; check the network and run this again (all of pip's messages: $log)."
  elif grep -qiE 'do not match the hashes|requirements must have their versions pinned|hashes are required' "$log"; then
    last_lines
    fail "a download is not the file whose sha256 scripts/lock lists (pip's last lines are above); where it is a build of \
PyTorch that you chose and trust, run this again with SMEZO_LOCK=0, which compares nothing."
  fi
  last_lines
  fail "pip could not install the packages; its last lines are above, all of them in $log."
fi
echo "$wanted $root" >"$stamp-$kind"
say "done"
