"""Rebuild the weights of any step of a zeroth-order run: load what is saved, replay the rest."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from smezo_cli.errors import UserError
from smezo_cli.run.loaded import Loaded
from smezo_cli.store.folder import RunFolder, State
from smezo_cli.store.saved import Saved
from smezo_cli.store.trajectory import Trajectory, replay
from smezo_cli.zo.optimizer import ZeroOrder


def restore(
    method: Any, numbers: dict[str, Any], tensors: Mapping[str, Tensor], folder: RunFolder
) -> None:
    """Give a method back its own numbers and tensors.

    Raises:
        UserError: they are of another method, or damaged.
    """
    try:
        method.restore(numbers, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{folder.path}/checkpoint is damaged, or of another method; start over: "
            "if_exists=fresh."
        ) from error


def rebuild(
    loaded: Loaded,
    method: ZeroOrder,
    folder: RunFolder,
    state: State,
    records: Trajectory,
    step: int,
    say: Callable[[str], None],
    goes_on: bool = False,
) -> None:
    """Put the weights after ``step`` steps into the model and its method.

    The replay begins at the nearest good weights: those that the model holds, of step
    ``method.num_steps``, or saved ones. If the method has tensors of its own, they are loaded too,
    or replayed from the first step on. It needs no memory beside the model and one tensor.

    Args:
        loaded: holds the model.
        method: that moves its weights.
        folder: of the run.
        state: of the run.
        records: its steps.
        step: how many of them.
        say: receives what is damaged.
        goes_on: whether steps follow, for which saved weights need the method's own tensors.

    Raises:
        UserError: nothing good is left before that step, or the records end before it.
    """
    if step > len(records):
        raise UserError(
            f"{folder.path}/trajectory.bin holds {len(records)} good steps, not {step}: the "
            "command that trained the run mends it."
        )
    saved = _nearest(method, folder, state, step, say, goes_on)
    if saved is not None and not saved[0] <= method.num_steps <= step:
        loaded.set_weights(saved[1], folder.path)
        numbers = saved[1].about.get("method")
        numbers = numbers if isinstance(numbers, dict) else {}
        restore(method, numbers | {"num_steps": saved[0]}, saved[2], folder)
    if method.num_steps > step:
        raise UserError(
            f"{folder.path}/checkpoint has no good weights up to step {step} any more: give the "
            "same command again, which makes them from the base model."
        )
    replay(method, records, step)


def _nearest(
    method: ZeroOrder,
    folder: RunFolder,
    state: State,
    step: int,
    say: Callable[[str], None],
    goes_on: bool,
) -> tuple[int, Saved, Mapping[str, Tensor]] | None:
    """Return the last good weights up to a step from which the method can be replayed to it."""
    last: int = step
    while (found := folder.nearest(state, last, say)) is not None:
        at, weights = found
        if not method.keeps_state or at == 0 or (at == step and not goes_on):
            return at, weights, {}
        try:
            if tensors := folder.load_optimizer(state, at):
                return at, weights, tensors
        except UserError:
            say(f"  checkpoint/optimizer-{at}.safetensors is damaged: its steps are applied again")
        last = at - 1
    return None
