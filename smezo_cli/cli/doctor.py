"""`smezo doctor`: one screen on this machine, for bug reports and before a long run."""

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from smezo_cli.cli.flags import Flags, shows_help
from smezo_cli.config.fixed import CONF_DIR
from smezo_cli.files import fetch, strict_json
from smezo_cli.files.bounded import sha256_of
from smezo_cli.machine.waiting import beside_data, waiting

USAGE = """\
smezo doctor                 what a bug report needs: versions, devices, passes, caches, disk, hub

    --json     the same for programs
    --no-hub   the model hub is not asked
Exit code 0: all is well; 2: something that a run needs is broken, said in a line with "BROKEN".
No token, key or path of your home is printed.
"""

NEEDED = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "wandb", "safetensors")
OPTIONAL = (
    *("numba", "triton", "peft", "pydantic", "numpy", "bitsandbytes", "joblib", "submitit"),
    *("optuna", "trackio"),
)
#: Variables that change what a run does. Those of the second tuple hold secrets or may.
SHOWN = (
    *("SMEZO_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_DISABLE_JIT", "TRITON_INTERPRET"),
    *("PYTHONOPTIMIZE", "WANDB_MODE"),
)
HIDDEN = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "HTTPS_PROXY", "HTTP_PROXY")
PASS_WEIGHTS = 4_000_000  # of the pass that is timed: 16 MB read and 16 written
LEAST_FREE = 2_000_000_000  # bytes of disk; the embedded model and a run of it take one


@dataclass(frozen=True)
class Finding:
    """Holds one line: what was looked at, what was found.

    Attributes:
        part: the heading that it stands below.
        what: was looked at.
        found: in words.
        is_broken: a run that needs it will fail, or give other numbers.
    """

    part: str
    what: str
    found: str
    is_broken: bool = False


