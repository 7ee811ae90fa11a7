"""P-RGE: a reference written from its paper, its one forward a step, and LoRA-FA in a model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.p_rge import PRGE
from smezo_cli.run.method import build_method
from tests.methods.reference import weights64, z_of
from tests.models.test_adapter import bits, made
from tests.zo.test_optimizer import X, Y, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


class Layer(nn.Module):
    """W x + B A x with W and A frozen, and B zero at first."""

    def __init__(self, inputs: int, outputs: int, g: torch.Generator) -> None:
        super().__init__()
        self.base, self.a = nn.Linear(inputs, outputs), nn.Linear(inputs, 2, bias=False)
        self.b = nn.Linear(2, outputs, bias=False)
        with torch.no_grad():
            for p in (*self.base.parameters(), self.a.weight):
                p.copy_(torch.randn(p.shape, generator=g) * 0.5)
                p.requires_grad_(False)
            self.b.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def network() -> nn.Sequential:
    g = seeded(5)
    return nn.Sequential(Layer(6, 11, g), nn.Tanh(), Layer(11, 3, g))


def loss(model: nn.Module) -> Tensor:
    return (model(X).double() - Y).square().mean()


def opt_of(model: nn.Module, **more: Any) -> PRGE:
    given = {"lr": 0.1, "eps": 1e-2, "num_queries": 3, "backend": "eager", "check": False}
    return PRGE(model, **(given | more))


def reference(steps: int) -> dict[str, Tensor]:
    """Each direction and sign a forward of its own, in float64; the mean of Q estimates."""
    net = network().double()
    b = {n: p for n, p in net.named_parameters() if p.requires_grad}
    for step in range(steps):
        start, total = weights64(net), {n: torch.zeros_like(p) for n, p in b.items()}
        for query in range(3):
            z = z_of(b, step, query)
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    for n, p in b.items():
                        p.copy_(start[n] + sign * 1e-2 * z[n])
                    losses.append(float((net(X.double()) - Y).square().mean()))
            for n in b:
                total[n] += (losses[0] - losses[1]) / (2 * 1e-2) * z[n] / 3
        with torch.no_grad():
            for n, p in b.items():
                p.copy_(start[n] - 0.1 * total[n])
    return {n: p.detach() for n, p in b.items()}


def test_thirty_steps_are_those_of_the_reference() -> None:
    """Losses near 1 in float32 are off by some 1e-6, a difference of two over 0.02 by 1e-4."""
    model = network()
    opt = opt_of(model)
    records = [opt.step(lambda: loss(model)) for _ in range(30)]
    assert records[-1].loss < 0.8 * records[0].loss
    assert records[0].num_forwards == 6
    for name, expected in reference(30).items():
        found = model.get_parameter(name).detach().double()
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_all_points_of_a_step_are_one_forward_that_reads_frozen_weights_once() -> None:
    model = network()
    opt = opt_of(model)
    opt.step(lambda: loss(model))  # compares with forwards of their own
    rows: list[int] = []
    model[0].base.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    opt.step(lambda: loss(model))
    assert rows == [6 * len(X)]


def test_steps_are_those_of_mezo_to_rounding() -> None:
    one, other = network(), network()
    batched = opt_of(one)
    plain = MeZO(other, lr=0.1, eps=1e-2, num_queries=3, backend="eager", check=False)
    for _ in range(10):
        a, b = batched.step(lambda: loss(one)), plain.step(lambda: loss(other))
        assert a.projected_grad == pytest.approx(b.projected_grad, abs=1e-3)


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-opt", "tiny-roberta"])
def test_in_a_model_only_b_is_trained(model: str) -> None:
    job = made("p_rge", model, "lr=0.1")
    trainer, before = build_method(job), bits(job.model)
    rows = job.encode(job.task.train, job.prompts[0])[:4]
    for _ in range(3):
        trainer.step(lambda: job.scorer.loss(rows))
    moved = {n for n, p in job.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trainer.trained.keys()
    assert all(".lora_B." in name for name in moved)
    assert job.adapter is not None
    plain = made("mezo", model)
    own = sum(p.numel() * p.element_size() for p in plain.model.parameters())
    assert job.adapter.saved_bytes == own
