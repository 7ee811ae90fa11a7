"""`smezo bench`: measure what a step costs, beside plain forwards and the papers' pseudo-code.

No torch here: a mistake on the line is answered before it loads.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console as RichConsole
from rich.table import Table

from smezo_cli.cli.flags import Flags, check_out, shows_help
from smezo_cli.config.compose import checked_settings
from smezo_cli.config.searchpath import say
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError, near
from smezo_cli.files import strict_json
from smezo_cli.files.atomic import write_text
from smezo_cli.kinds import MIXTURE
from smezo_cli.machine import process, streams
from smezo_cli.machine.device import choose_device
from smezo_cli.machine.waiting import waiting

if TYPE_CHECKING:
    from smezo_cli.run.console import Console
    from smezo_cli.scoring.candidates import Candidates
    from smezo_cli.scoring.scorer import Scorer

USAGE = """\
smezo bench [KEY=VALUE ...]         what a step costs, beside plain forwards and the textbook's step

    --rounds N        how often each candidate is timed (7); a round runs each of them once
    --only NAMES      some of them, with commas between; a forward, the unit, always runs
    --grow            a second table: how a step grows with batch size and length
    --config-dir DIR  your own model files, read before smezo's own
    --json FILE       every round and all numbers: {"median_seconds": {NAME: ...}, ...}
                      Ctrl-C leaves those of the rounds that are whole
KEY is model (or model.KEY), batch_size (16), length (tokens of a prompt, 64), dtype, compute_dtype,
device. All weights are trained, but by methods on LoRA. Names:
  forward                    the model alone: last position, label rows; two of them are the unit
  forward_full_logits        the textbook's: a sequence a candidate, all logits
  textbook_mezo, textbook_sparse_mezo    the papers' pseudo-code, with forwards like that
  textbook_mezo_our_layers, textbook_sparse_mezo_our_layers    the same with smezo's linear layers
  mezo, sparse_mezo          as smezo train makes them, and variants:
    sparse_mezo_sequential, sparse_mezo_lockstep, sparse_mezo_in_place, sparse_mezo_kept_noise,
    sparse_mezo_rademacher, sparse_mezo_eager, r_mezo
  lezo, lozo, ...            any method of smezo ls methods that compares losses, of at most 16
                             queries a step
  forward_lora               the model with LoRA, the unit of mezo_lora, p_rge and the like
  lozo@side_path, ...        a method with an executor: sequential, lockstep, side_path, batched
  pass_gaussian, pass_rademacher         one masked pass over 64 M float32 weights
Examples:
  smezo bench
  smezo bench model=tiny-llama batch_size=4 length=32 --rounds 3 --json bench.json
  smezo bench dtype=bfloat16 --only mezo,sparse_mezo,textbook_mezo
