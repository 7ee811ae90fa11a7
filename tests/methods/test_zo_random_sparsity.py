"""Random gradient sparsity: what the YAML makes of Sparse-MeZO, and a reference of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.config.build import build
from smezo_cli.config.compose import compose
from smezo_cli.config.fixed import plain
from smezo_cli.zo.noise import draw, stream_key, uniform_at
from smezo_cli.zo.optimizer import ZeroOrder
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import closure_of, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model: nn.Module, *words: str, **more: Any) -> ZeroOrder:
    """The method as the command line gives it, for a small network."""
    line = ["method=zo_random_sparsity", "model=tiny-llama", "task=toy", "device=cpu", *words]
    node = dict(plain(compose(line))["method"])
    node.pop("seed", None)
    node |= {"lr": 1e-2, "executor": "sequential"} | more
    found: ZeroOrder = build(node, model=model, seed=0, backend="eager", check=False)
    return found


def masks_of(weights: dict[str, Tensor], step: int, sparsity: float) -> dict[str, Tensor]:
    """Which entries a step perturbs: those whose keyed uniform is below 1 - sparsity."""
    found = {}
    for name, x in weights.items():
        key = torch.tensor(stream_key(0, "mask", step, name))
        uniform = uniform_at(torch.arange(x.numel()), x.numel(), key)
        found[name] = (uniform < 1 - sparsity).view(x.shape)
    return found


def reference(sparsity: float, decay: float) -> dict[str, Tensor]:
    """Thirty steps in float64, each with a mask of its own, the same in probe and update."""
    theta, lr, eps = weights64(mlp()), 1e-2, 1e-3
    for step in range(30):
        m, z = masks_of(theta, step, sparsity), z_of(theta, step)
        points = [{n: x + s * eps * m[n] * z[n] for n, x in theta.items()} for s in (1, -1)]
        plus, minus = map(loss64, points)
        p = (plus - minus) / (2 * eps)
        theta = {n: x - lr * m[n] * (p * z[n] + decay * x) for n, x in theta.items()}
    return theta


@pytest.mark.parametrize(
    ("words", "sparsity", "decay"), [([], 0.2, 0.0), (["sparsity=0.7"], 0.7, 0.3)]
)
def test_thirty_steps_are_those_of_the_reference(
    words: list[str], sparsity: float, decay: float
) -> None:
    """Within 2e-4: eps 1e-3 makes 1e-4 of the rounding of float32 weights in p."""
    model = mlp()
    opt = made(model, *words, weight_decay=decay)
    for _ in range(30):
        opt.step(closure_of(model))
    expected = reference(sparsity, decay)
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, expected[name], atol=2e-4, rtol=0)


def test_the_sparsity_is_the_share_that_rests_and_other_weights_rest_in_each_step() -> None:
    """Of 30,000 weights: 0.2 to 5 sigma. The released code's 0.2 leaves out 0.58."""
    model = nn.Linear(300, 100, bias=False)
    opt = made(model)
    moved = []
    for _ in range(2):
        before = model.weight.detach().clone()
        opt.step(lambda: model(torch.ones(300)).double().sum())
        moved.append(model.weight.detach() != before)
    for mask in moved:
        assert 1 - mask.double().mean().item() == pytest.approx(0.2, abs=5 * 0.4 / 30_000**0.5)
    # Two independent masks differ in 2 0.2 0.8 of the places.
    assert (moved[0] ^ moved[1]).double().mean().item() == pytest.approx(0.32, abs=0.014)


def test_the_mean_of_the_estimate_is_the_gradient_times_what_is_perturbed() -> None:
    """On a quadratic p = (m z) . g exactly. Over 20,000 steps at sparsity 0.2: 0.8 g.

    An entry has variance of at most |g|^2 + g_i^2, here 6.5: 5 sigma of the mean are 0.09.
    """
    g = torch.tensor([0.5, -1.5, 1.0], dtype=torch.float64)
    keys = [
        [stream_key(0, what, step, *more, "w") for step in range(20_000)]
        for what, more in (("z", (0,)), ("mask", ()))
    ]
    of_z, of_mask = (torch.tensor(found).T[:, :, None] for found in keys)
    z = draw(torch.arange(3), 3, of_z, "gaussian").double()
    z *= uniform_at(torch.arange(3), 3, of_mask) < 0.8
    estimate = (z * g).sum(1, keepdim=True) * z
    torch.testing.assert_close(estimate.mean(0), 0.8 * g, atol=0.09, rtol=0)
