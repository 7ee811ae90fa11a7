"""The wheel: what it carries, and that it works away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the hatchling that is installed: no network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    run = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, without what it depends on."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True)
    return folder


def installed(site: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )


def test_wheel_carries_every_yaml_file_and_the_code_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for file in (ROOT / "conf").rglob("*.yaml"):
            inside = f"smezo_cli/conf/{file.relative_to(ROOT / 'conf').as_posix()}"
            assert archive.read(inside) == file.read_bytes()
        for file in (ROOT / "smezo_cli" / "report" / "templates").iterdir():
            assert archive.read(f"smezo_cli/report/templates/{file.name}") == file.read_bytes()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"smezo_cli"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_smezo_uses_its_own_files(site: Path, tmp_path: Path) -> None:
    run = installed(
        site, tmp_path, "-c", "from smezo_cli.config import fixed; print(fixed.CONF_DIR, end='')"
    )
    assert run.stdout == str(site / "smezo_cli" / "conf"), run.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--cfg", "job", "method=mezo"], "_target_: smezo_cli.methods.mezo.MeZO"),
        (["ls", "methods"], "sparse_mezo"),
        (["--version"], "smezo"),
    ],
    ids=str,
)
def test_installed_smezo_answers_in_any_folder(
    words: list[str], says: str, site: Path, tmp_path: Path
) -> None:
    run = installed(site, tmp_path, "-m", "smezo_cli", *words)
    assert run.returncode == 0, run.stderr
    assert says in run.stdout
    assert not list(tmp_path.iterdir())


def test_console_script_is_the_main_of_the_command(site: Path, tmp_path: Path) -> None:
    run = installed(site, tmp_path, str(site / "bin" / "smezo"), "--version")
    assert (run.returncode, run.stdout.split()[0]) == (0, "smezo")