"""

KEYS = ("model", "batch_size", "length", "dtype", "compute_dtype", "device")
_DEFAULTS = {"batch_size": "16", "length": "64"}
_GROW_LENGTHS = (32, 64, 128)
_GROW_BATCHES = (8, 16)
_NEAR_PLAN = 0.1  # a peak so near what is planned is no news


def main(words: Sequence[str]) -> int:
    """Measure, print tables, write the numbers to a file if asked; return the exit code.

    Raises:
        UserError: a mistake on the line, or a model that cannot be had or measured.
    """
    if shows_help(words, USAGE):
        return 0
    parser = Flags("bench")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only")
    parser.add_argument("--grow", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--config-dir", "-cd")
    given = parser.parse_intermixed_args(list(words))
    if given.rounds < 1:
        raise UserError(f"--rounds {given.rounds}: must be at least 1, such as --rounds 7.")
    if given.json is not None:
        streams.outlast()
    check_out("--json", given.json, "bench.json")
    out = None if given.json is None else Path(given.json)
    overrides, length = _overrides(given.overrides)
    settings = _settings(overrides, given.config_dir)
    _check_length(settings, max([length, *_GROW_LENGTHS] if given.grow else [length]))
    if settings.model["device_map"] is not None:
        raise UserError("smezo bench measures on one device: leave model.device_map out.")
    device = choose_device(settings.device)
    try:
        result = _measure(settings, length, device, given.rounds, given.only, given.grow)
    except KeyboardInterrupt:
        return 130
    try:
        result |= _planned(overrides, length, given.config_dir, result)
    except KeyboardInterrupt:  # one more: what was measured is kept all the same
        nothing = {"planned_bytes": {}, "beside_plan_bytes": 0, "peak_over_plan": {}}
        result |= nothing | {"interrupted": True}
    _show(result)
    if out is not None:
        write_text(out, strict_json.dumps(result, indent=2) + "\n")
        print(f"  {out}")
    return 130 if result["interrupted"] else 0


def _overrides(words: Sequence[str]) -> tuple[list[str], int]:
    """Return the settings of the line, or what stands for them, and the length."""
    given = dict(_DEFAULTS)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{shlex.quote(word)} is not of the form KEY=VALUE, such as length=64.")
        if key not in KEYS and not key.startswith("model."):
            raise UserError(f"smezo bench takes no {key}{near(key, KEYS)}.")
        if "," in value and key in KEYS:
            raise UserError(f"{word} names several values: smezo bench measures one at a time.")
        given[key] = value
    text = given.pop("length")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"length={text}: length must be a whole number of tokens, such as 64.")
    # A recipe may freeze weights; here all are trained.
    overrides = [f"{key}={value}" for key, value in given.items()]
    return [*overrides, "~recipe", "~recipe/model"], int(text)


def _settings(overrides: Sequence[str], config_dir: str | None) -> Settings:
    """Return the settings of a Sparse-MeZO run with these changes and no recipe."""
    settings = checked_settings([*overrides, "method=sparse_mezo"], config_dir, say)
    if settings.model["family"] == "masked":
        raise UserError(
            f"model={settings.model['name']} is masked, and smezo bench measures models that "
            "continue a text: choose a causal one."
        )
    return settings


def _check_length(settings: Settings, longest: int) -> None:
    limit = settings.model["max_length"]
    if longest >= limit:
        raise UserError(
            f"length={longest} leaves no room for a label word in model.max_length={limit}; "
            "lower length, or leave out --grow if that is what is so long."
        )


def _measure(
    settings: Settings, length: int, device_name: str, rounds: int, only: str | None, grow: bool
) -> dict[str, Any]:
    """Measure; return all that --json writes."""
    from smezo_cli.bench import timing
    from smezo_cli.machine import hardware
    from smezo_cli.run.console import Console
    from smezo_cli.store import versions

    names = list(timing.NAMES) if only is None else _chosen(only, timing.ALL_NAMES)
    console = Console()
    started = versions.now()
    with waiting(f"loading {settings.model['name']}"):
        scorer, ids, labels, source = _model_and_tokens(
            settings, length, device_name, grow, console
        )
    assert settings.sparsity is not None
    total = sum(p.numel() for p in scorer.model.parameters())
    result: dict[str, Any] = {
        "model": settings.model["name"],
        "num_weights": total,
        "weights_bytes": sum(p.numel() * p.element_size() for p in scorer.model.parameters()),
        "dtype": settings.dtype,
        "compute_dtype": settings.compute_dtype or settings.dtype,
        "batch_size": settings.batch_size,
        "length": length,
        "tokens": source,
        "sparsity": settings.sparsity,
        "device": device_name,
        "machine": hardware.machine(next(scorer.model.parameters()).device),
        "versions": versions.versions(),
        "started": started,
    }
    console.say(
        f"{result['model']} | {total / 1e6:.1f} M weights, all trained | {settings.batch_size} x "
        f"{length} tokens | {settings.dtype}, computed in {result['compute_dtype']}, on "
        f"{device_name}"
    )

    def rows(batch_size: int, length: int) -> "list[Candidates]":
        return timing.rows_of(ids, labels, batch_size, length)

    bench = timing.Bench(
        scorer,
        rows(settings.batch_size, length),
        names,
        rounds=rounds,
        sparsity=settings.sparsity,
        tick=lambda name: bar.step(1, name),
    )
    with console.bar("bench", bench.num_ticks) as bar:
        result |= bench.run()
    if grow and not result["interrupted"]:
        sizes = [(b, n) for b in _GROW_BATCHES for n in _GROW_LENGTHS]
        ticks = (1 + rounds) * len(sizes) * len(timing.GROW_NAMES)
        try:
            with console.bar("grow", ticks) as bar:
                result["grow"] = bench.grow({size: rows(*size) for size in sizes})
            result["interrupted"] = any(_num_rounds(one) < rounds for one in result["grow"])
        except KeyboardInterrupt:  # what was measured before it is not lost
            result["interrupted"] = True
    return result


def _num_rounds(record: Mapping[str, Any]) -> int:
    return len(next(iter(record["rounds"].values())))


def _planned(
    overrides: Sequence[str], length: int, config_dir: str | None, result: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what `smezo plan` says of a step of each method, and how the measured peaks compare.

    On a CPU the process holds what other candidates have compiled, and not what a run reads: as
    much as the peak of a forward is off its plan. Nothing is compared of a model whose architecture
    the plan does not know.
    """
    from smezo_cli.bench import methods, timing
    from smezo_cli.config.method_keys import trait
    from smezo_cli.plan import stages
    from smezo_cli.plan.planner import Plan, plan

    def of(method: str, executor: str) -> Plan:
        words = [*overrides, f"method={method}"]
        words += [f"method.executor={executor}"] if executor else []
        # Losses of a bench are over one batch, whatever rows a run would take.
        own = {"short_rows", "long_rows"} & set(methods.node_of(method))
        words += [f"method.{key}={batch_size}" for key in sorted(own)]
        settings = checked_settings(words, config_dir, lambda line: None)
        return plan(settings, tokens=length + 1)  # a row is the prompt and a label word

    batch_size, peaks = result["batch_size"], result["peak_bytes"]
    found, over = dict[str, int](), dict[str, float]()
    beside = 0
    with suppress(UserError):
        if peaks:
            forward = of("mezo", "sequential")
            alone = forward.step_peak - forward.resident.get(stages.SCRATCH, 0)
            beside = peaks[timing.UNIT] - alone
        for name in peaks:
            method, _, executor = name.partition("@")
            if method in methods.names():
                found[name] = of(method, executor).step_peak
                # Whoever changes layers has a model beside that of the others.
                has_own = trait(methods.node_of(method), "holds_codes", default=False)
                more = beside + (result["weights_bytes"] if has_own else 0)
                over[name] = peaks[name] / (found[name] + more)
    return {"planned_bytes": found, "beside_plan_bytes": beside, "peak_over_plan": over}


