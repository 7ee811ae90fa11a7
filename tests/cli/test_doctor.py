"""`smezo doctor` says what a bug report needs, and nothing that it must not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from smezo_cli.cli import doctor
from smezo_cli.cli.verbs import main
from smezo_cli.files import fetch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of its own, a hub that does not answer, and passes over few weights."""
    cache = tmp_path / "home/cache"
    cache.mkdir(parents=True)
    monkeypatch.setenv("SMEZO_CACHE", str(cache))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fetch, "hub_answers", lambda: False)
    monkeypatch.setattr(doctor, "PASS_WEIGHTS", 2500)
    return cache


def lines(*words: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json", *words]) == code
    return {f"{x['part']} {x['what']}": x for x in json.loads(capsys.readouterr().out)}


def test_one_screen_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line[0] != " "] == [
        *("versions", "devices", "passes", "cache", "disk", "hub", "environment"),
        "nothing is broken",
    ]
    for said in ("torch", "G weights/s", "does not answer", "not there: it is fetched"):
        assert said in out
    assert len(out.splitlines()) <= 40


def test_no_secret_and_no_home_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in doctor.HIDDEN:
        monkeypatch.setenv(name, "s3cret")
    found = lines(capsys=capsys)
    said = found["environment variables"]["found"]
    assert all(f"{name} is set" in said for name in doctor.HIDDEN)
    assert "SMEZO_CACHE=~/cache" in said
    assert "s3cret" not in str(found)
    assert str(tmp_path) not in str(found)


def test_a_damaged_file_of_the_cache_is_named(
    apart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No fault of the machine: the next run fetches it anew."""
    first = next(doctor._packages())
    (apart / "packages").mkdir()
    (apart / "packages" / first["file"]).write_bytes(b"half of it")
    (apart / "packages" / f"{first['file']}.part-1").mkdir()
    found = lines(capsys=capsys)
    assert "damaged" in found[f"cache {first['name']} {first['version']}"]["found"]
    assert found["cache half-made"]["found"].startswith("1 left")


def test_a_file_that_two_tasks_read_is_told_once() -> None:
    files = [package["file"] for package in doctor._packages()]
    assert "vaderSentiment-3.3.2.tar.gz" in files
    assert len(set(files)) == len(files)


def test_what_is_kept_for_later_runs_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMEZO_CACHE", str(tmp_path))
    for name in ("scores/a.json", "inputs/d/1.safetensors", "inputs/e/2.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1_500_000))
    doctor.main([])
    shown = capsys.readouterr().out
    assert "of untouched models, for later runs: 1 files, 1.5 MB" in shown
    assert "of frozen blocks, for later runs: 2 files, 3.0 MB" in shown


def test_what_is_broken_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, apart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(apart)
    apart.write_text("a file where the folder should be")
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "no-such-package"))
    monkeypatch.setattr(doctor, "LEAST_FREE", 1e18)
    found = lines(capsys=capsys, code=2)
    assert {name for name, line in found.items() if line["is_broken"]} == {
        *("versions no-such-package", "cache folder", "disk of the cache", "disk of runs/, here"),
    }
    assert "set SMEZO_CACHE" in found["cache folder"]["found"]
    assert main(["doctor"]) == 2
    assert "BROKEN: not installed: pip install no-such-package" in capsys.readouterr().out


def test_what_cannot_be_looked_at_is_a_line_and_the_rest_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a device whose memory others have taken."""

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nand a hint")

    monkeypatch.setattr("smezo_cli.zo.passes.choose.choose_passes", full)
    found = lines(capsys=capsys, code=2)
    assert found["passes error"]["found"] == "RuntimeError: CUDA error: out of memory"
    assert found["passes error"]["is_broken"]
    assert "disk of the cache" in found


def test_passes_that_do_not_work_say_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    found = lines("--no-hub", capsys=capsys)
    assert found["passes cpu"]["found"].startswith("eager")
    assert "NUMBA_DISABLE_JIT=1 is set" in found["passes cpu"]["found"]
    assert found["hub model hub"]["found"].startswith("not asked;")
