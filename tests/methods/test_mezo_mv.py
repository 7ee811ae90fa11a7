"""MEAZO: thirty steps of a reference, and the one number that it keeps."""

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from smezo_cli.methods.mezo_mv import MEAZO
from tests.methods.reference import loss64, weights64, z_of
from tests.zo.test_optimizer import closure_of, mlp, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def mezo_mv(model: nn.Module, **more: Any) -> MEAZO:
    given: dict[str, Any] = {"lr": 5e-3, "eps": 1e-3, "backend": "eager", "check": False}
    given |= {"executor": "sequential"}
    return MEAZO(model, **given | more)


@pytest.mark.parametrize(
    ("queries", "beta", "decay", "clip"), [(1, 0.9, 0.0, math.inf), (3, 0.99, 0.1, 0.5)]
)
def test_thirty_steps_are_those_of_the_rule(
    queries: int, beta: float, decay: float, clip: float
) -> None:
    """Within 5e-4: float32 weights leave 1e-4 of rounding in p at eps 1e-3, relative to root v."""
    model = mlp()
    given = {} if clip == math.inf else {"clip_projected_grad": clip}
    opt = mezo_mv(model, num_queries=queries, beta=beta, weight_decay=decay, **given)
    theta, lr, eps, v = weights64(mlp()), 5e-3, 1e-3, 0.0
    cut = 0
    for step in range(30):
        z, p = [z_of(theta, step, q) for q in range(queries)], []
        for u in z:
            plus, minus = ({n: x + s * eps * u[n] for n, x in theta.items()} for s in (1, -1))
            p.append(max(-clip, min((loss64(plus) - loss64(minus)) / (2 * eps), clip)))
        v = beta * v + (1 - beta) * (sum(p) / queries) ** 2
        root = (v / (1 - beta ** (step + 1))) ** 0.5 + 1e-8
        g = {n: sum(a * u[n] for a, u in zip(p, z, strict=True)) / queries for n in theta}
        theta = {n: x - lr * (g[n] / root + decay * x) for n, x in theta.items()}
        cut += opt.step(closure_of(model)).clipped
        assert opt.snapshot()[0]["state"]["v"] == pytest.approx(v, rel=1e-2)
    assert (cut > 0) == (clip < math.inf)
    start = weights64(mlp())
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, theta[name], atol=5e-4, rtol=0)
        assert (x - start[name]).abs().max() > 0.01


def test_the_first_step_is_lr_long_and_a_flat_loss_moves_nothing() -> None:
    model = mlp()
    opt, before = mezo_mv(model, lr=1e-3, noise="rademacher"), weights64(model)
    opt.step(closure_of(model))
    for name, x in weights64(model).items():
        torch.testing.assert_close(
            (x - before[name]).abs(), torch.full_like(x, 1e-3), atol=1e-6, rtol=0
        )
    flat = mlp()
    opt, kept = mezo_mv(flat), weights_of(flat)
    opt.step(lambda: torch.ones(()).double())
    assert opt.snapshot()[0]["state"] == {"v": 0.0}
    assert same(weights_of(flat), kept)


def test_the_number_is_plain_json_and_the_next_step_hangs_on_it() -> None:
    model = mlp()
    opt = mezo_mv(model)
    for _ in range(3):
        opt.step(closure_of(model))
    kept = json.loads(json.dumps(opt.snapshot()[0]))
    assert not opt.snapshot()[1]
    assert opt.state_bytes == 0
    there = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt.step(closure_of(model))
    found = []
    for v in (kept["state"]["v"], 100 * kept["state"]["v"]):
        again = mlp()
        again.load_state_dict(there)
        resumed = mezo_mv(again)
        resumed.restore(kept | {"state": {"v": v}}, {})
        resumed.step(closure_of(again))
        found.append(weights_of(again))
    assert same(found[0], weights_of(model))
    assert not same(found[1], weights_of(model))
