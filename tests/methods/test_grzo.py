"""GRZO: a reference written from the paper, what a row is moved by, its signs, its limits."""

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from smezo_cli.methods.grzo import GRZO
from smezo_cli.zo.directions.signed_rows import IN, OUT
from smezo_cli.zo.move import Key, Move, Term
from smezo_cli.zo.noise import draw, stream_key
from smezo_cli.zo.step import RowForward
from tests.methods.reference import weights64, z_of
from tests.methods.test_every_method import Ranks
from tests.zo.test_optimizer import X, Y, mlp, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

B = len(X)


def grzo(model: nn.Module, **options: Any) -> GRZO:
    defaults: dict[str, Any] = {"lr": 1e-4, "eps": 1e-2, "num_rows": B, "seed": 7}
    return GRZO(model, **(defaults | {"backend": "eager", "check": False} | options))


class Rows:
    """The squared errors of rows, by forwards over so many of them."""

    def __init__(self, model: nn.Module, size: int = B, num_rows: int = B) -> None:
        self.model, self.size, self.num_rows = model, size, num_rows

    def __call__(self) -> Tensor:
        return self.of(list(range(self.num_rows))).mean()

    def of(self, rows: Sequence[int]) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        found: Tensor = (self.model(X[rows].to(dtype)).double() - Y[rows]).square().mean(1)
        return found

    def by_row(self) -> list[RowForward]:
        starts = range(0, self.num_rows, self.size)
        chosen = [list(range(i, min(i + self.size, self.num_rows))) for i in starts]
        return [RowForward(rows, rows, lambda rows=rows: self.of(rows)) for rows in chosen]  # type: ignore[misc]  # each its own


def signs(name: str, purpose: str, step: int, size: int, rows: int, seed: int = 7) -> Tensor:
    """Those of all rows along a side of a tensor, in float64."""
    key = torch.tensor(stream_key(seed, purpose, step, 0, name))
    found = draw(torch.arange(rows * size), rows * size, key, "rademacher")
    return found.double().view(rows, size)


def directions(w: dict[str, Tensor], step: int, rows: int = B) -> list[dict[str, Tensor]]:
    """Z_i of each row, where all tensors are of linear layers and norms."""
    found: list[dict[str, Tensor]] = [{} for _ in range(rows)]
    for name, u in z_of(w, step, seed=7).items():
        out = signs(name, OUT, step, u.shape[0], rows)
        into = signs(name, IN, step, u.shape[1], rows) if u.ndim > 1 else torch.ones(rows, 1)
        for i in range(rows):
            found[i][name] = u * (out[i][:, None] * into[i] if u.ndim > 1 else out[i])
    return found


def reference(w: dict[str, Tensor], steps: int, lr: float, eps: float) -> dict[str, Tensor]:
    """The method as the paper has it, in float64, by smezo's keys."""
    net = mlp().double()

    def loss(weights: dict[str, Tensor], i: int) -> float:
        with torch.no_grad():
            y = functional_call(net, weights, X[i : i + 1].double())
        return float((y - Y[i]).square().mean())

    for step in range(steps):
        z = directions(w, step)
        delta = torch.zeros(B, dtype=torch.float64)
        for i in range(B):
            plus, minus = ({k: x + s * eps * z[i][k] for k, x in w.items()} for s in (1, -1))
            delta[i] = (loss(plus, i) - loss(minus, i)) / 2
        a = delta / (delta.std() + 1e-8)
        for k, x in w.items():
            g = sum((a[i] * z[i][k] for i in range(B)), torch.zeros_like(x)) / (2 * eps * B)
            w = w | {k: x - lr * g}
    return w


