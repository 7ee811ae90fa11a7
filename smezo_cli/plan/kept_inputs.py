"""Reckon what ``keep_inputs`` keeps: what enters the first trained block, of each row."""

from dataclasses import dataclass
from typing import Any

from smezo_cli.errors import UserError
from smezo_cli.models.blocks import begin_at
from smezo_cli.plan import losses
from smezo_cli.plan.dry_run import DryRun

_BUDGET = 4  # a run takes one part in so many of the memory that is free; then comes a file


@dataclass(frozen=True)
class Kept:
    """Hold what a run keeps; sizes are in bytes.

    Attributes:
        first: number of the first block that is computed in a step.
        blocks: how many there are.
        token: of one token of a row.
        most: of all rows, each as long as it may be; None where their number is not known.
    """

    first: int
    blocks: int
    token: int
    most: int | None

    def in_memory(self, free: int) -> int:
        """Return how much of it is held in memory, where so much is free."""
        return min(self.most or 0, max(0, free) // _BUDGET)

    @property
    def sentence(self) -> str:
        """Return what is assumed of it."""
        where = f"steps and evaluations of dev begin at block {self.first} of {self.blocks}"
        if self.most is None:
            return (
                f"{where}; what enters it ({self.token:,} bytes a token) is not counted, as the "
                "number of rows is not known"
            )
        return f"{where}; what enters it is kept, and computed once a row (not counted in forwards)"


def kept(run: DryRun, method: Any) -> Kept | None:
    """Return what a run keeps; None where it keeps nothing.

    Raises:
        UserError: ``keep_inputs=true`` is not possible.
    """
    s = run.settings
    if s.keep_inputs is False or not method.takes_steps:
        return None
    try:
        blocks, first = begin_at(
            run.model, method.trained, s.method, asked=s.keep_inputs, mode=method.mode
        )
    except UserError:
        if s.keep_inputs is True:
            raise
        return None
    # What goes from block to block has the dtype of the weights, also where products have not.
    token = int(run.model.config.hidden_size) * int(run.dtype.itemsize)
    train, dev = losses.num_train(s), s.task["num_dev"]
    if (each := s.task.get("num_per_class")) and "classes" in s.task.get("source", {}):
        dev = each * len(s.task["source"]["classes"])
    most = None
    if train is not None and dev is not None:
        row, of_dev = (run.rows(1, n)[0] for n in (run.lengths.training, run.lengths.evaluation))
        most = token * (train * _trained(row) + dev * (of_dev.num_tokens + _of_base(of_dev)))
    return Kept(first, len(blocks.modules), token, most)


def _trained(row: Any) -> int:
    """Return the states of a row in steps: of all that shares a sequence, or of its right one."""
    return int(row.num_tokens if not row.full or row.shares_prefix else row.width)


def _of_base(row: Any) -> int:
    """Return the states of a calibrated prompt's base beside those of a row."""
    return int(row.base.num_tokens if row.base is not None else 0)
