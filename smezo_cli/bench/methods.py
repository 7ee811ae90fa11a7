"""Make a step of any method of conf/method/ that compares losses, to be timed."""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from smezo_cli.config.build import build
from smezo_cli.config.compose import compose
from smezo_cli.config.fixed import CONF_DIR, load_yaml, plain
from smezo_cli.config.method_keys import trait
from smezo_cli.models.adapter import attach
from smezo_cli.scoring.by_row import by_row
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.step import RowForward

_LORA = ("lora", "lora_fa")

#: Queries of a step that is timed, at most: the step and the forwards that it is compared with have
#: so many. A step of more would have another ratio, as what it does once weighs less there.
MOST_QUERIES = 16


class Losses:
    """Return the loss of some rows, under whatever name a method asks for it."""

    def __init__(self, scorer: Scorer, rows: Sequence[Candidates]) -> None:
        self._scorer, self._rows = scorer, rows

    def __call__(self) -> Tensor:
        return self._scorer.loss(self._rows)

    @property
    def num_rows(self) -> int:
        """See :class:`smezo_cli.zo.step.ByRow`."""
        return len(self._rows)

    def by_row(self) -> list[RowForward]:
        """See :class:`smezo_cli.zo.step.ByRow`: of a task of one kind, whose loss is of rows."""
        return by_row(self._scorer, self._rows)

    def of(self, objective: str) -> "Losses":
        """See :class:`smezo_cli.zo.step.WithObjectives`: the same rows."""
        return self


def timed(name: str) -> bool:
    """Return whether steps of a method of conf/method/ can be timed on any model."""
    file = load_yaml(CONF_DIR / "method" / f"{name}.yaml")
    node = file.get("method", {})
    adapter = node.get("adapter", {"kind": "lora"})
    if "optimizer" in node or adapter["kind"] not in _LORA or "config" in adapter:
        return False
    if "_target_" not in node:  # it has the class of the method that it begins with
        return any(timed(base) for base in file.get("defaults", ()) if base != "_self_")
    target = {"_target_": node["_target_"]}
    needs_mask = trait(target, "needs_mask", default=False)  # and would move all weights without
    if "adapter" in node and not trait(target, "measures_pairs", default=True):
        return False  # hundreds of losses, on an adapter of its own size
    return trait(target, "compares_losses", default=False) and not needs_mask


def on_lora(name: str) -> bool:
    """Return whether a method trains low-rank matrices, in a copy of the model."""
    return "adapter" in node_of(name.partition("@")[0])


@functools.cache
def node_of(name: str) -> Mapping[str, Any]:
    """Return the settings of a method as its YAML has them."""
    words = [f"method={name}", "model=tiny-llama", "task=toy"]  # of no recipe
    node: Mapping[str, Any] = plain(compose(words))["method"]
    return node


def beside_lora(scorer: Scorer, node: Mapping[str, Any]) -> Scorer:
    """Return a scorer of a copy of the model that shares its weights and has an adapter.

    Raises:
        UserError: the adapter does not fit the model.
    """
    shared = {id(p): nn.Parameter(p.detach(), False) for p in scorer.model.parameters()}
    model: Any = copy.deepcopy(scorer.model, shared)
    attach(model, node, seed=0)
    return Scorer(model, scorer.tokenizer, scorer.compute_dtype)


@functools.cache
def names() -> tuple[str, ...]:
    """Return the methods of conf/method/ whose steps can be timed."""
    files = sorted((CONF_DIR / "method").glob("*.yaml"))
    return tuple(file.stem for file in files if timed(file.stem))


def step_of(
    name: str, scorer: Scorer, rows: Sequence[Candidates], lr: float, eps: float
) -> tuple[ZeroOrder, Losses]:
    """Return a method with its YAML's values, but these step sizes, and the loss of its steps.

    A method that changes the layers of the model gets a copy of it; one of very many queries makes
    :data:`MOST_QUERIES`.

    Args:
        name: of a method; behind an @ the executor that it is to have.
        scorer: of the model.
        rows: of each loss.
        lr: step size.
        eps: radius of the probe.
    """
    name, _, executor = name.partition("@")
    node = node_of(name)
    if "adapter" in node:
        scorer = beside_lora(scorer, node["adapter"])
    model: nn.Module = scorer.model
    if trait(node, "holds_codes", default=False):
        own = copy.deepcopy(scorer.model)
        scorer = Scorer(own, scorer.tokenizer, scorer.compute_dtype)
        model = own
    # tail_lr: of what a method trains by backpropagation; lr_1d: of tensors of one dimension.
    rates = {key: lr for key in ("lr", "tail_lr", "lr_1d") if key in node}
    values = {**node, **rates, "eps": eps}
    values = {key: value for key, value in values.items() if key != "adapter"}
    values |= {"num_rows": len(rows)} if "num_rows" in node else {}
    if values.get("num_queries", 1) > MOST_QUERIES:
        values["num_queries"] = MOST_QUERIES
    values |= {"executor": executor} if executor else {}
    # As a run with the default settings, whose self-check is no part of a step.
    method: ZeroOrder = build(values, "method", model=model, seed=0, check=False)
    return method, Losses(scorer, rows)
