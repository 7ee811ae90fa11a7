"""What a training is made of, and the values that each problem, network and optimizer takes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

NETWORKS = ("tt", "dense")


@dataclass(frozen=True)
class Settings:
    """What one training is made of.

    Attributes:
        problem: a key of ``problems.PROBLEMS``.
        network: "tt" or "dense", the form of its hidden matrix.
        derivatives: a key of ``training.DERIVATIVES``.
        optimizer: one of ``training.OPTIMIZERS``.
        seed: of the initial weights, the points and the directions.
        steps: how many updates; the lr falls as a cosine.
        queries: directions a step, each with two losses.
        lr: of the first step.
        eps: radius of the zeroth-order probes.
        width: of the derivatives' stencil, in scaled inputs: sigma, or the step of a difference.
        rank: of the tensor trains.
    """

    problem: str
    network: str
    derivatives: str
    optimizer: str
    seed: int = 0
    steps: int = 2400
    queries: int = 4
    lr: float = 1e-3
    eps: float = 1e-2
    width: float = 0.05
    rank: int = 4


# From short searches over one to four values each with seed 100, which no table shows.
RECIPES: Mapping[tuple[str, ...], Mapping[str, Any]] = {
    ("black-scholes", "sign"): {"lr": 3e-3},
    ("heat", "sign"): {"lr": 5e-3},
    ("black-scholes", "sgd"): {"lr": 1e-3},
    ("heat", "sgd"): {"lr": 5e-3},
    ("black-scholes", "adam"): {"lr": 5e-3},
    ("heat", "adam"): {"lr": 5e-3},
    ("backprop",): {"lr": 1e-2},
}


def recipe(problem: str, network: str, derivatives: str, optimizer: str) -> Settings:
    """Return the settings of a training: the defaults, and the recipe whose names are all its."""
    settings = Settings(problem, network, derivatives, optimizer)
    for names, values in RECIPES.items():
        if {problem, network, derivatives, optimizer} >= set(names):
            settings = replace(settings, **values)
    return settings
