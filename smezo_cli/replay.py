"""Weights of any step of a zeroth-order run: from what is saved, the rest replayed."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from smezo_cli.errors import UserError
from smezo_cli.job import Job
from smezo_cli.runs import RunFolder, State
from smezo_cli.trajectory import Trajectory, replay
from smezo_cli.zo import ZeroOrder


def restore(
    method: Any, numbers: dict[str, Any], tensors: dict[str, Tensor], folder: RunFolder
) -> None:
    """Give a method its own numbers and tensors back.

    Raises:
        UserError: they are of another method, or no run has written them.
    """
    try:
        method.restore(numbers, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{folder.path}/checkpoint is damaged, or of another method; start over: "
            "if_exists=fresh."
        ) from error


def rebuild(
    job: Job,
    method: ZeroOrder,
    folder: RunFolder,
    state: State,
    records: Trajectory,
    step: int,
    say: Callable[[str], None],
) -> None:
    """Put the weights after ``step`` steps into the model and its method.

    They begin at the nearest that is good: what the model holds (``method.num_steps`` steps after
    the base), or what is saved. Needs no memory beside the model and one tensor.

    Raises:
        UserError: nothing good is left before that step, or the records end before it.
    """
    if step > len(records):
        raise UserError(
            f"{folder.path}/trajectory.bin holds {len(records)} good steps, not {step}: the "
            "command that trained the run mends it."
        )
    saved = folder.nearest(state, step, say)
    if saved is not None and not saved[0] <= method.num_steps <= step:
        job.set_weights(saved[1], folder.path)
        numbers = saved[1].about.get("method")
        numbers = numbers if isinstance(numbers, dict) else {}
        restore(method, numbers | {"num_steps": saved[0]}, {}, folder)
    if method.num_steps > step:
        raise UserError(
            f"{folder.path}/checkpoint has no good weights up to step {step} any more: give the "
            "same command again, which makes them from the base model."
        )
    replay(method, records, step)
