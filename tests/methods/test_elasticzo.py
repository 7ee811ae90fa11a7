"""ElasticZO against a reference in float64, and how little its tail keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from smezo_cli.methods.elasticzo import ElasticZO
from smezo_cli.zo.step import NonFiniteLoss
from tests.methods.reference import weights64, z_of
from tests.zo.test_optimizer import bits, closure_of, mlp, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def made(model: nn.Module, **more: Any) -> ElasticZO:
    given = {"lr": 1e-2, "eps": 1e-3, "tail_lr": 2e-2, "backend": "eager", "check": False}
    return ElasticZO(model, **given | {"executor": "sequential"} | more)


def test_thirty_steps_are_those_of_the_paper_at_clean_weights() -> None:
    """Trunk by MeZO, the last layer by SGD on autograd's gradient; both at the weights before."""
    model, twin = mlp(), mlp().double()
    opt = made(model)
    for step in range(30):
        record = opt.step(closure_of(model))
        assert record.num_forwards == 3
        tail = {n: p for n, p in twin.named_parameters() if n.startswith("3.")}
        trunk = {n: p for n, p in twin.named_parameters() if n not in tail}
        gradients = torch.autograd.grad(closure_of(twin)(), list(tail.values()))
        z, losses = z_of(weights64(twin), step), []
        with torch.no_grad():
            for sign in (1, -2):
                for name, p in trunk.items():
                    p += sign * 1e-3 * z[name]
                losses.append(float(closure_of(twin)()))
            for name, p in trunk.items():
                p += 1e-3 * z[name]
            slope = (losses[0] - losses[1]) / 2e-3
            for name, p in trunk.items():
                p -= 1e-2 * slope * z[name]
            for p, g in zip(tail.values(), gradients, strict=True):
                p -= 2e-2 * g
    for name, found in weights64(model).items():
        torch.testing.assert_close(found, weights64(twin)[name], rtol=0, atol=2e-4)
        assert (found - weights64(mlp())[name]).abs().max() > 1e-2


def test_the_tail_follows_the_schedule_of_lr() -> None:
    half, whole = mlp(), mlp()
    opt = made(half, tail_lr=4e-2)
    opt.set_lr_factor(0.5)
    opt.step(closure_of(half))
    made(whole, lr=5e-3, tail_lr=2e-2).step(closure_of(whole))
    for (name, a), (_, b) in zip(half.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(bits(a), bits(b)), name


def llama(*, tied: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.randint(40, (2, 7), generator=seeded(0))


def loss_of(model: Any) -> Any:
    def closure() -> Tensor:
        logits = model(input_ids=IDS).logits[:, -1].double()
        return nn.functional.cross_entropy(logits, torch.tensor([3, 5]))

    return closure


@pytest.mark.parametrize("tied", [True, False])
def test_the_tail_is_the_last_blocks_the_norm_and_the_head(tied: bool) -> None:
    opt = made(llama(tied=tied), tail_blocks=1)
    assert opt.tail is not None
    names = set(opt.tail.parameters)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert {head, "model.norm.weight"} <= names
    assert {n for n in names if ".layers." in n} == {
        n for n, _ in llama(tied=tied).named_parameters() if ".layers.2." in n
    }
    assert names.isdisjoint(t.name for t in opt.targets)
    assert opt.trained.keys() == {n for n, _ in llama(tied=tied).named_parameters()}
    assert opt.num_weights == sum(p.numel() for p in llama(tied=tied).parameters())


def test_a_tied_head_is_trained_by_its_own_use() -> None:
    """Its gradient is that of an untied head; the embedding moves with it."""
    tied = llama(tied=True)
    start = tied.model.embed_tokens.weight.detach().clone()
    opt = made(tied, tail_blocks=0)
    untied = llama(tied=False)
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": start})
    (gradient,) = torch.autograd.grad(loss_of(untied)(), [untied.lm_head.weight])
    opt.step(loss_of(tied))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    moved = tied.model.embed_tokens.weight.detach()
    torch.testing.assert_close(moved, start - 2e-2 * gradient, rtol=0, atol=1e-7)
    assert (moved - start).abs().max() > 1e-3


def test_only_the_tail_keeps_activations_and_no_gradient_stays() -> None:
    model = llama(tied=True)
    opt = made(model, tail_blocks=1)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(1) or x, lambda x: x):  # type: ignore[func-returns-value]  # append's None
        opt.step(loss_of(model))
    of_tail = len(saved)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(1) or x, lambda x: x):  # type: ignore[func-returns-value]  # likewise
        loss_of(model)()
    assert 0 < of_tail < 0.5 * len(saved)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_micro_batches_add_up() -> None:
    class InTwoParts:
        def __init__(self, model: Any) -> None:
            self.model = model

        def part(self, rows: slice) -> Tensor:
            logits = self.model(input_ids=IDS[rows]).logits[:, -1].double()
            goal = torch.tensor([3, 5])[rows]
            return nn.functional.cross_entropy(logits, goal, reduction="sum") / 2

        def __call__(self) -> Tensor:
            return self.part(slice(0, 1)) + self.part(slice(1, 2))

        def parts(self) -> list[Any]:
            return [lambda: self.part(slice(0, 1)), lambda: self.part(slice(1, 2))]

    parted, whole = llama(tied=True), llama(tied=True)
    made(parted).step(InTwoParts(parted))
    made(whole).step(loss_of(whole))
    for (name, a), (_, b) in zip(parted.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5, msg=name)
    assert all(p.grad is None for p in parted.parameters())


def test_a_loss_that_is_not_finite_writes_nothing() -> None:
    model = mlp()
    opt, before = made(model), weights64(model)
    calls = [0]

    def closure() -> Tensor:
        calls[0] += 1
        loss = closure_of(model)()
        return loss / 0 if calls[0] == 3 else loss  # the tail's forward

    with pytest.raises(NonFiniteLoss):
        opt.step(closure)
    assert calls[0] == 3
    assert all(torch.equal(x, before[n]) for n, x in weights64(model).items())


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        (nn.Bilinear(2, 2, 2), {}, "no layer here has a number"),
        (mlp(), {"tail_blocks": 3}, "the model has 3 layers"),
        (mlp(), {"tail_blocks": 0}, r"belong to no block \(none\) none is called so"),
    ],
)
def test_a_model_without_trunk_or_tail_is_one_sentence(
    model: nn.Module, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        made(model, **arguments)


def test_a_refusal_names_what_belongs_to_no_block() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(3, 2)})
    model["layers"] = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"tail_blocks=0 trains .* no block \(words\.weight\)"):
        made(model, tail_blocks=0)