def test_steps_are_those_of_the_paper() -> None:
    """30 steps, in which weights move by some 0.1.

    A loss in float32 is known to 1e-6, and so delta to 1e-4 of its deviation of some 0.01; a step
    moves a weight by at most lr B / (2 eps B) = 5e-3.
    """
    model = mlp()
    wanted = reference(weights64(model), 30, 1e-4, 1e-2)
    before = weights64(model)
    opt, closure = grzo(model), Rows(model)
    for _ in range(30):
        opt.step(closure)
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, wanted[name], atol=3e-5, rtol=0)
        assert (x - before[name]).abs().mean() > 1e-3


def test_one_row_takes_a_step_of_mezo_along_the_base_under_its_signs() -> None:
    """To rounding: losses are known to 1e-6, and lr / (2 eps) is 1/2."""
    model = mlp()
    w, closure = weights64(model), Rows(model, 1, 1)
    (z,) = directions(w, 0, 1)
    net, x = mlp().double(), X[:1].double()
    plus, minus = (
        (functional_call(net, {k: v + s * 1e-2 * z[k] for k, v in w.items()}, x) - Y[0])
        .square()
        .mean()
        for s in (1, -1)
    )
    record = grzo(model, num_rows=1, lr=1e-2).step(closure)
    found = (plus - minus) / 2e-2
    assert record.projected_grad == pytest.approx([float(found)], abs=1e-4)
    for name, x in weights64(model).items():
        torch.testing.assert_close(x, w[name] - 1e-2 * found * z[name], atol=1e-5, rtol=0)


