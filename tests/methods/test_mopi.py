"""MOPI: a reference written from the paper's rule, its power iteration, what goes on with it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.mopi import MOPI, swept
from tests.methods.test_every_method import node_of
from tests.methods.test_lozo import Net, loss_of, numbers
from tests.methods.test_subzero import frame
from tests.zo.test_optimizer import same, seeded, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def mopi(model: nn.Module, **options: Any) -> MOPI:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "rank": 4, "refresh_every": 8, "seed": 7}
    defaults |= {"num_queries": 3, "beta": 0.8, "steps_rank": 2, "lr_1d": 1e-3}
    defaults |= {"backend": "eager", "check": False, "executor": "sequential"}
    return MOPI(model, **(defaults | options))


def orth(x: Tensor) -> Tensor:
    q, upper = torch.linalg.qr(x)
    return q * upper.diagonal().sign()


def drawn(name: str, step: int, k: int, n: int) -> Tensor:
    """The columns at which power iteration begins with a new P."""
    return orth(numbers(k * n, "power", step, 0, name).view(k, n).T)


def reference(
    w: dict[str, Tensor], steps: int, k: int, every: int, beta: float
) -> dict[str, Tensor]:
    """The method in float64, by the keys that smezo draws by."""
    lr, eps, lr_1d, queries = 1e-2, 1e-3, 1e-3, 3
    shapes = {n: (min(4, len(x)), x.shape[1]) if x.ndim == 2 else x.shape for n, x in w.items()}
    p: dict[str, Tensor] = {}
    mean: dict[str, Tensor] = {}
    v: dict[str, Tensor] = {}
    for t in range(steps):
        here, g = loss_of(w), {n: torch.zeros(shape).double() for n, shape in shapes.items()}
        for n, x in w.items():
            if x.ndim == 2 and t % every == 0:
                new = frame(len(x), shapes[n][0], "left", t // every, 0, n)
                if t:
                    mean[n] = new.T @ p[n] @ mean[n]
                p[n], v[n] = new, drawn(n, t, min(k, *shapes[n]), shapes[n][1])
        for i in range(queries):
            u = {n: numbers(x.numel(), "z", t, i, n).view(x.shape) for n, x in g.items()}
            there = {n: x + eps * (p[n] @ u[n] if n in p else u[n]) for n, x in w.items()}
            g = {n: x + (loss_of(there) - here) / eps * u[n] / queries for n, x in g.items()}
        mean = {n: beta * mean.get(n, x) + (1 - beta) * x for n, x in g.items()}
        step = dict(mean)
        for n in p:
            v[n] = orth(mean[n].T @ (mean[n] @ v[n]))
            left = mean[n] @ v[n]
            step[n] = p[n] @ (left / left.norm(dim=0)) @ v[n].T
        w = {n: x - (lr if n in p else lr_1d) * step[n] for n, x in w.items()}
    return w


@pytest.mark.parametrize(("k", "beta"), [(1, 0.8), (2, 0.8), (2, 0.0), (5, 0.8)])
def test_steps_are_those_of_the_reference(k: int, beta: float) -> None:
    """30 steps with three new P. k = 5 is more than the rows of any core."""
    model = Net()
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    opt = mopi(model, steps_rank=k, beta=beta)
    for _ in range(30):
        opt.step(model)
    wanted = reference(before, 30, k, 8, beta)
    for name, p in model.named_parameters():
        assert (wanted[name] - before[name]).abs().max().item() > 0.003
        # Weights of size 1 are stored to 6e-8, so that a slope is known to some 1e-4 of its size;
        # a step is known as well, up to the spread of singular values; times lr, 30 times.
        assert (p.double() - wanted[name]).abs().max().item() < 5e-5


@pytest.mark.parametrize(("shape", "k"), [((6, 20), 3), ((20, 6), 3), ((5, 5), 5), ((1, 7), 1)])
def test_sweeps_of_one_matrix_end_at_its_leading_singular_vectors(shape: Any, k: int) -> None:
    """Of values 2^-i the error falls by four a sweep; every step on the way is sqrt(k) long."""
    u, _, vh = torch.linalg.svd(
        torch.randn(shape, generator=seeded(5)).double(), full_matrices=False
    )
    sizes = 0.5 ** torch.arange(min(shape), dtype=torch.float64)
    matrix = (1e5 * (u * sizes) @ vh).float()
    right = orth(torch.randn(k, shape[1], generator=seeded(6)).double().T).T.float()
    for _ in range(20):
        found, right = swept(matrix, right)
        lengths = torch.linalg.svdvals(found.double())[:k].square().sum()
        assert abs(lengths.item() - k) < 1e-5
        assert (found * matrix).sum() > 0
        eye = right.double() @ right.double().T
        assert (eye - torch.eye(k)).abs().max() < 1e-6
    # Rows are rounded to 2^-17 beside entries of up to 4.
    assert (found.double() - u[:, :k] @ vh[:k]).abs().max().item() < 1e-4


def test_nothing_measured_is_no_step() -> None:
    zeros, right = torch.zeros(2, 3), torch.ones(1, 3)
    found, kept = swept(zeros, right)
    assert torch.equal(found, zeros)
    assert torch.equal(kept, right)
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mopi(model).step(lambda: torch.tensor(0.5))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_columns_go_on_from_step_to_step_and_begin_anew_with_a_frame() -> None:
    """One sweep a step, from where the step before ended; at a refresh from those of its key."""
    model = Net()
    opt = mopi(model, refresh_every=3)
    for step in range(7):
        before = opt.snapshot()[1].get("a/right", torch.empty(0)).clone()
        opt.step(model)
        kept = opt.snapshot()[1]
        mean = kept["a/momentum"].view(4, 6).double()
        start = drawn("a", step, 2, 6) if step % 3 == 0 else before.view(2, 6).double().T
        wanted = orth(mean.T @ (mean @ start)).T
        # Rows are rounded to 2^-17 beside entries of up to 4, and the two may be much alike.
        assert (kept["a/right"].view(2, 6).double() - wanted).abs().max().item() < 1e-4
    assert kept["b/right"].numel() == 0  # of a vector there are none


def test_a_run_resumed_between_refreshes_goes_on() -> None:
    model = Net()
    opt = mopi(model)
    for _ in range(5):
        opt.step(model)
    again = Net()
    again.load_state_dict(model.state_dict())
    resumed = mopi(again)
    resumed.restore(opt.snapshot()[0], {n: x.clone() for n, x in opt.snapshot()[1].items()})
    for _ in range(6):
        assert resumed.step(again).scalars == opt.step(model).scalars
    assert same(weights_of(again), weights_of(model))


def test_frame_mean_and_columns_are_what_is_kept() -> None:
    model = nn.Linear(300, 200)
    opt = mopi(model, rank=8, steps_rank=3)
    # P (200, 8), M (8, 300) and V (300, 3) of the matrix, and the mean of the bias.
    assert opt.state_bytes == 4 * (8 * 200 + 8 * 300 + 3 * 300 + 200)
    opt.replay(1e-2, [0.5, 0.2, 0.1, 3.0])
    assert sum(x.numel() for x in opt.snapshot()[1].values()) == 8 * 300 + 3 * 300 + 200


def test_a_mean_begins_as_the_first_gradient() -> None:
    """So first steps with beta 0 and 0.9 agree, those of tensors of one dimension, too."""
    models = Net(), Net()
    for model, beta in zip(models, (0.0, 0.9), strict=True):
        mopi(model, beta=beta).step(model)
    for name in ("a", "b", "c"):
        a, b = (model.get_parameter(name).detach() for model in models)
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_the_defaults_are_those_of_the_released_command() -> None:
    """OPT-13B: LR=1e-2 EPS=1e-3 RANK=64 K_START=32 BETA=0 NUM_SAMPLES=8 STEP_INTERVAL=500."""
    node = node_of("mopi")
    keys = ("lr", "eps", "rank", "steps_rank", "beta", "num_queries", "refresh_every", "lr_1d")
    assert [node[key] for key in keys] == [1e-2, 1e-3, 64, 32, 0.0, 8, 500, 1e-7]
