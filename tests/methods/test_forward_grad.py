"""Forward gradients against backpropagation, and what cannot be differentiated forward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from smezo_cli.methods.forward_grad import ForwardGrad
from smezo_cli.zo.step import NonFiniteLoss
from smezo_cli.zo.tangent import NoTangent
from tests.methods.reference import weights64, z_of
from tests.zo.test_optimizer import closure_of, mlp, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model: nn.Module, **more: Any) -> ForwardGrad:
    return ForwardGrad(model, **{"lr": 1e-3, "eps": 1e-3, "backend": "eager"} | more)


def slopes(model: nn.Module, loss: Tensor, step: int, query: int = 0) -> float:
    """grad L . z by backpropagation, in float64."""
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    z = z_of(weights64(model), step, query)
    return sum(float((g.double() * z[n]).sum()) for n, g in zip(named, gradients, strict=True))


@pytest.mark.parametrize("queries", [1, 3])
def test_thirty_steps_are_those_of_the_paper(queries: int) -> None:
    """theta <- theta - lr (grad . z) z in float64 with autograd; within float32's rounding."""
    model, twin = mlp(), mlp().double()
    opt = made(model, num_queries=queries)
    for step in range(30):
        record = opt.step(closure_of(model))
        assert record.num_forwards == queries
        loss = closure_of(twin)()
        found = [slopes(twin, closure_of(twin)(), step, query) for query in range(queries)]
        assert record.loss == pytest.approx(float(loss.detach()), rel=1e-4)
        with torch.no_grad():
            for query, slope in enumerate(found):
                z = z_of(weights64(twin), step, query)
                for name, p in twin.named_parameters():
                    p -= 1e-3 / queries * slope * z[name]
    for name, found64 in weights64(model).items():
        torch.testing.assert_close(found64, weights64(twin)[name], rtol=0, atol=1e-5)
        assert (found64 - weights64(mlp())[name]).abs().max() > 5e-3


def llama(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


IDS = torch.randint(40, (2, 7), generator=seeded(0))


def loss_of(model: Any) -> Any:
    def closure() -> Tensor:
        logits = model(input_ids=IDS).logits[:, -1].double()
        return nn.functional.cross_entropy(logits, torch.tensor([3, 5]))

    return closure


def test_a_language_model_with_a_tied_head() -> None:
    """Rows of the embedding, norms, attention: within 1e-4 of float64, relative."""
    model = llama()
    opt = made(model)
    (got,) = opt.step(loss_of(model)).scalars
    exact = llama(torch.float64)
    assert got == pytest.approx(slopes(exact, loss_of(exact)(), 0), rel=1e-4)


def test_micro_batches_add_up() -> None:
    class InTwoParts:
        def __init__(self, model: Any) -> None:
            self.model = model

        def __call__(self) -> Tensor:
            raise AssertionError("its parts are asked")

        def parts(self) -> list[Any]:
            def part(rows: slice) -> Tensor:
                logits = self.model(input_ids=IDS[rows]).logits[:, -1].double()
                goal = torch.tensor([3, 5])[rows]
                return nn.functional.cross_entropy(logits, goal, reduction="sum") / 2

            return [lambda: part(slice(0, 1)), lambda: part(slice(1, 2))]

    model, whole = llama(), llama()
    record = made(model, check=False).step(InTwoParts(model))
    expected = made(whole, check=False).step(loss_of(whole))
    assert record.scalars[0] == pytest.approx(expected.scalars[0], rel=1e-5)
    assert record.loss == pytest.approx(expected.loss, rel=1e-6)


def test_a_closure_that_reads_the_weight_past_its_module_has_no_tangent() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0]))
    model = nn.Module()
    model.register_parameter("w", weight)
    opt = made(model, num_queries=1, check=False)
    with pytest.raises(NoTangent, match="does not depend on the weights"):
        opt.step(lambda: (weight.double() ** 2).sum() / 2)


class NoForwardMode(torch.autograd.Function):
    """A square that backpropagation alone knows the derivative of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, generator=seeded(1)))

    def forward(self) -> Tensor:
        return NoForwardMode.apply(self.w).double().sum()  # type: ignore[no-any-return,no-untyped-call]  # torch's


def test_a_layer_without_a_derivative_is_one_sentence_before_anything_is_written() -> None:
    model = Odd()
    before = model.w.detach().clone()
    with pytest.raises(NoTangent, match="a layer has no forward-mode derivative") as caught:
        made(model).self_check(model)
    assert "\n" not in str(caught.value)
    assert torch.equal(model.w, before)


def test_a_loss_without_a_derivative_is_refused() -> None:
    """Accuracy, such as method.objective=accuracy lowers."""
    model = mlp()
    closure = lambda: (model(torch.ones(1, 6)).argmax(1) == 0).double().mean()  # noqa: E731
    with pytest.raises(NoTangent, match="does not depend on the weights"):
        made(model, check=False).step(closure)


def test_a_derivative_that_is_not_finite_changes_nothing() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def forward(self) -> Tensor:
            return self.w.double().abs().sqrt().sum()

    model = Root()
    with pytest.raises(NonFiniteLoss):
        made(model, check=False).step(model)
    assert not model.w.any()


def test_bfloat16_takes_tangents_too() -> None:
    model = llama(torch.bfloat16)
    (got,) = made(model, check=False).step(loss_of(model)).scalars
    exact = llama(torch.float64)
    expected = slopes(exact, loss_of(exact)(), 0)
    assert got == pytest.approx(expected, rel=0.2)


class Dropped(nn.Module):
    """A linear layer, one of whose halves loses its tangent on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self) -> Tensor:
        x = torch.ones(1, 3)
        lost = torch.from_numpy(self.b(x).detach().clone().numpy())
        return (self.a(x) + 3 * lost).double().square().sum()


def test_a_layer_that_drops_its_derivative_without_a_word_is_found() -> None:
    """As oneDNN's product would, which has no forward-mode derivative and says nothing."""
    model = Dropped()
    with pytest.raises(NoTangent, match="drops its forward-mode derivative without a word"):
        made(model).self_check(model)


def test_losses_of_low_precision_are_no_reason_to_refuse() -> None:
    """Under autocast a difference of losses says little; the derivative is not held against it."""
    model = llama()
    loss = loss_of(model)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss()  # type: ignore[no-any-return]  # a tensor

    made(model).self_check(closure)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"executor": "lockstep"}, "executor=lockstep: a derivative is taken in one forward"),
        ({"keep_noise": True}, "keep_noise=true: directions are drawn anew"),
    ],
)
def test_what_would_have_no_effect_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made(mlp(), **arguments)


def test_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="float16 has no room for derivatives"):
        made(mlp(torch.float16))
