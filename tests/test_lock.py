"""scripts/lock agrees with constraints.txt and pyproject.toml; scripts/audit.py. No network."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import ROOT

PARTS = ("torch", "build", "run", "dev", "cuda", "triton")


def read(part: str) -> dict[str, str]:
    """Name to version; every entry is pinned and carries a sha256."""
    text = (ROOT / "scripts" / "lock" / f"{part}.txt").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", text.split("\n", 1)[1].rstrip("\n")):
        first, *hashes = entry.split(" \\\n")
        requirement = Requirement(first)
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert hashes, first
        assert all(re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}", line) for line in hashes), first
        assert requirement.name not in found
        found[requirement.name] = pin.version
    return found


def constraints() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return dict(line.split("==") for line in text.splitlines() if line and line[0] != "#")


def test_lock_and_constraints_name_the_same_versions() -> None:
    """CUDA's own packages apart, which constraints.txt leaves to PyTorch."""
    locked = {part: read(part) for part in PARTS}
    together = [name for part in PARTS for name in locked[part]]
    assert len(together) == len({*together})
    named = {name: ver for part in PARTS if part != "cuda" for name, ver in locked[part].items()}
    assert named == constraints()


def closure(requirements: list[str]) -> set[str]:
    """What the requirements come to, by what the packages installed here say they need."""
    found: set[str] = set()
    waiting = [(Requirement(line), "") for line in requirements]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = str(canonicalize_name(requirement.name))
        found.add(name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(line), wanted) for line in requires(name) or ()]
    return found


def test_lock_names_all_that_a_run_needs() -> None:
    """A dependency added to pyproject.toml without scripts/lock.py would not be installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = {name for part in PARTS if part != "dev" for name in read(part)}
    assert closure(project["dependencies"]) <= locked
    tools = project["optional-dependencies"]["dev"]
    asked = {canonicalize_name(Requirement(row).name) for row in tools}
    assert asked <= locked | {*read("dev")}


def test_lock_names_the_cpu_builds_of_torch() -> None:
    """Of three Pythons on two kinds of machine; the package index lists none of them."""
    text = (ROOT / "scripts" / "lock" / "torch.txt").read_text(encoding="utf-8")
    script = (ROOT / "scripts" / "lock.py").read_text(encoding="utf-8")
    listed = re.findall(r'^ +"([0-9a-f]{64})",$', script, re.M)
    assert len(listed) == 6
    assert all(f"--hash=sha256:{digest}" in text for digest in listed)


AUDITED = '{"dependencies": [{"name": "numpy", "version": "1", "vulns": []}, %s], "fixes": []}'
BAD = '{"name": "jinja2", "version": "2", "vulns": [{"id": "PYSEC-7", "fix_versions": ["3"]}]}'
SKIPPED = '{"name": "jinja2", "skip_reason": "not found"}'


@pytest.mark.parametrize(
    ("fake", "code", "says"),
    [
        ("raise ConnectionError", 0, "skipped, the database of advisories cannot be reached"),
        (f"print('{AUDITED % BAD}'); raise SystemExit(1)", 1, "jinja2 2: PYSEC-7, mended in 3"),
        (f"print('{AUDITED % SKIPPED}')", 0, "for 1 packages, 1 more could not be asked for"),
        ("raise SystemExit('no such option')", 1, "failed with exit code 1: no such option"),
    ],
    ids=["unreachable", "advisory", "unknown", "broken"],
)
def test_audit_fails_for_an_advisory_and_not_for_a_missing_network(
    fake: str, code: int, says: str, tmp_path: Path
) -> None:
    (tmp_path / "pip_audit.py").write_text(fake)
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "audit.py")],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == code
    assert says in run.stdout + run.stderr


def test_audit_asks_for_every_locked_package(tmp_path: Path) -> None:
    """As pip-audit is called: every file of the lock, nothing installed, nothing executed."""
    (tmp_path / "pip_audit.py").write_text("import sys; sys.exit(str(sys.argv))")
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "audit.py")],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    words = run.stderr
    assert all(f"{part}.txt" in words for part in PARTS)
    assert "--disable-pip" in words
