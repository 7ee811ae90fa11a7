"""Files of the package registry: fetched once, verified, mended, one sentence when impossible."""

import base64
import hashlib
import shutil
import ssl
import subprocess
import threading
import time
import urllib.error
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from smezo_cli.errors import UserError
from smezo_cli.files import fetch
from smezo_cli.files.bounded import sha256_of

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Registry:
    """Stands in for the pip call: serves `content` and counts."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.downloads = 0

    def __call__(self, package: str, version: str, sha256: str, **kw: Any) -> None:
        self.downloads += 1
        time.sleep(0.1)  # long enough for another thread to come along
        (kw["into"] / "demo.whl").write_bytes(self.content)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    served = Registry()
    monkeypatch.setattr(fetch, "_pip_download", served)
    return served


def fetch_demo(cache: Path, **kw: Any) -> Path:
    return fetch.fetch("demo", "1.0", "demo.whl", SHA256, cache=cache, **kw)


def test_cache_is_smezo_cache_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("SMEZO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert fetch.cache_dir() == Path("/home/ada/.cache/smezo")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/invalid")
    assert fetch.cache_dir() == Path("/home/ada/.cache/smezo")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/xdg")
    assert fetch.cache_dir() == Path("/var/xdg/smezo")
    monkeypatch.setenv("SMEZO_CACHE", "~/here")
    assert fetch.cache_dir() == Path("/home/ada/here")


def test_a_file_is_fetched_once_and_nothing_else_stays(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fetch_demo(tmp_path, size_bytes=2_000_000)
    assert first.read_bytes() == CONTENT
    assert "demo 1.0 (2.0 MB)" in capsys.readouterr().err
    assert fetch_demo(tmp_path) == first
    assert registry.downloads == 1
    assert capsys.readouterr().err == ""
    left = {path.name for path in first.parent.iterdir()} - {"demo.whl.lock"}
    assert left == {"demo.whl"}


def test_a_verified_file_needs_neither_lock_nor_write(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_demo(tmp_path)
    monkeypatch.delattr(fetch, "preparing")
    fetch_demo(tmp_path)


@pytest.mark.parametrize("damaged", [b"", b"weightz", CONTENT + b"!"])
def test_a_damaged_file_is_fetched_again_with_one_line(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: bytes
) -> None:
    path = fetch_demo(tmp_path)
    path.write_bytes(damaged)
    capsys.readouterr()
    assert fetch_demo(tmp_path).read_bytes() == CONTENT
    assert registry.downloads == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert "demo.whl is damaged" in printed[0]


def test_another_file_than_the_recorded_one_is_refused_and_not_kept(
    registry: Registry, tmp_path: Path
) -> None:
    registry.content = b"something else"
    with pytest.raises(UserError, match=r"demo 1\.0: the registry did not serve demo\.whl"):
        fetch_demo(tmp_path)
    assert not (tmp_path / "packages" / "demo.whl").exists()


def test_two_runs_at_once_fetch_once(registry: Registry, tmp_path: Path) -> None:
    runs = [threading.Thread(target=fetch_demo, args=(tmp_path,)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert registry.downloads == 1
    assert (tmp_path / "packages" / "demo.whl").read_bytes() == CONTENT


def test_what_a_killed_run_left_is_removed(registry: Registry, tmp_path: Path) -> None:
    left = tmp_path / "packages" / "demo.whl.part-killed"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"0" * 1000)
    fetch_demo(tmp_path)
    assert not left.exists()


def test_too_little_space_is_said_before_anything_is_fetched(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total_used_free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: total_used_free._replace(free=3_000_000))
    with pytest.raises(UserError, match=r"3 MB free, and demo 1\.0 needs 50 MB .*SMEZO_CACHE"):
        fetch_demo(tmp_path, size_bytes=50_000_000)
    assert registry.downloads == 0


def test_a_cache_that_cannot_be_written_is_one_sentence(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*set SMEZO_CACHE"):
        fetch_demo(tmp_path / "file")


def wheel(folder: Path) -> str:
    """Write the smallest wheel that pip accepts; its sha256."""
    folder.mkdir()
    path = folder / "smezo_demo-1.0-py3-none-any.whl"
    parts = {
        "smezo_demo/__init__.py": "",
        "smezo_demo-1.0.dist-info/METADATA": (
            "Metadata-Version: 2.1\nName: smezo-demo\nVersion: 1.0\nRequires-Dist: not-there\n"
        ),
        "smezo_demo-1.0.dist-info/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = "smezo_demo-1.0.dist-info/RECORD"
    lines = []
    for name, text in parts.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        lines.append(f"{name},sha256={digest.decode()},{len(text.encode())}\n")
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (parts | {record: "".join(lines) + f"{record},,\n"}).items():
            archive.writestr(name, text)
    return sha256_of(path)


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in place of the registry, through pip's own settings."""
    sha256 = wheel(tmp_path / "index")
    for key, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "index"),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(key, value)
    return sha256


def fetch_wheel(cache: Path, sha256: str, version: str = "1.0") -> Path:
    name = f"smezo_demo-{version}-py3-none-any.whl"
    return fetch.fetch("smezo-demo", version, name, sha256, cache=cache)


def test_pip_itself_fetches_by_version_and_hash_without_dependencies(
    local_index: str, tmp_path: Path
) -> None:
    path = fetch_wheel(tmp_path / "cache", local_index)
    assert sha256_of(path) == local_index


def test_pip_itself_refuses_another_hash(local_index: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did not serve smezo_demo-1\.0-py3-none-any\.whl with"):
        fetch_wheel(tmp_path / "cache", "0" * 64)


def test_without_network_one_sentence_says_what_and_how(local_index: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        fetch_wheel(tmp_path / "cache", local_index, version="2.0")
    message = str(caught.value)
    assert message.startswith("smezo-demo 2.0 is needed and pip could not fetch it (No matching")
    assert "copy the cache of another machine and set SMEZO_CACHE" in message
    assert "\n" not in message


def test_a_python_without_pip_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **kw: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "python: No module named pip\n")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    with pytest.raises(UserError, match="-m ensurepip"):
        fetch_demo(tmp_path)


def test_only_an_sdist_is_taken_as_source_and_its_build_tools_as_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **kw: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        Path(command[command.index("--dest") + 1], "demo.whl").write_bytes(CONTENT)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    fetch_demo(tmp_path / "a")
    fetch_demo(tmp_path / "b", sdist=True)
    as_wheel, as_sdist = commands
    assert as_wheel[as_wheel.index("--only-binary") + 1] == ":all:"
    assert "--no-binary" not in as_wheel
    assert as_sdist[as_sdist.index("--no-binary") + 1] == "demo"
    for command in commands:
        assert "--no-deps" in command
        assert "--require-hashes" in command


@pytest.mark.parametrize(
    ("raised", "reachable"),
    [
        (urllib.error.URLError(OSError("Name or service not known")), False),
        (TimeoutError(), False),
        (urllib.error.HTTPError("", 401, "", Message(), None), True),
        (urllib.error.URLError(ssl.SSLError("unknown authority")), True),
    ],
)
def test_the_hub_answers_if_anything_answers(
    raised: Exception, reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def urlopen(*args: Any, **kw: Any) -> None:
        raise raised

    monkeypatch.setattr(fetch.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert fetch.hub_answers() is reachable


def test_the_offline_mode_of_the_hub_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delattr(fetch.urllib.request, "urlopen")
    assert not fetch.hub_answers()
