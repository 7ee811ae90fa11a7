"""Check on rows of the run that probes reach all that the model reads, before it counts."""

import json
import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager

from smezo_cli.errors import UserError
from smezo_cli.machine.out_of_memory import SHORTER, refusing_out_of_memory
from smezo_cli.machine.waiting import waiting
from smezo_cli.methods.base import Method
from smezo_cli.run.begin import Run
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.measure import Batch
from smezo_cli.run.rows import short_enough
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.parts import of_one_part
from smezo_cli.zo.reached import Unreached
from smezo_cli.zo.step import NonFiniteLoss

_ENCODED = 64  # training rows, for two that are short enough


def check_early(run: Run, loaded: Loaded, method: Method) -> bool:
    """Check with two training rows before the prompt is chosen, as scoring takes its time.

    Returns:
        False where losses of the model as it came are not finite, which its scores will say with
        the row; then :func:`check` is to follow.

    Raises:
        UserError: probes cannot reach some weights.
    """
    prompt = loaded.prompt(run.notes.get("prompt", 0))
    some = loaded.encode(of_one_part(loaded.task.train)[:_ENCODED], prompt)
    rows = short_enough(some, loaded) or some
    try:
        check(run, loaded, method, rows)
    except NonFiniteLoss:
        return False
    return True


def check(run: Run, loaded: Loaded, method: Method, rows: Sequence[Candidates]) -> None:
    """Check with the first two of some rows (of a mixture of one part), at any weights of the run.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite.
        UserError: probes cannot reach some weights; or the memory is too small.
    """
    two = of_one_part(rows)[:2]
    loaded.scorer.model.eval()
    try:
        with waiting("the self-check"), refusing():
            checked = method.self_check(Batch(loaded.scorer, two, "loss", None))
    except ValueError as error:
        raise _unreached(run, error) from error
    if checked:
        kinds = "kind" if checked == 1 else "kinds"
        run.say(f"  self-check: {checked} {kinds} of parameters probed exactly")


def check_reads(run: Run, method: Method, loaded: Loaded, rows: Sequence[Candidates]) -> None:
    """Ask with rows of dev, too: a model may take another path at other rows.

    Raises:
        UserError: probes cannot reach some weights.
    """
    check = getattr(method, "check_reads", None)
    if check is None:
        return
    loaded.scorer.model.eval()
    try:
        with refusing():
            check(lambda: loaded.scorer.loss(rows))
    except ValueError as error:
        raise _unreached(run, error) from error


def refusing() -> AbstractContextManager[None]:
    """Raise UserError where the memory is too small for a self-check inside the context."""
    return refusing_out_of_memory("for the self-check, a forward over two rows", SHORTER)


def _unreached(run: Run, error: ValueError) -> UserError:
    """Return the error of a self-check that fails, with the words that let the run go."""
    if not isinstance(error, Unreached):
        return UserError(f"method: {error}.")
    globs = [*run.settings.method["freeze"], *error.globs]
    word = f"method.freeze=[{','.join(json.dumps(glob) for glob in globs)}]"
    return UserError(
        f"method: {error.what}freeze them by {shlex.quote(word)}, or use method.executor=in_place."
    )
