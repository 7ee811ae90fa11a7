"""`smezo eval`: score a trained run on a split and save every prediction."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from smezo_cli.cli.flags import Flags, check_out, shows_help, write_lines
from smezo_cli.config.fixed import is_frozen
from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError
from smezo_cli.machine import streams
from smezo_cli.run.trained import (
    batch,
    check_model,
    encode_rows,
    kept_beside,
    opened,
    prompt_of_run,
    say_code,
    score_rows,
    trained,
)

USAGE = """\
smezo eval RUN [KEY=VALUE ...]     score a trained run again and save every prediction

    --split SPLIT     test (default), dev or train
    --base            the model as it was before training
    --step N          the weights of that step (default: the best): any step of a zeroth-order run,
                      of others those of an evaluation on dev, with keep=all
    --out FILE        where the predictions go, one JSON object a line (default: in the run folder)
KEY=VALUE changes settings of the task and the machine, such as task.num_test=100 or device=cpu.
Examples:
  smezo eval runs/default/toy-tiny-llama-mezo-s0-0123abcd --split dev
  smezo eval RUN --base --out before.jsonl
"""


def main(words: Sequence[str]) -> int:
    """Score the rows of a split, print the metrics, write the predictions; return the exit code.

    Raises:
        UserError: a mistake on the line, or a run that cannot be evaluated.
    """
    if shows_help(words, USAGE):
        return 0
    parser = Flags("eval")
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--split", choices=("test", "dev", "train"), default="test")
    parser.add_argument("--base", action="store_true")
    parser.add_argument("--step", type=int)
    parser.add_argument("--out")
    given = parser.parse_intermixed_args(list(words))
    if given.base and given.step is not None:
        raise UserError("--base and --step exclude each other: give one of them.")
    check_out("--out", given.out, "predictions.jsonl")
    streams.outlast()
    with opened(given.run, given.overrides) as (folder, state, settings, _):
        from smezo_cli.machine.device import choose_device
        from smezo_cli.run import mask
        from smezo_cli.run.console import Console, in_words
        from smezo_cli.run.loaded import Loaded

        device = choose_device(settings.device, settings.model["device_map"])
        if given.overrides and given.out is None:
            raise UserError(
                f"{given.overrides[0]}: predictions under other settings need a file of their own: "
                "add --out FILE."
            )
        if given.out is None and not os.access(folder.path, os.W_OK):
            raise UserError(f"{folder.path} cannot be written to: add --out FILE.")
        console = Console()
        say_code(settings, console.say)
        job = Loaded(settings, device, console.say)
        check_model(state, job, given.overrides, given.run)
        if given.base and mask.holds_codes(job):
            mask.use(job, folder.path)
        step = 0 if given.base else trained(folder, state, job, given.step, console.say)
        same_task = not any(word.startswith("task.") for word in given.overrides)
        known = {given.split: state.notes["rows"][given.split]}
        if same_task and job.differing_rows(known):
            raise UserError(
                f"the {given.split} rows are not those that {given.run} was trained with: the data "
                "has changed since; put it back, or say which to use (such as task.data=FILE)."
            )
        rows, prompt = getattr(job.task, given.split), prompt_of_run(state)
        encoded = encode_rows(job, rows, prompt, given.run)
        batch(job, prompt, state.notes.get("batching"), None if same_task else rows, console.say)
        which = "-base" if given.base else "" if given.step is None else f"-step{step}"
        name = f"predictions-{given.split}{which}.jsonl"
        out = Path(given.out) if given.out else folder.path / name
        kept = kept_beside(out, job)
        with job.as_it_came() if given.base else contextlib.nullcontext():
            found = score_rows(
                job, encoded, given.split, console, kept, step, given.run, given.base
            )
        metrics = found.figures()
        write_lines(
            out,
            (
                {"id": row.id, "fields": dict(row.fields)} | prediction
                for row, prediction in zip(rows, found.predictions(), strict=True)
            ),
        )
        kept.remove()
        value = metrics[found.metric]
        console.say(
            f"{given.split} {found.metric} {value:.4f} +- {metrics['standard_error']:.4f} "
            f"(n={metrics['n']}, {'untrained' if given.base else _at(settings, step)})"
        )
        if line := in_words(metrics, found.metric):
            console.say(f"  {line}")
        for key in ("exact_match", "loss", "auc"):
            if metrics.get(key) is not None:
                console.say(f"  {key}  {metrics[key]:.4f}")
        console.say(f"  {out}")
    return 0


def _at(settings: Settings, step: int) -> str:
    return f"method {settings.method['name']}" if is_frozen(settings.method) else f"step {step}"
