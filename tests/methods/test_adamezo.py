"""AdaMeZO against a stateful Adam of truncated sums, and against Adam itself."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.adamezo import AdaMeZO
from smezo_cli.methods.mezo_adam import MeZOAdam
from tests.methods.reference import loss64, weights64, z_of
from tests.methods.test_every_method import node_of
from tests.zo.test_optimizer import closure_of, mlp, run, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def given(**more: Any) -> Any:
    common = {"lr": 1e-3, "eps": 1e-3, "backend": "eager", "executor": "sequential", "check": False}
    return common | more


def reference(
    steps: int, horizon: int, betas: tuple[float, float], queries: int, adam_eps: float
) -> dict[str, Tensor]:
    """Adam that keeps the gradients of the last steps as tensors, in float64."""
    theta = weights64(mlp())
    last: list[dict[str, Tensor]] = []
    for t in range(steps):
        g = {n: torch.zeros_like(x) for n, x in theta.items()}
        for q in range(queries):
            z = z_of(theta, t, q)
            plus, minus = (loss64({n: theta[n] + s * 1e-3 * z[n] for n in theta}) for s in (1, -1))
            g = {n: g[n] + (plus - minus) / 2e-3 / queries * z[n] for n in theta}
        last = [g, *last][:horizon]
        total = [sum(beta**i for i in range(len(last))) for beta in betas]
        for n in theta:
            m = sum(betas[0] ** i * x[n] for i, x in enumerate(last)) / total[0]
            v = sum(betas[1] ** i * x[n] ** 2 for i, x in enumerate(last)) / total[1]
            theta[n] = theta[n] - 1e-3 * m / (v**0.5 + adam_eps)
    return theta


@pytest.mark.parametrize(
    ("horizon", "queries", "backend"),
    [(4, 1, "eager"), (1, 1, "eager"), (3, 2, "eager"), (3, 2, "compiled")],
)
def test_thirty_steps_are_those_of_truncated_sums(horizon: int, queries: int, backend: str) -> None:
    """Within 2e-4: some entries of sqrt(v) are small, and p is known to 1e-4 of its size."""
    model = mlp()
    start, more = weights64(model), {"horizon": horizon, "num_queries": queries}
    opt = AdaMeZO(model, **given(betas=(0.7, 0.9), adam_eps=1e-3, backend=backend, **more))
    run(opt, closure_of(model), 30)
    expected = reference(30, horizon, (0.7, 0.9), queries, 1e-3)
    for name, found in weights64(model).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-4)
        assert (expected[name] - start[name]).abs().max() > 5e-3


@pytest.mark.parametrize("queries", [1, 3])
def test_of_all_steps_it_is_adam(queries: int) -> None:
    """To 5e-5 after 6 steps: the moments are added up in another order, in float32."""
    a, b = mlp(), mlp()
    more: Any = given(betas=(0.7, 0.9), num_queries=queries, adam_eps=1e-3)
    run(AdaMeZO(a, horizon=6, **more), closure_of(a), 6)
    run(MeZOAdam(b, **more), closure_of(b), 6)
    for x, y in _pairs(a, b):
        torch.testing.assert_close(x, y, rtol=0, atol=5e-5)
    assert all((x - y).abs().max() > 1e-3 for x, y in _pairs(a, mlp()))
    short = mlp()
    run(AdaMeZO(short, horizon=5, **more), closure_of(short), 6)
    assert max(float((x - y).abs().max()) for x, y in _pairs(a, short)) > 1e-5


def _pairs(a: nn.Module, b: nn.Module) -> Any:
    return zip(weights64(a).values(), weights64(b).values(), strict=True)


def test_the_default_step_is_that_of_the_released_code_once_its_window_is_full() -> None:
    """lr 1e-7 times 100 times the quotient of both sums, without correction, with 1e-5 below.

    Within 1e-3: 1.27 has three digits, and 1e-5 stands beside roots of some 10.
    """
    node = node_of("adamezo")
    betas, horizon = node["betas"], node["horizon"]
    model = mlp()
    opt = AdaMeZO(model, **given(lr=node["lr"], betas=betas, horizon=horizon))
    slopes = [5.0, -3.0, 4.0, 6.0, -5.0, 7.0, -4.0, 3.0, 5.0, -6.0, 4.0, -5.0]
    for slope in slopes[:-1]:
        opt.replay(node["lr"], [slope])
    before = weights64(model)
    opt.replay(node["lr"], [slopes[-1]])
    last = range(len(slopes) - 1, len(slopes) - 1 - horizon, -1)
    for name, x in weights64(model).items():
        g = [slopes[t] * z_of(before, t)[name] for t in last]
        m = sum(betas[0] ** i * x for i, x in enumerate(g))
        v = sum(betas[1] ** i * x**2 for i, x in enumerate(g))
        wanted = -1e-7 * 100 * m / (v**0.5 + 1e-5)
        # Weights of some 1 are stored to 6e-8.
        torch.testing.assert_close(x - before[name], wanted, rtol=1e-3, atol=1.3e-7)


def test_it_keeps_no_tensor_but_the_slopes_of_the_last_steps() -> None:
    model = mlp()
    opt: Any = AdaMeZO(model, **given(horizon=3, num_queries=2))
    found = [record.projected_grad for record in run(opt, closure_of(model), 5)]
    numbers, tensors = opt.snapshot()
    assert tensors == {}
    assert opt.state_bytes == 0
    assert json.loads(json.dumps(numbers["state"])) == {
        "records": [[step, [g / 2 for g in found[step]]] for step in (2, 3, 4)]
    }


def test_moments_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of an update is as large as the weights: of 100,001 the parts have 65,536."""
    sizes = set[int]()
    empty = torch.Tensor.mul

    def noted(x: Tensor, *rest: Any) -> Tensor:
        sizes.add(x.numel())
        return empty(x, *rest)

    model = nn.Linear(100_001, 1, bias=False)
    opt = AdaMeZO(model, **given(horizon=4))
    for _ in range(3):
        opt.replay(1e-3, [0.5])
    monkeypatch.setattr(torch.Tensor, "__mul__", noted)
    opt.replay(1e-3, [0.5])
    assert sizes
    assert max(sizes) <= 2 * 2**15


def test_clipped_slopes_are_kept_as_they_were_cut() -> None:
    a, b = mlp(), mlp()
    cut = AdaMeZO(a, **given(clip_projected_grad=0.25))
    free = AdaMeZO(b, **given())
    for scalars in ([3.0], [-0.1], [-7.0]):
        cut.replay(1e-3, scalars)
        free.replay(1e-3, [max(-0.25, min(scalars[0], 0.25))])
    assert same(weights_of(a), weights_of(b))


def test_weights_without_the_slopes_before_them_take_no_step() -> None:
    opt = AdaMeZO(mlp(), **given())
    opt.replay(1e-3, [1.0])
    opt.restore(opt.snapshot()[0] | {"state": {}}, {})
    with pytest.raises(ValueError, match="gradients before step 1 were not restored"):
        opt.replay(1e-3, [1.0])
