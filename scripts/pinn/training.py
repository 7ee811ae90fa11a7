"""Train a network on an equation, by losses alone or, to compare, by backpropagation."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pinn.derivatives import Stencil, central_differences, stein
from pinn.network import Network
from pinn.problems import PROBLEMS, uniform
from pinn.settings import Settings
from smezo_cli.zo.directions.dense import Dense
from smezo_cli.zo.estimators.two_sided import TwoSided
from smezo_cli.zo.move import Gradient
from smezo_cli.zo.optimizer import ZeroOrder
from smezo_cli.zo.schedule import lr_factor
from smezo_cli.zo.selections.masked import Everything
from smezo_cli.zo.step import NonFiniteLoss
from smezo_cli.zo.updates.adam import Adam
from smezo_cli.zo.updates.base import Update, WeightWriter
from smezo_cli.zo.updates.sgd import SGD

DERIVATIVES: dict[str, Callable[[int, float], Stencil]] = {
    "stein": stein,
    "differences": central_differences,
}


class Sign(Update):
    """theta <- theta - lr sign(g), each weight by itself; g is the estimate from all queries."""

    def apply(self, weights: WeightWriter, gradient: Gradient, lr: float) -> None:
        """See :class:`Update`."""
        decay = lr * weights.weight_decay
        weights.elementwise(gradient, lambda g: g.sign().mul_(-lr), decay)

    def identity(self) -> dict[str, Any]:
        """See :class:`Update`."""
        return {"update": "sign"}


UPDATES: dict[str, Callable[[], Update]] = {
    "sign": Sign,
    "sgd": SGD,
    "adam": lambda: Adam((0.9, 0.99), 1e-8),
}
OPTIMIZERS = (*UPDATES, "backprop")


def stencil_of(settings: Settings) -> Stencil:
    """Return what a training takes derivatives by."""
    inputs = PROBLEMS[settings.problem].inputs
    return DERIVATIVES[settings.derivatives](inputs, settings.width).float()


@dataclass
class Trained:
    """A trained network and how it came about.

    Attributes:
        errors: (step, relative l2 error) along the training; the first before it; the last infinite
            where a loss was not finite, and the training ended.
        forwards: how often the loss was computed; with backpropagation, forward and backward.
    """

    settings: Settings
    network: nn.Module
    num_weights: int
    forwards: int = 0
    seconds: float = 0.0
    errors: list[tuple[int, float]] = field(default_factory=list)

    @property
    def error(self) -> float:
        """The relative l2 error after the last step."""
        return self.errors[-1][1]

    @torch.no_grad()
    def found(self, points: Tensor) -> Tensor:
        """Return the solution (n,) as the network has it at points (n, D)."""
        problem = PROBLEMS[self.settings.problem]
        return problem.found(self.network, stencil_of(self.settings), points)

    def measure(self, step: int) -> None:
        """Note |found - exact| / |exact| over 2,000 points, the same for every training."""
        problem = PROBLEMS[self.settings.problem]
        at = uniform(2000, problem.inputs, 0, "test points")
        exact = problem.exact(at)
        self.errors.append((step, float((self.found(at) - exact).norm() / exact.norm())))


def train(settings: Settings, evaluations: int = 20) -> Trained:
    """Train a network; its error is measured so many times along the way."""
    problem, stencil = PROBLEMS[settings.problem], stencil_of(settings)
    rank = settings.rank if settings.network == "tt" else None
    network = Network(problem.inputs, rank=rank, seed=settings.seed)
    step, forwards = _stepper(settings, network)
    trained = Trained(settings, network, sum(p.numel() for p in network.parameters()))
    trained.measure(0)
    every = max(1, settings.steps // evaluations)
    start = time.process_time()
    for number in range(settings.steps):
        loss = problem.loss(stencil, settings.seed, number)
        try:
            step(partial(loss, network), lr_factor("cosine", number, settings.steps))
        except NonFiniteLoss:
            trained.errors.append((number + 1, math.inf))
            break
        if (number + 1) % every == 0 or number + 1 == settings.steps:
            trained.seconds += time.process_time() - start
            trained.measure(number + 1)
            start = time.process_time()
    trained.forwards = forwards * settings.steps
    return trained


def _stepper(
    settings: Settings, network: nn.Module
) -> tuple[Callable[[Callable[[], Tensor], float], None], int]:
    """Return what makes a step, of a loss and a factor of the lr; and its forwards."""
    if settings.optimizer == "backprop":
        adam = torch.optim.Adam(network.parameters(), lr=settings.lr)

        def backprop(loss: Callable[[], Tensor], factor: float) -> None:
            adam.param_groups[0]["lr"] = factor * settings.lr
            adam.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]  # untyped in torch
            adam.step()

        return backprop, 1
    method = ZeroOrder(
        network,
        selection=Everything(),
        direction=Dense("rademacher"),
        estimator=TwoSided(settings.queries),
        update=UPDATES[settings.optimizer](),
        lr=settings.lr,
        eps=settings.eps,
        seed=settings.seed,
        executor="sequential",
        backend="compiled" if settings.steps > 100 else "eager",  # the numbers are the same
    )

    def zeroth_order(loss: Callable[[], Tensor], factor: float) -> None:
        method.set_lr_factor(factor)
        method.step(loss)

    return zeroth_order, 2 * settings.queries
