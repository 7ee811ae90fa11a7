"""scripts/setup.sh on machines that lack something: one clear sentence, no half-made state."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT

TOOLS = ["awk", "bash", "cat", "cut", "df", "dirname", "grep", "rm", "sha256sum", "tail"]

Setup = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The files that a set-up reads, and a PATH (bin/) with the usual tools and no Python."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path is not None
        (tmp_path / "bin" / tool).symlink_to(path)
    return tmp_path


@pytest.fixture
def setup(machine: Path) -> Setup:
    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        bash = str(machine / "bin" / "bash")
        return subprocess.run(
            [bash, str(machine / "scripts" / "setup.sh"), *words],
            cwd=machine / "scripts",
            env={"PATH": str(machine / "bin"), **env},
            capture_output=True,
            text=True,
        )

    return run


def install(machine: Path, name: str, script: str) -> None:
    file = machine / "bin" / name
    file.unlink(missing_ok=True)
    file.write_text(f"#!{machine}/bin/bash\n{script}\n")
    file.chmod(0o755)


def refused(run: subprocess.CompletedProcess[str], machine: Path) -> str:
    assert run.returncode == 1, run.stdout + run.stderr
    assert not list(machine.glob(".venv/.smezo*"))
    return run.stderr.splitlines()[-1]


def test_no_python(setup: Setup, machine: Path) -> None:
    says = refused(setup(), machine)
    assert says.startswith("setup: smezo needs Python 3.11, 3.12 or 3.13 and found no Python")


def test_python_of_another_version(setup: Setup, machine: Path) -> None:
    install(machine, "python3", '[ "$1" = --version ] && echo Python 3.9.2')
    assert "3.11, 3.12 or 3.13 and found Python 3.9.2" in refused(setup(), machine)


def test_shim_without_a_python_behind_it_is_passed_over(setup: Setup, machine: Path) -> None:
    install(machine, "python3.13", "exit 127")
    install(machine, "python3", f'[[ "$*" == *ensurepip* ]] && exit 1; exec {sys.executable} "$@"')
    assert "python3 has no venv module" in refused(setup(), machine)


def test_no_venv_module(setup: Setup, machine: Path) -> None:
    install(machine, "python3", f'[[ "$*" == *ensurepip* ]] && exit 1; exec {sys.executable} "$@"')
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"apt install {version}-venv" in refused(setup(), machine)


def test_disk_too_small(setup: Setup, machine: Path) -> None:
    install(machine, "python3", f'exec {sys.executable} "$@"')
    install(machine, "df", "echo header; echo disk 9 9 2097152 9 /")
    says = refused(setup(), machine)
    assert "has 2 GB free" in says
    assert "up to 10 GB" in says
    assert not (machine / ".venv").exists()


def test_unknown_option(setup: Setup) -> None:
    run = setup("--fast")
    assert (run.returncode, run.stderr) == (
        2,
        "setup: unknown option --fast; the only one is --dev.\n",
    )


@pytest.fixture
def fake_venv(machine: Path) -> Path:
    """A .venv whose python answers for itself and whose pip does as told by pip.sh."""
    folder = machine / ".venv" / "bin"
    folder.mkdir(parents=True)
    python = folder / "python"
    python.write_text(
        f"#!{machine}/bin/bash\n"
        f'if [[ "$1 $2" == "-m pip" ]]; then shift 2; source {machine}/pip.sh; exit; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return machine / "pip.sh"


@pytest.mark.parametrize(
    ("pip", "says"),
    [
        ("Failed to establish a new connection: [Errno -3] name resolution", "cannot be reached"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: ResolutionImpossible", "pip could not install the packages"),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE",
            "SMEZO_LOCK=0",
        ),
    ],
)
def test_pip_fails(setup: Setup, machine: Path, fake_venv: Path, pip: str, says: str) -> None:
    fake_venv.write_text(f'[ "$1" = --version ] && exit 0; echo "{pip}"; exit 1')
    message = refused(setup(), machine)
    assert message.startswith("setup: ")
    assert says in message


def calls_of_pip(machine: Path) -> list[str]:
    return (machine / "calls").read_text().splitlines()


def test_repeating_does_nothing_until_the_pins_change(
    setup: Setup, machine: Path, fake_venv: Path
) -> None:
    fake_venv.write_text(f'[ "$1" = --version ] || echo "$@" >>{machine}/calls')
    for words in ([], [], ["--dev"], ["--dev"], []):
        assert setup(*words).returncode == 0
    dev = ["lock/dev.txt" in line for line in calls_of_pip(machine) if "lock/run.txt" in line]
    assert dev == [False, True]
    for changed in ("constraints.txt", "scripts/lock/run.txt"):
        before = len(calls_of_pip(machine))
        with (machine / changed).open("a") as file:
            file.write("# a change\n")
        assert setup().returncode == 0
        assert len(calls_of_pip(machine)) > before


def with_torch(machine: Path, version: str, needs: str = "") -> str:
    """A PYTHONPATH by which this version of PyTorch is installed."""
    site = machine / "site" / "torch-2.13.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\nRequires-Dist: filelock\n{needs}"
    )
    return str(site.parent)


@pytest.mark.parametrize("build", ["cpu", "cuda", "none"])
def test_nothing_is_installed_whose_hash_is_not_locked(
    build: str, setup: Setup, machine: Path, fake_venv: Path
) -> None:
    """PyTorch's own build decides on cuda.txt; without a PyTorch its build is pip's choice."""
    version = {"cpu": "2.13.0+cpu", "cuda": "2.13.0", "none": "1.0"}[build]
    needs = "Requires-Dist: nvidia-nccl-cu13==2.29.7; platform_system == 'Linux'\n"
    fake_venv.write_text(f'[ "$1" = --version ] || echo "$@" >>{machine}/calls')
    site = with_torch(machine, version, needs * (build == "cuda"))
    assert setup(PYTHONPATH=site).returncode == 0
    calls = calls_of_pip(machine)
    assert any("lock/cuda.txt" in call for call in calls) == (build == "cuda")
    assert [call.split()[0] for call in calls].count("download") == (build == "none")
    *locked, project = [call for call in calls if call.startswith("install ")]
    assert all("--require-hashes" in call for call in locked)
    assert project.split() == [
        *("install", "--no-deps", "--no-build-isolation", "--editable"),
        str(machine),
    ]


PHASES = ["fetching torch==", "installing torch==", "what builds packages", "packages of", "itself"]


def test_each_phase_is_said_with_its_time(setup: Setup, machine: Path, fake_venv: Path) -> None:
    fake_venv.write_text("echo progress")
    lines = setup(PYTHONPATH=with_torch(machine, "1.0")).stdout.splitlines()
    assert lines.pop() == "setup: done"
    for line, phase in zip(lines, PHASES, strict=True):
        assert phase in line
        assert "second" in line or "minute" in line
    assert setup().stdout == ""


def test_pip_shows_its_progress_on_a_terminal(machine: Path, fake_venv: Path) -> None:
    """And keeps the log by itself, by which a failure is told apart."""
    fake_venv.write_text(
        '[ "$1" = --version ] || { echo "progress of $1"; [ "$1" = download ] || exit 0; '
        'echo "name resolution" >"$3"; exit 1; }'
    )
    ours, theirs = os.openpty()
    words = [str(machine / "bin" / "bash"), str(machine / "scripts" / "setup.sh")]
    env = {"PATH": str(machine / "bin"), "PYTHONPATH": with_torch(machine, "1.0")}
    run = subprocess.run(words, env=env, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert "progress of download" in os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert run.returncode == 1
    assert "the package registry cannot be reached" in run.stderr


def test_lock_can_be_left_aside(setup: Setup, machine: Path, fake_venv: Path) -> None:
    fake_venv.write_text(f'[ "$1" = --version ] || echo "$@" >>{machine}/calls')
    run = setup("--dev", SMEZO_LOCK="0")
    assert "not compared with scripts/lock" in run.stdout
    (call,) = calls_of_pip(machine)
    assert call == f"install --constraint {machine}/constraints.txt --editable {machine}[dev]"
    assert "SMEZO_LOCK=no is neither 1" in setup(SMEZO_LOCK="no").stderr


def test_failed_installation_is_tried_again(setup: Setup, machine: Path, fake_venv: Path) -> None:
    fake_venv.write_text('[ "$1" = --version ] || exit 1')
    refused(setup(), machine)
    fake_venv.write_text("exit 0")
    assert setup().returncode == 0
    assert setup().stdout == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_clean() -> None:
    files = [ROOT / ".ci" / "run", *sorted((ROOT / "scripts").glob("*.sh"))]
    run = subprocess.run(
        ["shellcheck", *map(str, files)], capture_output=True, text=True, env=dict(os.environ)
    )
    assert run.returncode == 0, run.stdout


def test_scripts_name_no_package_index() -> None:
    """Where packages come from is the affair of the machine's own settings."""
    for file in (ROOT / "scripts").glob("*.sh"):
        text = file.read_text()
        assert "http" not in text
        assert "--index" not in text
