"""`smezo predict`: write what a trained model answers to rows of a file."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smezo_cli.cli.flags import Flags, check_out, shows_help, write_lines
from smezo_cli.errors import UserError, near
from smezo_cli.files import strict_json
from smezo_cli.machine import streams
from smezo_cli.run.trained import (
    batch,
    check_model,
    kept_beside,
    opened,
    prompt_of_run,
    prompts_in,
    read_config,
    say_code,
    score_rows,
    trained,
)
from smezo_cli.tasks.own import existing

if TYPE_CHECKING:
    from smezo_cli.tasks import Prompt

USAGE = """\
smezo predict RUN FILE [KEY=VALUE ...]    predict rows of your own, without labels
smezo predict RUN --field NAME=TEXT [--field ...]     or one row given here

    --part NAME       of a run on a mixture: the part whose prompt is asked
    --out FILE        where the predictions go, one JSON object a line (default: standard output)
FILE is CSV, TSV, JSONL, JSON or Parquet with a column for each field of the run's prompt.
Examples:
  smezo predict RUN new.csv --out predictions.jsonl
  smezo predict RUN --field text="a joy from start to end"
"""


def main(words: Sequence[str]) -> int:
    """Write the predictions of unlabelled rows as JSONL; return the exit code.

    Raises:
        UserError: a mistake on the line, in the file, or a run that cannot be used.
    """
    if shows_help(words, USAGE):
        return 0
    parser = Flags("predict")
    parser.add_argument("run")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--field", action="append", default=[])
    parser.add_argument("--part")
    parser.add_argument("--out")
    given = parser.parse_intermixed_args(list(words))
    files = [word for word in given.words if "=" not in word]
    if len(files) + bool(given.field) != 1:
        raise UserError("give the rows either as one FILE or by --field NAME=TEXT.")
    fields = {}
    for word in given.field:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise UserError(f"--field {shlex.quote(word)} is not of the form NAME=TEXT.")
        fields[name] = text
    overrides = [word for word in given.words if "=" in word]
    check_out("--out", given.out, "predictions.jsonl")
    if files:  # before torch is loaded, and after the run that it is for
        read_config(Path(given.run), overrides)
        existing("FILE", files[0])
    if given.out:
        streams.outlast()
    with opened(given.run, overrides) as (folder, state, settings, _):
        from smezo_cli.machine.device import choose_device
        from smezo_cli.run.console import Console
        from smezo_cli.run.loaded import Loaded
        from smezo_cli.tasks.own import unlabelled

        # Messages go to stderr if the predictions go to stdout; training rows are not loaded.
        console = Console(sys.stdout if given.out else sys.stderr)
        prompt = _prompt_of(prompts_in(prompt_of_run(state)), given.part)
        node = settings.task["nodes"][prompt.part] if prompt.part else settings.task
        notes: list[str] = []
        rows = unlabelled(node, prompt, files[0] if files else fields, notes)
        for note in notes:
            console.say(f"  note    {note}")
        say_code(settings, console.say)
        device = choose_device(settings.device, settings.model["device_map"])
        job = Loaded(settings, device, lambda line: None, with_rows=False, warn=console.say)
        check_model(state, job, overrides, given.run)
        step = trained(folder, state, job, None, console.say)
        encoded = job.encode(rows, prompt)
        batch(job, prompt, state.notes.get("batching"), rows, console.say)
        kept = kept_beside(Path(given.out) if given.out else folder.path / "predictions", job)
        found = score_rows(job, encoded, "predict", console, kept, step, given.run)
        predictions = [
            {"fields": dict(row.fields)}
            | {key: value for key, value in prediction.items() if value is not None}
            for row, prediction in zip(rows, found.predictions(), strict=True)
        ]
        if given.out:
            write_lines(Path(given.out), predictions)
            console.say(f"  {given.out}: {len(predictions)} predictions")
        else:
            for prediction in predictions:
                print(strict_json.dumps(prediction, ensure_ascii=False))
        kept.remove()
    return 0


def _prompt_of(prompts: Sequence["Prompt"], part: str | None) -> "Prompt":
    """Return the one prompt of the run, or that of the part which was asked for."""
    names = [prompt.part for prompt in prompts]
    if part is None and len(prompts) > 1:
        raise UserError(
            f"the run was trained on a mixture of {', '.join(names)}: say which of them your rows "
            f"are like, by --part {names[0]}."
        )
    if part is not None and part not in names:
        known = f"has no part {part}{near(part, names)}" if names[0] else "is no mixture"
        raise UserError(f"--part {part}: the run {known}: leave it out, or give another.")
    return prompts[0 if part is None else names.index(part)]
