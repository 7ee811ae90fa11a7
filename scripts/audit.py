"""Asks whether an advisory is known for a version in scripts/lock.

    .venv/bin/python scripts/audit.py

pip-audit asks the OSV database, which gets the names and versions of the packages and no more. Exit
code 1 where an advisory is known that ACCEPTED does not name; a database that cannot be reached is
said in one line and is no failure, so that the tests need no network.
"""

import json
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).resolve().parent / "lock"
SECONDS = 120  # for all packages; the tests do not wait longer for a slow database
# Id of an advisory that does not concern smezo: the reason.
ACCEPTED: dict[str, str] = {}
# In what pip-audit says when it got no answer, or none that it understands.
UNREACHABLE = ("requests.exceptions", "ServiceError", "ConnectionError", "Could not connect")


def ask() -> tuple[int, str, str]:
    """Exit code, output and messages of pip-audit; no packages are installed or executed."""
    command = [sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip"]
    command += ["--vulnerability-service", "osv", "--format", "json", "--progress-spinner", "off"]
    for file in sorted(LOCK.glob("*.txt")):
        command += ["--requirement", str(file)]
    for advisory in ACCEPTED:
        command += ["--ignore-vuln", advisory]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 1, "", f"ConnectionError: no end after {SECONDS} seconds"
    return run.returncode, run.stdout, run.stderr


def main() -> int:
    """Ask, and say in one line what came of it, with a line for each advisory."""
    code, output, messages = ask()
    last = (messages.strip().splitlines() or ["it said nothing"])[-1]
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if any(word in messages for word in UNREACHABLE):
            print("audit: skipped, the database of advisories cannot be reached")
            return 0
        print(f"audit: pip-audit failed with exit code {code}: {last}", file=sys.stderr)
        return 1
    asked = [package for package in packages if "skip_reason" not in package]
    unknown = (
        f", {len(packages) - len(asked)} more could not be asked for"
        if len(asked) < len(packages)
        else ""
    )
    found = [(package, advisory) for package in asked for advisory in package["vulns"]]
    for package, advisory in found:
        mended = " or ".join(advisory["fix_versions"]) or "no version yet"
        name = f"{package['name']} {package['version']}"
        print(f"audit: {name}: {advisory['id']}, mended in {mended}", file=sys.stderr)
    print(f"audit: {len(found)} advisories for {len(asked)} packages{unknown}")
    if found:
        print(
            "audit: move on to the mended version in constraints.txt and run scripts/lock.py, or, "
            "where an advisory does not concern smezo, name it in ACCEPTED with the reason.",
            file=sys.stderr,
        )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
