"""Writes scripts/lock/*.txt: every package that scripts/setup.sh installs, with its sha256.

    .venv/bin/pip install uv && .venv/bin/python scripts/lock.py

Versions are those of constraints.txt, hashes those that the package index lists for all files of a
version. Six files, because they are installed at different times: torch.txt (PyTorch, all builds),
build.txt (what builds packages from source), run.txt, dev.txt (tools of the tests), cuda.txt (what
a CUDA build of PyTorch needs besides, at versions that PyTorch asks for or, where it leaves them
open, the newest) and triton.txt (a CUDA build needs it, and so do the tests). Stops with one
sentence where constraints.txt names too little or too much.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from packaging.markers import Marker

ROOT = Path(__file__).resolve().parent.parent
# The CPU builds of PyTorch have an index of their own. These are the sha256 of the wheels of
# torch 2.13.0+cpu there: CPython 3.11, 3.12, 3.13 on x86-64, then on aarch64.
CPU_BUILDS = {
    "2.13.0": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
        "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
        "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
        "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",
        "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d",
    )
}
BUILDERS = ("setuptools", "hatchling", "editables")  # hatchling asks for the last at build time
SUPPORTED = [
    {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "python_version": version,
        "python_full_version": f"{version}.0",
    }
    for machine in ("x86_64", "aarch64")
    for version in ("3.11", "3.12", "3.13")
]
ENTRY = re.compile(r"^([a-z0-9-]+)==([^\s;\\]+)(?: ; (.*?))?(?: \\)?$")
WHAT = {
    "torch": "PyTorch, the builds for CUDA and for CPUs",
    "build": "What builds packages from source",
    "run": "What smezo runs with, besides torch.txt and build.txt",
    "dev": "The tools of the tests, besides run.txt",
    "cuda": "What a CUDA build of PyTorch needs besides, with triton.txt",
    "triton": "What a CUDA build of PyTorch needs, and the tests of the kernels beside any build",
}


def resolve(*words: str, given: str | None = None) -> dict[str, tuple[str, str, list[str]]]:
    """Name to version, marker ("" where all of SUPPORTED need it) and hashes, from the index."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--universal", "--generate-hashes"]
    command += ["--python-version", "3.11", "--no-annotate", "--no-header", "--quiet"]
    # pip-audit asks for a pip: the one that each virtual environment has.
    command += ["--no-emit-package", "pip", "--constraint", str(ROOT / "constraints.txt"), *words]
    # Away from the checkout, whose .venv would be taken for preferences.
    run = subprocess.run(command, input=given, capture_output=True, text=True, cwd=os.sep)
    if run.returncode:
        sys.exit(f"lock: the versions could not be resolved:\n{run.stderr.strip()}")
    found: dict[str, tuple[str, str, list[str]]] = {}
    hashes: list[str] = []
    for line in run.stdout.splitlines():
        if entry := ENTRY.match(line):
            name, version, marker = entry.groups(default="")
            needed = [not marker or Marker(marker).evaluate(where) for where in SUPPORTED]
            hashes = []
            if any(needed):
                found[name] = (version, "" if all(needed) else marker, hashes)
        elif line.startswith("    --hash="):
            hashes.append(line.strip(" \\").removeprefix("--hash="))
    return found


def main() -> None:
    """Resolve, compare with constraints.txt, write."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = dict(line.split("==") for line in text.splitlines() if line and line[0] != "#")
    project = str(ROOT / "pyproject.toml")
    run = {*resolve(project)}
    build = resolve("-", given="\n".join(BUILDERS))
    everything = resolve(project, "--extra", "dev") | build
    extra = {*everything} - {*pinned}
    if missing := extra - {*resolve("-", given="torch")}:
        rows = " ".join(f"{name}=={everything[name][0]}" for name in sorted(missing))
        sys.exit(f"lock: constraints.txt lacks {rows}; add what is missing, each on its line.")
    if idle := {*pinned} - {*everything}:
        sys.exit(f"lock: nothing needs {' '.join(sorted(idle))} of constraints.txt; remove it.")
    torch = everything["torch"][0]
    if torch not in CPU_BUILDS:
        sys.exit(f"lock: no sha256 is known for the CPU builds of torch {torch}; see CPU_BUILDS.")
    everything["torch"][2].extend(f"sha256:{digest}" for digest in CPU_BUILDS[torch])
    version, _, hashes = everything["triton"]
    everything["triton"] = version, "sys_platform == 'linux'", hashes  # there are no other builds
    parts = {"torch": {"torch"}, "build": {*build}, "cuda": extra, "triton": {"triton"}}
    parts["run"] = run - extra - {"torch", "triton", *build}
    parts["dev"] = {*everything} - set().union(*parts.values())
    for part, members in parts.items():
        lines = [f"# {WHAT[part]}: written by scripts/lock.py, installed by scripts/setup.sh.\n"]
        for name in sorted(members):
            version, marker, hashes = everything[name]
            first = f"{name}=={version}" + (f" ; {marker}" if marker else "")
            each = [f"    --hash={digest}" for digest in sorted({*hashes})]
            lines.append(" \\\n".join([first, *each]) + "\n")
        (ROOT / "scripts" / "lock" / f"{part}.txt").write_text("".join(lines), encoding="utf-8")
        print(f"lock: {part}.txt, {len(members)} packages")


if __name__ == "__main__":
    main()
