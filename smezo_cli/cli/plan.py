"""`smezo plan`: say what a run will need, from its settings alone, and whether it fits.

The model is built on the meta device, where tensors have shapes and no contents; the run's own
scorer and probe then go through it, and every tensor that they make is counted while it lives.
"""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smezo_cli.cli.flags import Flags, shows_help
from smezo_cli.config.compose import checked_settings
from smezo_cli.config.searchpath import say
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.files import strict_json
from smezo_cli.files.bounded import read_json
from smezo_cli.machine.waiting import waiting
from smezo_cli.plan.planner import ROWS, plan

USAGE = """\
smezo plan [KEY=VALUE ...]      what the run of `smezo train KEY=VALUE ...` will need

    --memory SIZE     of the device, such as 80GB or 24GiB (default: what this machine has)
    --tokens N        rows are at most so long (default: model.max_length)
    --bench FILE      of `smezo bench --json FILE` for this model on this machine: adds the time
    --json            the same for programs, in bytes
    --config-dir DIR  your own task, model, method and recipe files, as for smezo train
Nothing is fetched, no weights are read, and device=cuda needs no such device beside --memory.
Examples:
  smezo plan
  smezo plan task=multirc model=opt-13b device=cuda --memory 80GB --tokens 400
"""


def main(words: Sequence[str]) -> int:
    """Print the plan of a run; return the exit code, which is 0 also where the run does not fit.

    Raises:
        UserError: a mistake on the line, or an architecture that is not known.
    """
    if shows_help(words, USAGE):
        return 0
    parser = Flags("plan")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--memory")
    parser.add_argument("--tokens")
    parser.add_argument("--bench")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    given = parser.parse_intermixed_args(list(words))
    capacity = None if given.memory is None else parse_memory(given.memory)
    settings = checked_settings(given.overrides, given.config_dir, say)
    tokens = None if given.tokens is None else parse_tokens(given.tokens, settings)
    bench = None if given.bench is None else _bench_of(Path(given.bench), settings)
    with waiting("building the model without its weights"):
        found = plan(settings, capacity=capacity, tokens=tokens)
    if bench is not None:
        seconds = _seconds(Path(given.bench), bench, settings, found.work)
        found = dataclasses.replace(found, seconds=seconds)
    print(strict_json.dumps(found.record(), indent=2) if given.json else found.text())
    return 0


def read_bench(path: Path, settings: Settings) -> dict[str, Any]:
    """Return what a file of `smezo bench --json` holds, whose forwards are like those of the run.

    Raises:
        UserError: it cannot be read, or measured something else.
    """
    found = read_json(path)
    if found is None or not isinstance(found.get("median_seconds"), dict):
        raise UserError(f"--bench {path} is no file of smezo bench --json FILE; make one first.")
    compute = settings.compute_dtype or settings.dtype
    for key, wanted in (
        ("model", settings.model["name"]),
        ("dtype", settings.dtype),
        ("compute_dtype", compute),
        ("batch_size", settings.batch_size),
    ):
        if found.get(key) != wanted:
            raise UserError(
                f"--bench {path} is of {key}={found.get(key)}, and this run has {wanted}: smezo "
                f"bench {key}={wanted} --json FILE measures it."
            )
    if not isinstance(found.get("length"), int):
        raise UserError(f"--bench {path} does not say its length; make it anew.")
    return dict(found)


def _bench_of(path: Path, settings: Settings) -> dict[str, Any]:
    """Return what :func:`read_bench` does, of a file that has a step of the method, too.

    Raises:
        UserError: as there, or it has none.
    """
    found = read_bench(path, settings)
    step = found["median_seconds"].get(settings.method["name"])
    if not isinstance(step, float) or not step > 0:
        raise UserError(
            f"--bench {path} holds no step of method {settings.method['name']}: smezo bench "
            f"--only {settings.method['name']} --json FILE measures one."
        )
    return found


def _seconds(
    path: Path, bench: Mapping[str, Any], settings: Settings, work: Mapping[str, int]
) -> dict[str, float]:
    """Return the seconds of a step as it was measured, and those of all steps.

    Every forward of a bench is over one batch. Where those of the run are over other rows, too,
    all steps take the seconds of a forward as often as their rows make batches.

    Raises:
        UserError: these rows are not known, or the file does not say what a forward takes.
    """
    name, size = settings.method["name"], settings.batch_size
    step = bench["median_seconds"][name]
    found = {"step": step, "rows": size, "tokens": bench["length"], "steps": step * settings.steps}
    rows = work.get(ROWS)
    if rows == work["forwards of training"] * size:
        return found
    if rows is None:
        raise UserError(
            f"--bench {path}: method {name} computes losses of all train rows, whose number is "
            "not known: say it, such as task.num_train=1000, or leave --bench out."
        )
    forward = bench["median_seconds"].get("forward")
    ratio = (bench.get("ratio_to_its_forwards") or {}).get(name)
    if not isinstance(forward, float) or not isinstance(ratio, float):
        raise UserError(
            f"--bench {path} does not say what a forward of method {name} takes; make it anew."
        )
    return found | {"steps": forward * ratio * rows / size}


_UNITS = {"": 3, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_memory(text: str) -> int:
    """Return the bytes that "80GB" (10^9), "24GiB" (2^30) and the like stand for.

    Raises:
        UserError: anything else, or nothing at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    size = 0
    if found is not None:
        number, unit, binary = found.groups()
        amount = float(number) * (1024 if binary else 1000) ** _UNITS[unit.upper()]
        size = int(amount) if amount < 2**63 else 0
    if not size:
        raise UserError(
            f"--memory {shlex.quote(text)} is no amount of memory: give a number above 0 with KB, "
            "MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024), such as --memory 80GB."
        )
    return size


def parse_tokens(text: str, settings: Settings) -> int:
    """Return the length of the longest row that --tokens says.

    Raises:
        UserError: it is none, or longer than the model reads.
    """
    longest = settings.model["max_length"]
    if not text.isdecimal() or not 4 <= int(text) <= longest:
        raise UserError(
            f"--tokens {shlex.quote(text)} must be a whole number from 4 to "
            f"model.max_length={longest}, such as --tokens {min(400, longest)}."
        )
    return int(text)
