"""The network of tests/zo/test_optimizer.py in float64, for references written from papers."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from smezo_cli.zo.noise import draw, stream_key
from tests.zo.test_optimizer import X, Y, mlp

_NET = mlp().double()


def weights64(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters in float64, by name."""
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def loss64(weights: dict[str, Tensor]) -> float:
    """Return the loss of ``closure_of(mlp())`` at these weights, all in float64."""
    with torch.no_grad():
        return float((functional_call(_NET, weights, X.double()) - Y).square().mean())


def z_of(
    weights: dict[str, Tensor],
    step: int,
    query: int = 0,
    *,
    seed: int = 0,
    purpose: str = "z",
    noise: str = "gaussian",
) -> dict[str, Tensor]:
    """Return the noise that smezo draws for each tensor, in float64."""
    found = {}
    for name, x in weights.items():
        key = torch.tensor(stream_key(seed, purpose, step, query, name))
        z = draw(torch.arange(x.numel()), x.numel(), key, noise)
        found[name] = z.double().view(x.shape)
    return found
