"""Count the losses that the steps of a method ask for, and the rows and tokens of each."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smezo_cli.config.settings import Settings
from smezo_cli.errors import UserError

_COUNTED = 1_000_000  # steps whose forwards are asked for one by one

_ASKED = 20_000  # steps whose losses are asked for one by one


@dataclass(frozen=True)
class Rows:
    """Describe the rows that one loss of a step is over.

    Attributes:
        number: how many; None: it depends on the number of train rows, which is not known.
        tokens: of the longest that it may have.
    """

    number: int | None
    tokens: int


class Counting:
    """Answer an estimator with equal losses, and count the forwards that it asks for.

    Args:
        step: number of the step.
        eps: radius of the probes.
    """

    def __init__(self, step: int, eps: float) -> None:
        self.step, self.eps = step, eps
        #: by the name of the loss
        self.forwards = Counter[str]()

    def losses(
        self, groups: Sequence[Sequence[Any]], objective: str = "batch"
    ) -> list[list[float]]:
        """See :class:`smezo_cli.zo.estimators.base.Ask`."""
        self.forwards[objective] += sum(map(len, groups))
        return [[0.0] * len(group) for group in groups]

    def two_sided(
        self, keys: Sequence[Any], objective: str = "batch", base: str = ""
    ) -> list[float]:
        """See :class:`smezo_cli.zo.estimators.base.Ask`."""
        self.forwards[objective] += 2 * len(keys)
        return [0.0] * len(keys)

    def derivatives(self, keys: Sequence[Any]) -> list[float]:
        """See :class:`smezo_cli.zo.estimators.base.Ask`."""
        self.forwards["batch"] += len(keys)
        return [0.0] * len(keys)


def forwards_of_training(method: Any, steps: int) -> int:
    """Return how many forwards so many steps make; of very many, the last as often as the rest."""
    if not method.takes_steps:
        return 0
    if not method.compares_losses:
        return steps
    forwards, counted = method.forwards, min(steps, _COUNTED)
    return int(sum(map(forwards, range(counted))) + (steps - counted) * forwards(steps - 1))


def chooses_rows(method: Any) -> bool:
    """Return whether steps ask for losses over other rows than those of the batch."""
    return set(getattr(method, "objectives", ("batch",))) != {"batch"}


def forwards_by_loss(method: Any, steps: int) -> Mapping[str, int]:
    """Return the forwards of so many steps by the loss that they compute.

    Of very many steps the rest are like the mean of those that are asked.
    """
    if not chooses_rows(method):
        return {"batch": forwards_of_training(method, steps)}
    found, counted = Counter[str](), min(steps, _ASKED)
    for step in range(counted):
        found += _forwards_of_step(method, step)
    return {name: round(number * steps / counted) for name, number in found.items()}


def _forwards_of_step(method: Any, step: int) -> Counter[str]:
    group = method.param_groups[0]
    ask = Counting(step, group["eps"])
    scalars = method.estimator.measure(ask)
    if method.step_size is not None:
        gradient = method.estimator.read(scalars, step)
        method.step_size.measure(ask, gradient, group["lr"], group["lr"] * group["weight_decay"])
    if method.phase is not None:
        ask.forwards["batch"] += method.phase.forwards(step)
    if method.tail is not None:
        ask.forwards[method.tail.objective] += 1
    return ask.forwards


def rows_of(method: Any, objective: str, settings: Settings, longest: int) -> Rows:
    """Return the rows of a loss of a step.

    Args:
        method: asks for it.
        objective: its name.
        settings: of the run.
        longest: tokens of the longest train row.

    Raises:
        UserError: no row, however long, is among them.
    """
    if objective == "batch":
        return Rows(settings.batch_size, longest)
    known = num_train(settings)
    # Rows of a run are of many lengths; these are all of one, the longest that is taken.
    count = known or settings.batch_size
    tokens, number = _longest_taken(method, objective, settings.batch_size, count, longest)
    if (
        known is None
        and _number(method, objective, settings.batch_size, 2 * count, tokens) != number
    ):
        return Rows(None, tokens)
    return Rows(number, tokens)


def rows_and_tokens(method: Any, settings: Settings, longest: int) -> tuple[int, int] | None:
    """Return the rows in all forwards of the training, and their tokens at most.

    None where that depends on the number of train rows, which is not known.
    """
    rows = tokens = 0
    for objective, forwards in forwards_by_loss(method, settings.steps).items():
        own = rows_of(method, objective, settings, longest)
        if own.number is None:
            return None
        rows += forwards * own.number
        tokens += forwards * own.number * own.tokens
    return rows, tokens


def sentence(method: Any, settings: Settings, longest: int) -> str:
    """Return what a forward is and which losses there are; "" where all are of the batch."""
    if not chooses_rows(method):
        return ""
    words = []
    for objective, forwards in sorted(forwards_by_loss(method, settings.steps).items()):
        number = rows_of(method, objective, settings, longest).number
        of = f"{number} rows" if number is not None else "all train rows (task.num_train is null)"
        words.append(f"{forwards} for the loss {objective} of {of}")
    return (
        "a forward is a pass over all rows of one loss, as num_forwards of result.json counts: "
        f"{', '.join(words)}"
    )


def _longest_taken(
    method: Any, objective: str, batch_size: int, count: int, longest: int
) -> tuple[int, int]:
    """Return the tokens of the longest rows that a loss takes, and how many it takes of them."""
    for tokens in range(longest, 0, -1):
        try:
            return tokens, _number(method, objective, batch_size, count, tokens)
        except UserError:  # rows so long do not belong to it
            continue
    raise UserError(
        f"no row of at most {longest} tokens (--tokens, task.max_train_tokens, model.max_length) "
        f"belongs to the loss {objective!r} of the method: plan with longer rows, or change the "
        "method's keys, such as method.long_above=0."
    )


def _number(method: Any, objective: str, batch_size: int, count: int, tokens: int) -> int:
    batch = [i % count for i in range(batch_size)]
    return len(method.rows_of(objective, 0, batch, [tokens] * count))


def num_train(settings: Settings) -> int | None:
    """Return how many train rows the settings name; None: they leave that to the data."""
    task = settings.task
    if "nodes" in task:
        parts = [_num_train(node) for node in task["nodes"].values()]
        return None if None in parts else sum(number for number in parts if number)
    return _num_train(task)


def _num_train(task: Mapping[str, Any]) -> int | None:
    if (each := task.get("num_per_class")) and "classes" in task.get("source", {}):
        return int(each * len(task["source"]["classes"]))
    number = task["num_train"]
    return None if number is None else int(number)