def main(words: Sequence[str]) -> int:
    """Print what was found; return 2 if something is broken, else 0.

    Raises:
        UserError: a mistake on the line.
    """
    if shows_help(words, USAGE):
        return 0
    parser = Flags("doctor")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-hub", action="store_true")
    given = parser.parse_args(list(words))
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "devices": _devices,
        "passes": _passes,
        "cache": _caches,
        "disk": _disk,
        "hub": partial(_hub, is_asked=not given.no_hub),
        "environment": _environment,
    }
    beside_data(given.json)
    found = list[Finding]()
    for part, look in looks.items():
        with waiting(f"looking at {part}"):
            found += _as_far(part, look)
    found = [Finding(f.part, f.what, _without_home(f.found), f.is_broken) for f in found]
    if given.json:
        print(strict_json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print(_as_text(found), end="")
    return 2 if any(finding.is_broken for finding in found) else 0


def _as_far(part: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield what is found, and at last the error that ended the search."""
    try:
        yield from look()
    except Exception as error:  # whatever a broken installation or a busy device raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield Finding(part, "error", f"{type(error).__name__}: {first}", is_broken=True)


def _as_text(found: Sequence[Finding]) -> str:
    width = max(len(finding.what) for finding in found)
    lines, part = [], ""
    for finding in found:
        if finding.part != part:
            part = finding.part
            lines.append(part)
        mark = "BROKEN: " if finding.is_broken else ""
        lines.append(f"  {finding.what:{width}}  {mark}{finding.found}")
    broken = sum(finding.is_broken for finding in found)
    lines.append(f"{broken} broken" if broken else "nothing is broken")
    return "\n".join(lines) + "\n"


def _without_home(text: str) -> str:
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


# --- what is looked at --------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", f"{platform.python_version()}, {platform.platform()}")
    for package in NEEDED:
        try:
            yield Finding("versions", package, version(package))
        except PackageNotFoundError:
            words = f"not installed: pip install {package}"
            yield Finding("versions", package, words, is_broken=True)
    others = []
    for package in OPTIONAL:
        try:
            others.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            others.append(f"no {package}")
    yield Finding("versions", "others", ", ".join(others))
    from smezo_cli.store.versions import versions  # it imports torch

    known = versions()
    commit = known["commit"] or "an installed package"
    yield Finding("versions", "smezo", f"{known['smezo']} ({commit}), numerics {known['numerics']}")


def _devices() -> Iterator[Finding]:
    import torch

    from smezo_cli.machine.hardware import machine
    from smezo_cli.machine.memory import available_bytes

    cpu = machine(torch.device("cpu"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpu["cpus"]
    memory = f"{available_bytes() / 2**30:.1f} GiB of memory free"
    if "memory_bytes" in cpu:
        memory += f" of {cpu['memory_bytes'] / 2**30:.1f}"
    words = f"{cpu['cpu'] or 'of unknown name'}, {cores} cores, {torch.get_num_threads()} threads"
    yield Finding("devices", "cpu", f"{words}, {memory}")
    if not torch.cuda.is_available():
        yield Finding("devices", "cuda", f"none (torch was built for {_built_for()})")
        return
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        size = f"{about.total_memory / 2**30:.1f} GiB"
        words = f"{about.name}, {size}, compute capability {about.major}.{about.minor}"
        yield Finding("devices", f"cuda:{i}", words)


def _built_for() -> str:
    import torch

    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip is not None else "CPUs alone"


def _passes() -> Iterator[Finding]:
    """Say which passes work on each kind of device, and how fast a masked one is."""
    import torch

    from smezo_cli.zo.noise import stream_key
    from smezo_cli.zo.passes.choose import choose_passes
    from smezo_cli.zo.passes.draw import Draw, Rule
    from smezo_cli.zo.selections import masks

    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        device = torch.device(kind)
        # Compared with the eager bits, on a small tensor, before they are taken.
        passes, why = choose_passes(Rule("small", "gaussian"), "auto", device)
        weight = torch.linspace(-1.0, 1.0, PASS_WEIGHTS, device=device)
        out = torch.empty_like(weight)
        key = torch.tensor(stream_key(0, "doctor"), dtype=torch.int64, device=device)
        h = torch.tensor(masks.threshold(weight, "small", 0.75), device=device)
        draw = Draw(key[None], key, key, h, torch.tensor([1e-3], device=device))

        def move(passes: Any = passes, given: Any = (weight, out, draw)) -> None:
            passes.move(*given)
            if given[0].is_cuda:
                torch.cuda.synchronize()

        speed = PASS_WEIGHTS / _seconds(move)
        words = f"{passes.name}, {speed / 1e9:.2f} G weights/s"
        yield Finding("passes", kind, f"{words} ({why})" if why else words)


def _seconds(run: Callable[[], None]) -> float:
    """Return the least of three times: others on the machine make it only longer."""
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _caches() -> Iterator[Finding]:
    """Say what of the embedded model and data is in the cache, and whether it is whole."""
    cache = fetch.cache_dir()
    yield Finding("cache", "folder", *_writable(cache))
    for package in _packages():
        file = cache / "packages" / package["file"]
        what = f"{package['name']} {package['version']}"
        if not file.is_file():
            yield Finding("cache", what, "not there: it is fetched when a run first needs it")
        elif sha256_of(file) == package["sha256"]:
            yield Finding("cache", what, f"whole, {file.stat().st_size / 1e6:.1f} MB")
        else:
            words = f"{file} is damaged (another sha256): the next run that needs it fetches it"
            yield Finding("cache", what, words)
    for folder in sorted((cache / "models").glob("*/")):
        if ".part-" not in folder.name:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            yield Finding("cache", folder.name, f"converted, {size / 1e6:.0f} MB")
    for kept, what in (("scores", "of untouched models"), ("inputs", "of frozen blocks")):
        sizes = [file.stat().st_size for file in (cache / kept).rglob("*") if file.is_file()]
        if sizes:
            words = f"{what}, for later runs: {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"
            yield Finding("cache", kept, words)
    if left := sorted(cache.glob("*/*.part-*")):
        words = f"{len(left)} left by killed runs; the next run that needs such a file removes it"
        yield Finding("cache", "half-made", words)


def _writable(folder: Path) -> tuple[str, bool]:
    """Return what is to be said of a folder that runs write to, and whether that is a fault."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return str(folder) if there == folder else f"{folder} (not there yet)", False
    return f"{folder} cannot be written: set SMEZO_CACHE to a folder that can", True


def _packages() -> Iterator[Mapping[str, Any]]:
    """Yield what the YAML files of models and tasks say of files of the registry, each once."""
    seen = set[str]()
    for group in ("model", "task"):
        for file in sorted((CONF_DIR / group).glob("*.yaml")):
            text = file.read_text(encoding="utf-8")
            if "sha256:" in text:
                for node in _with_hashes(yaml.safe_load(text)):
                    if node["file"] not in seen:
                        seen.add(node["file"])
                        yield node


def _with_hashes(node: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(node, Mapping):
        if {"name", "version", "file", "sha256"} <= node.keys():
            yield node
        for value in node.values():
            yield from _with_hashes(value)
    elif isinstance(node, list):
        for value in node:
            yield from _with_hashes(value)


def _disk() -> Iterator[Finding]:
    for what, folder in (("of the cache", fetch.cache_dir()), ("of runs/, here", Path.cwd())):
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        yield Finding("disk", what, f"{free / 1e9:.1f} GB free", is_broken=free < LEAST_FREE)


def _hub(*, is_asked: bool) -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    token = "a token is set" if get_token() else "no token (gated models need one)"
    if constants.HF_HUB_OFFLINE:
        words = "not asked: HF_HUB_OFFLINE is set"
    elif not is_asked:
        words = "not asked"
    elif fetch.hub_answers():
        words = "answers"
    else:
        words = "does not answer: local models, local data and the embedded job work without it"
    yield Finding("hub", "model hub", f"{words}; {token}")


def _environment() -> Iterator[Finding]:
    shown = [f"{name}={os.environ[name]}" for name in SHOWN if name in os.environ]
    hidden = [f"{name} is set" for name in HIDDEN if name in os.environ]
    yield Finding("environment", "variables", ", ".join([*shown, *hidden]) or "none that matter")