def _chosen(only: str, names: Sequence[str]) -> list[str]:
    chosen = [name.strip() for name in only.split(",")]
    for name in chosen:
        if name not in names:
            raise UserError(f"--only {name}: there is no such candidate{near(name, names)}.")
    return chosen


def _model_and_tokens(
    settings: Settings, length: int, device_name: str, grow: bool, console: "Console"
) -> "tuple[Scorer, list[int], tuple[int, int], str]":
    """Return a scorer, tokens for the prompts, two label tokens, and what the tokens are in words.

    The embedded model reads its own data; another reads random tokens, because its time does not
    hang on what they say.
    """
    import torch

    from smezo_cli.files.fetch import cache_dir
    from smezo_cli.machine.allocator import keep_freed_memory
    from smezo_cli.models.load import load_model
    from smezo_cli.models.onednn import use_onednn
    from smezo_cli.scoring.scorer import Scorer
    from smezo_cli.zo.passes import openmp

    process.interruptible()  # from here on there is something to keep
    if line := openmp.settle():
        console.say(line)
    cache, device = cache_dir(), torch.device(device_name)
    dtype = getattr(torch, settings.dtype)
    compute = getattr(torch, settings.compute_dtype or settings.dtype)
    model, tokenizer = load_model(settings.model, dtype=dtype, device=device, cache=cache)
    if compute == dtype:
        use_onednn(model, console.say)
    keep_freed_memory()  # as a run does
    scorer = Scorer(model, tokenizer, None if compute == dtype else compute)
    needed = settings.batch_size * length
    if grow:
        needed = max(needed, max(_GROW_BATCHES) * max(_GROW_LENGTHS))
    if settings.model.get("package") is None:
        generator = torch.Generator().manual_seed(0)
        vocabulary: int = model.config.vocab_size
        ids = torch.randint(vocabulary, (needed,), generator=generator).tolist()
        first, second = torch.randperm(vocabulary, generator=generator)[:2].tolist()
        return scorer, ids, (first, second), "random, seed 0"

    from smezo_cli.scoring.tokens import token_ids
    from smezo_cli.tasks import load_task

    node = settings.task
    if node["kind"] == MIXTURE:  # text of one part does
        node = next(iter(node["nodes"].values()))
    task = load_task(node, data_seed=0, cache=cache)
    ids = []
    for row in task.train:
        ids += token_ids(tokenizer, [task.prompts[0].context(row.fields)])[0]
        if len(ids) >= needed:
            break
    else:
        raise UserError(
            f"batch_size={settings.batch_size} length={length} asks for {needed} tokens and task "
            f"{task.name} has {len(ids)}; lower one of them."
        )
    # A word with its blank is one token of the embedded model.
    first, second = (token_ids(tokenizer, [f" {word}"])[0][-1] for word in ("terrible", "great"))
    return scorer, ids, (first, second), f"text of {task.name}"


