"""`smezo choose`: which methods fit, in the order in which the arena found them.

What fits is reckoned as by `smezo plan`, how many steps a time allows from a forward that `smezo
bench` measured here, and the order is that of docs/results/arena.md. Methods that it has not
measured come after the others, by their memory.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smezo_cli.cli.flags import Flags, shows_help
from smezo_cli.cli.ls import files_of, parts
from smezo_cli.cli.method_notes import ARENA, COSTS
from smezo_cli.cli.plan import parse_memory, parse_tokens, read_bench
from smezo_cli.config.compose import checked_settings
from smezo_cli.config.method_keys import trait
from smezo_cli.config.searchpath import SearchPath, of_line, say
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.files import strict_json
from smezo_cli.machine.waiting import waiting
from smezo_cli.plan.planner import ROWS, Plan, plan

USAGE = """\
smezo choose [KEY=VALUE ...]    the methods that fit, best first, each with its command

    --memory SIZE     of the device, such as 24GB or 24GiB (default: what this machine has)
    --tokens N        rows are at most so long (default: model.max_length)
    --hours H         says how many steps that is; needs --bench
    --bench FILE      of `smezo bench --json FILE` for this model on this machine
    --json            the same for programs, in bytes
    --config-dir DIR  your own task, model, method and recipe files, as for smezo train
KEY=VALUE is as for smezo train, less the method. What a method needs is what smezo plan says, and
the order is what smezo table arena/1 found on a small model (docs/results/arena.md).
Examples:
  smezo choose
  smezo choose task=rte model=llama-7b device=cuda --memory 24GB --tokens 300
"""

_OF_BACKPROPAGATION = 3.0  # forwards that a step takes, as the arena counts them


@dataclass(frozen=True)
class Choice:
    """Hold what is known of a method for a run.

    Attributes:
        method: its name.
        plan: of the run with it.
        forwards: of a step, as docs/guide/methods.md has them; "" if it has none.
        arena: points of accuracy less those of MeZO, and their standard error, by bed.
        steps: that the time allows; None where no time was given.
        command: that trains with it.
    """

    method: str
    plan: Plan
    forwards: str
    arena: Mapping[str, tuple[float, float]]
    steps: int | None
    command: str

    @property
    def order(self) -> tuple[bool, float, int, str]:
        """Return what choices are sorted by: the mean over the arena's beds, else the peak."""
        points = [points for points, _ in self.arena.values()]
        mean = sum(points) / len(points) if points else 0.0
        return not points, -mean, self.plan.peak, self.method

    def record(self) -> dict[str, Any]:
        """Return it in plain values."""
        return {
            "method": self.method,
            "arena": {bed: list(value) for bed, value in self.arena.items()},
            "forwards": self.forwards,
            "peak": self.plan.peak,
            "fits": self.plan.fits,
            "steps": self.steps,
            "command": self.command,
        }


def main(words: Sequence[str]) -> int:
    """Print the methods that fit; return the exit code.

    Raises:
        UserError: a mistake on the line.
    """
    if shows_help(words, USAGE):
        return 0
    parser = Flags("choose")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--memory")
    parser.add_argument("--tokens")
    parser.add_argument("--hours")
    parser.add_argument("--bench")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    given = parser.parse_intermixed_args(list(words))
    for word in given.overrides:
        if word.partition("=")[0] == "method":
            raise UserError(
                f"{word}: smezo choose compares all methods; smezo plan {word} plans it."
            )
    settings = checked_settings(given.overrides, given.config_dir, say)
    capacity = None if given.memory is None else parse_memory(given.memory)
    tokens = None if given.tokens is None else parse_tokens(given.tokens, settings)
    hours = None if given.hours is None else _parse_hours(given.hours)
    if (hours is None) != (given.bench is None):
        raise UserError(
            "--hours and --bench go together: smezo bench --json FILE measures a forward, and "
            "--hours 2 --bench FILE says how many steps that is."
        )
    bench = None if given.bench is None else _forward_of(Path(given.bench), settings)
    search = of_line(given.config_dir, ())
    names = _methods(search)
    found, refused = list[Choice](), dict[str, str]()
    with waiting("planning a run with each method", len(names)) as tick:
        for name in names:
            try:
                line = [f"method={name}", *given.overrides]
                own = checked_settings(line, given.config_dir, lambda said: None)
                planned = plan(own, capacity=capacity, tokens=tokens)
            except UserError as error:
                refused[name] = str(error)
            else:
                steps = (
                    None if bench is None or hours is None else _steps(bench, own, planned, hours)
                )
                found.append(_choice(own, planned, steps, search, given.overrides))
            tick(1)
    if not found:  # what is wrong with all of them is a mistake of the line
        raise UserError(next(iter(refused.values())))
    found.sort(key=lambda one: one.order)
    if given.json:
        record = {"methods": [one.record() for one in found], "refused": refused}
        print(strict_json.dumps(record, indent=2))
        return 0
    print("\n".join(_text(settings, found, refused, given.hours)))
    return 0