def llama(**options: Any) -> nn.Module:
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 30}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**(sizes | options)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "opt": lambda: OPTForCausalLM(  # rows of a batch are flattened in its layers
        OPTConfig(
            hidden_size=12,
            ffn_dim=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=30,
            max_position_embeddings=16,
            word_embed_proj_dim=12,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(  # positions are looked up once for all rows
        GPT2Config(n_embd=12, n_layer=2, n_head=2, vocab_size=30, n_positions=16)
    ),
    "roberta": lambda: RobertaForMaskedLM(
        RobertaConfig(
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=30,
            max_position_embeddings=16,
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_row_has_the_loss_of_weights_moved_along_its_own_direction(name: str) -> None:
    """In two forwards of two rows each, against weights overwritten by W +- eps Z_i.

    Losses of some 3.4 are computed in float32 in another order; a thousandth of what eps = 0.05
    makes of them would be seen.
    """
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    ids = torch.randint(3, 30, (4, 7))

    class Texts(Rows):
        def of(self, rows: Sequence[int]) -> Tensor:
            log_p = self.model(input_ids=ids[rows]).logits.double().log_softmax(-1)
            found: Tensor = -log_p[:, :-1].gather(2, ids[rows, 1:, None]).mean((1, 2))
            return found

    opt, closure = grzo(model, num_rows=4), Texts(model, 2, 4)
    changes = []
    points = [[Move((Term(Key(0, i), c),)) for c in (0.05, -0.05)] for i in range(4)]
    with torch.no_grad():
        found = opt.meter(closure).by_row(points)
        here = closure.of(range(4)).tolist()
        for i, point in itertools.product(range(4), range(2)):
            mover = opt.direction.mover(0, points[i][point])
            saved = [t.flat.clone() for t in opt.targets]
            for target in opt.targets:
                mover.whole(target.parameter, target.flat)
            wanted = closure.of([i]).item()
            for target, was in zip(opt.targets, saved, strict=True):
                target.flat.copy_(was)
            assert found[i][point] == pytest.approx(wanted, abs=2e-6)
            changes.append(abs(wanted - here[i]))
    assert sum(changes) > 8 * 2e-3
    assert opt.self_check(closure) > 0


def test_the_sum_over_the_rows_is_on_average_the_gradient() -> None:
    """Before it is divided; of losses that are quadratic in the weights, at any eps.

    Of 250 steps with 16 directions each. Five standard errors are allowed, entry by entry and along
    the gradient, where half of it, or twice, would be seen.
    """
    model = nn.Linear(6, 3)
    opt, closure = grzo(model, eps=0.125), Rows(model)
    model.double()(X.double()).sub(Y).square().mean().backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.float()
    found = []
    with torch.no_grad():
        for step in range(250):
            opt.num_steps = step
            opt._begin()
            gradient = opt.estimator.read(opt.estimator.measure(opt.meter(closure)), step)
            of_step = []
            for target in opt.targets:
                out = torch.empty_like(target.flat)
                opt.direction.mover(step, gradient.move(1.0)).whole(target.parameter, out)
                of_step.append((out - target.flat).double() * gradient.divisor / B)
            found.append(torch.cat(of_step))
    estimates = torch.stack(found)
    along = estimates @ wanted[:, None] / wanted.square().sum()
    for of_steps, mean in ((estimates, wanted), (along, 1.0)):
        error = of_steps.std(0) / len(found) ** 0.5
        assert ((of_steps.mean(0) - mean).abs() <= 5 * error).all()
    assert error.item() < 0.08


def test_an_update_is_the_sum_over_the_rows() -> None:
    """Of what is given to it, in float64: weights of some 1 are stored to 6e-8."""
    model, c = mlp(), torch.linspace(-0.3, 0.5, B).tolist()
    w = weights64(model)
    z = directions(w, 3)
    opt = grzo(model)
    opt.direction.apply(3, Move(tuple(Term(Key(3, i), c[i]) for i in range(B)), decay=0.125))
    for name, x in weights64(model).items():
        wanted = w[name] * 0.875 + sum(c[i] * z[i][name] for i in range(B))
        torch.testing.assert_close(x, wanted, atol=1e-6, rtol=0)


def test_backends_and_micro_batches_give_the_same_bits_of_an_update() -> None:
    found = []
    for backend, noise in (("eager", True), ("eager", False), ("compiled", False)):
        model = mlp()
        opt = grzo(model, backend=backend, keep_noise=noise)
        for step in range(3):
            opt.replay(1e-3, [0.1 * i - 0.7 * step for i in range(B)])
        found.append(weights_of(model))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_signs_are_no_checkerboard() -> None:
    """Those of a row do not follow from another row's, column, step or seed.

    The released code takes the parity of row + column + seed: r_i s_i^T is the same matrix for all,
    but for its sign. Of n independent signs a mean has a deviation of n^-1/2; five are allowed.
    """
    sizes = {OUT: 400, IN: 300}
    opt = grzo(nn.Linear(300, 400))
    target = opt.targets[0]
    for purpose, n in sizes.items():
        found = opt.direction.signs(target, purpose, 0, n)  # type: ignore[attr-defined]  # it is signed
        assert torch.equal(found.double(), signs("weight", purpose, 0, n, B))
        others = [signs("weight", purpose, step, n, B, seed) for step, seed in ((1, 7), (0, 8))]
        means = [found.double() @ other.T / n for other in (found.double(), *others)]
        off = torch.cat([means[0][~torch.eye(B, dtype=torch.bool)], *map(torch.flatten, means[1:])])
        assert off.abs().max() < 5 * n**-0.5
        assert found.mean().abs() < 5 * (B * n) ** -0.5
        assert (found[:, 1:] * found[:, :-1]).mean().abs() < 5 * (B * n) ** -0.5
        assert (found[:, ::2] * found[:, 1::2]).mean().abs() < 5 * (B * n / 2) ** -0.5


def test_micro_batches_and_ranks_make_the_same_step() -> None:
    """A row's forward is of other rows beside it: losses differ by 1e-6, a weight by 1e-5."""
    models = [mlp() for _ in range(4)]
    records = [grzo(models[0]).step(Rows(models[0])), grzo(models[1]).step(Rows(models[1], 5))]
    ranks = Ranks(2)

    def closure_of(rank: int) -> Any:
        rows = Rows(models[2 + rank], 5)
        closure = ranks.closure(rank, rows)
        closure.num_rows = B

        def by_row() -> list[RowForward]:
            return rows.by_row()

        closure.by_row = by_row
        return closure

    def step(rank: int) -> None:
        records.append(grzo(models[2 + rank]).step(closure_of(rank)))

    threads = [threading.Thread(target=step, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records) == 4
    for record, model in zip(records, models, strict=True):
        assert record.projected_grad == pytest.approx(records[0].projected_grad, abs=2e-4)
        assert record.num_forwards == 2
        for name, x in weights64(model).items():
            torch.testing.assert_close(x, weights64(models[0])[name], atol=2e-5, rtol=0)


def test_a_recorded_step_is_made_again_and_a_run_goes_on() -> None:
    first, second = mlp(), mlp()
    ran, replayed = grzo(first, weight_decay=0.1), grzo(second, weight_decay=0.1)
    for step in range(4):
        record = ran.step(Rows(first))
        assert len(record.scalars) == B
        if step < 2:
            replayed.replay(1e-4, record.scalars)
        else:
            replayed.step(Rows(second))
        assert same(weights_of(first), weights_of(second))


def test_it_is_said_which_tensors_have_signs() -> None:
    """Else a class that another version of a library names otherwise would replay other steps."""

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    one, two = grzo(nn.Sequential(nn.Linear(6, 3))), grzo(nn.Sequential(Other(6, 3)))
    assert one.identity()["tensors"] == two.identity()["tensors"]
    assert one.identity() != two.identity()
    assert one.signed.is_signed(one.targets[0])
    assert not two.signed.is_signed(two.targets[0])


def test_what_does_not_fit_is_refused() -> None:
    model = mlp()
    for executor in ("lockstep", "batched", "side_path", "in_place"):
        with pytest.raises(ValueError, match=f"executor={executor}: a forward computes each row"):
            grzo(model, executor=executor)
    with pytest.raises(TypeError, match="no by_row"):
        grzo(model).step(lambda: Rows(model)())
    with pytest.raises(ValueError, match="num_rows=16: the batch has 8 rows"):
        grzo(model).step(Rows(model, 8, 8))


def test_a_model_whose_rows_see_each_other_is_refused() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y - y.mean(0)

    model = Centred()
    with pytest.raises(ValueError, match="the rows of a batch see each other"):
        grzo(model, check=True).step(Rows(model))


def test_a_layer_that_is_given_other_rows_is_refused() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x[: len(x) - 1])
            return torch.cat([y, y[:1]])

    model = Routed()
    with pytest.raises(ValueError, match=r"a tensor of shape \[15, 6\], whose entries cannot"):
        grzo(model).step(Rows(model))


def test_clipping_cuts_rows_after_the_deviation_is_taken() -> None:
    """To rounding: the divisor is that of the step without a limit."""
    models = [mlp(), mlp()]
    free = grzo(models[0]).step(Rows(models[0]))
    limit = sorted(map(abs, free.projected_grad))[B // 2]
    record = grzo(models[1], clip_projected_grad=limit).step(Rows(models[1]))
    assert record.projected_grad == free.projected_grad
    assert record.clipped == sum(abs(p) > limit for p in free.projected_grad)
    w, p = weights64(mlp()), torch.tensor(free.projected_grad, dtype=torch.float64)
    z, cut = directions(w, 0), p.clamp(-limit, limit)
    for name, x in weights64(models[1]).items():
        g = sum(cut[i] * z[i][name] for i in range(B)) / (2 * B * (1e-2 * p.std() + 1e-8))
        torch.testing.assert_close(x, w[name] - 1e-4 * g, atol=1e-6, rtol=0)


def test_a_layer_that_only_says_that_it_is_a_norm_is_refused() -> None:
    """It is reached by copies of its weight, but does not multiply by it entry by entry."""

    class MixingNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight[0]

    model = nn.Sequential(nn.Linear(6, 6), MixingNorm(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="a MixingNorm of the model computes something else"):
        grzo(model, check=True).step(Rows(model))