# --- tables ----------------------------------------------------------------------------------


def _show(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    # As wide as it must be: a number must not be cut where the table is piped or narrow.
    columns = max(os.get_terminal_size().columns if os.isatty(1) else 0, 400)
    console = RichConsole(width=columns, highlight=False)
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in (
        "seconds",
        "iqr",
        "x two forwards",
        "x its forwards",
        "peak MiB",
        "x forward's",
        "x plan",
        "weights/s",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("passes", no_wrap=True)
    for name in (*result["median_seconds"], *result["failed"]):
        cells = [
            _number(result["median_seconds"].get(name), "{:.4g}"),
            _number(result["iqr_seconds"].get(name), "{:.2g}"),
            _number(result["ratio_to_two_forwards"].get(name), "{:.3f}"),
            _number(result["ratio_to_its_forwards"].get(name), "{:.3f}"),
            _number(result["peak_bytes"].get(name), "{:.0f}", 2**-20),
            _number(result["peak_over_forward"].get(name), "{:.3f}"),
            _number(result["peak_over_plan"].get(name), "{:.3f}"),
            _number(result["weights_per_second"].get(name), "{:.0f} M", 1e-6),
            result["failed"].get(name) or result["passes"].get(name, ""),
        ]
        table.add_row(name, *cells)
    console.print(table)
    if result["interrupted"]:
        tables = zip(
            (result, *result.get("grow", [])[:1]), ("the first table", "the second"), strict=False
        )
        rounds = [f"{_num_rounds(record)} rounds in {name}" for record, name in tables]
        print(f"  interrupted: {', '.join(rounds)}")
    if not result["peak_bytes"]:
        print("  no peaks: this system does not let a process reset its own")
    far = {n: x for n, x in result["peak_over_plan"].items() if abs(x - 1) > _NEAR_PLAN}
    if far:
        named = ", ".join(f"{name} {x:.2f}" for name, x in far.items())
        print(f"  peaks more than {_NEAR_PLAN:.0%} from what smezo plan says: {named}")
    if "grow" in result:
        names = list(result["grow"][0]["median_seconds"]) if result["grow"] else []
        table = Table(box=SIMPLE, pad_edge=False)
        table.add_column("rows x tokens", no_wrap=True)
        for name in names:
            table.add_column(f"{name} s", justify="right", no_wrap=True)
        for name in names[1:]:
            table.add_column(f"{name} x two", justify="right", no_wrap=True)
        for record in result["grow"]:
            seconds, ratios = record["median_seconds"], record["ratio_to_two_forwards"]
            table.add_row(
                f"{record['batch_size']} x {record['length']}",
                *(f"{seconds[name]:.4g}" for name in names),
                *(f"{ratios[name]:.3f}" for name in names[1:]),
            )
        console.print(table)


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else form.format(value * scale)