def _methods(search: SearchPath) -> list[str]:
    """Return the names of the methods that train."""
    files = files_of("methods", search.roots)
    return [
        name
        for title, names in parts("methods", files)
        if not title.startswith("methods, untrained")
        for name in names
    ]


def _choice(
    settings: Settings,
    planned: Plan,
    steps: int | None,
    search: SearchPath,
    overrides: Sequence[str],
) -> Choice:
    name = settings.method["name"]
    costs = json.loads(COSTS.read_text(encoding="utf-8"))["methods"].get(name, {})
    arena = json.loads(ARENA.read_text(encoding="utf-8"))["methods"].get(name, {})
    compares = trait(settings.method, "compares_losses", default=False)
    words = [f"method={name}", *overrides]
    if steps is not None and steps < settings.steps:
        words = [*(word for word in words if not word.startswith("steps=")), f"steps={steps}"]
    return Choice(
        method=name,
        plan=planned,
        forwards=costs.get("forwards", "" if compares else "1, backward"),
        arena={bed: (points, error) for bed, (points, error) in arena.items()},
        steps=steps,
        command="" if steps == 0 else shlex.join(["smezo", "train", *search.as_typed, *words]),
    )


def _forward_of(path: Path, settings: Settings) -> dict[str, Any]:
    """Return what a file of `smezo bench --json` holds; raise UserError without a forward."""
    found = read_bench(path, settings)
    forward = found["median_seconds"].get("forward")
    if not isinstance(forward, float) or not forward > 0:
        raise UserError(f"--bench {path} does not say what a forward takes; make it anew.")
    return found


def _steps(bench: Mapping[str, Any], settings: Settings, planned: Plan, hours: float) -> int | None:
    """Return how many steps fit into a time; None where nothing says what a step takes.

    A step takes the forwards of the plan, each so long as measured for its rows, times what a step
    of the method takes beside them on two CPU cores (docs/guide/methods.md; 1 on adapters). Where
    a step is one of backpropagation, that counts as two more forwards.
    """
    costs = json.loads(COSTS.read_text(encoding="utf-8"))["methods"].get(settings.method["name"])
    rows = planned.work.get(ROWS)
    if not rows or not settings.steps:
        return None
    forwards = rows / settings.steps / bench["batch_size"]
    if costs is not None:
        beside = costs["cost"] or 1.0
    elif trait(settings.method, "compares_losses", default=False):
        return None
    else:
        beside = _OF_BACKPROPAGATION
    seconds = bench["median_seconds"]["forward"] * forwards * beside
    return int(hours * 3600 / seconds)


def _text(
    settings: Settings, found: Sequence[Choice], refused: Mapping[str, str], hours: str | None
) -> Iterator[str]:
    """Yield the lines: what fits as a table, what does not, and what the order means."""
    fitting = [one for one in found if one.plan.fits]
    s, capacity = settings, found[0].plan.capacity
    yield f"{s.task['name']} | {s.model['name']} | {s.dtype} | {capacity / 1e9:.1f} GB"
    beds = list(dict.fromkeys(bed for one in fitting for bed in one.arena))
    head = ["method", *(f"{bed}, less MeZO" for bed in beds), "forwards a step", "peak GB"]
    head += [] if hours is None else [f"steps in {hours} h"]
    rows = [[*head, "command"]]
    for one in fitting:
        cells = ["{:+.1f} +- {:.1f}".format(*one.arena[b]) if b in one.arena else "" for b in beds]
        steps = [] if hours is None else ["" if one.steps is None else f"{one.steps:,}"]
        peak = f"{one.plan.peak / 1e9:.2f}"
        rows.append([one.method, *cells, one.forwards, peak, *steps, one.command])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    for one in found:
        if not one.plan.fits:
            yield f"does not fit: {one.method}, which needs {one.plan.peak / 1e9:.2f} GB"
    for name, why in refused.items():
        yield f"not so: {name}: {why}"
    yield ""
    if beds:
        yield (
            "The order is that of the arena: a model of 135M weights, its last two blocks, 2,000 "
            "forwards (docs/results/arena.md). Larger models may rank otherwise."
        )
        if not all(one.arena for one in fitting):
            yield "What it has not measured yet follows, by peak memory, which is no rank."
    elif fitting:
        yield "The arena has not measured them yet (docs/results/arena.md): by peak memory."


def _parse_hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours < 1e6:
        raise UserError(f"--hours {shlex.quote(text)} must be a number above 0, such as --hours 2.")
    return hours
