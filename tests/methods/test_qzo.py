"""QZO against a reference written from its rule: codes stay, scales are trained, none below 0."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from smezo_cli.cli.verbs import main
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.methods.qzo import QZO
from smezo_cli.zo.noise import draw, stream_key
from smezo_cli.zo.quantised import QuantisedLinear, quantised_layers
from tests.methods.test_every_method import Ranks
from tests.zo.test_optimizer import seeded

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(16, 32, generator=seeded(1))
Y = torch.randn(16, 33, generator=seeded(2))
FORMS = [(8, torch.float32), (4, torch.float32), (8, torch.bfloat16), (4, torch.float16)]
SCALES = ("0.scales", "3.scales")


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two matrices that are held as codes, one with an odd number of weights; and a norm."""
    model = nn.Sequential(nn.Linear(32, 49), nn.Tanh(), nn.LayerNorm(49), nn.Linear(49, 33))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(p.numel())) * 0.3)
    return model.to(dtype)


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        dtype = model[2].weight.dtype
        return (model(X.to(dtype)).double() - Y).square().mean()

    return closure


def qzo(model: nn.Module, **options: Any) -> QZO:
    given: dict[str, Any] = {"lr": 1e-5, "eps": 1e-3, "group_size": 16, "check": False}
    return QZO(model, **(given | {"executor": "sequential", "backend": "eager"} | options))


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- the rule ----------------------------------------------------------------------------------


class Reference:
    """The rule in float64 with one query, matrix by matrix."""

    def __init__(self, model: nn.Module, bits: int, group: int, lr: float, eps: float) -> None:
        self.model, self.group, self.lr, self.eps = model, group, lr, eps
        self.rest = {n: p.detach().double() for n, p in model.named_parameters()}
        self.scales, self.codes = {}, {}
        for name in ("0", "3"):
            w, top = self.rest[f"{name}.weight"], 2 ** (bits - 1) - 1
            groups = w.split(group, 1)
            self.scales[name] = torch.stack([g.abs().amax(1) for g in groups], 1) / top
            self.codes[name] = (w / self.over(self.scales[name], w)).round()

    def over(self, scales: Tensor, like: Tensor) -> Tensor:
        return scales.repeat_interleave(self.group, 1)[:, : like.shape[1]]

    def loss(self, scales: dict[str, Tensor]) -> float:
        own = {f"{n}.weight": q * self.over(scales[n], q) for n, q in self.codes.items()}
        y = functional_call(self.model, self.rest | own, (X.double(),))
        return float((y - Y).square().mean())

    def step(self, t: int, clip: float) -> float:
        z = {}
        for name, s in self.scales.items():
            key = torch.tensor(stream_key(0, "z", t, 0, f"{name}.scales"))
            z[name] = draw(torch.arange(s.numel()), s.numel(), key, "gaussian").double()
            z[name] = z[name].view(s.shape)
        there, back = (
            self.loss({n: s + sign * self.eps * z[n] for n, s in self.scales.items()})
            for sign in (1, -1)
        )
        p = (there - back) / (2 * self.eps)
        cut = max(-clip, min(p, clip))
        self.scales = {n: (s - self.lr * cut * z[n]).clamp(min=0) for n, s in self.scales.items()}
        return p


@pytest.mark.parametrize(("bits", "lr", "eps"), [(4, 2e-4, 1e-3), (8, 4e-6, 5e-5)])
def test_thirty_steps_are_those_of_the_rule(bits: int, lr: float, eps: float) -> None:
    """In float32 against float64: p to 1e-2 of its size over 30 steps, scales to 1e-4 of theirs.

    A loss of size 1 has 1e-7 of rounding, which p = dL / 2 eps has times 1 / 2 eps.
    """
    model, size = network(), 0.0
    reference = Reference(copy.deepcopy(model).double(), bits, 16, lr, eps)
    first = {n: s.clone() for n, s in reference.scales.items()}
    opt = qzo(model, weight_bits=bits, lr=lr, eps=eps, clip_projected_grad=3.0)
    for step in range(30):
        (p,) = opt.step(closure_of(model)).projected_grad
        wanted = reference.step(step, 3.0)
        size = max(size, abs(wanted))
        assert p == pytest.approx(wanted, abs=1e-2 * size)
    assert size > 3.0  # the clip matters
    for name, layer in quantised_layers(model).items():
        scales = layer.scales.detach().double()
        largest = float(first[name].max())
        torch.testing.assert_close(scales, reference.scales[name], atol=1e-4 * largest, rtol=0)
        assert (scales - first[name]).abs().max() > 1e-2 * largest  # they have moved
        codes = layer.codes(slice(0, layer.out_features)).double()
        assert torch.equal(codes, reference.codes[name])


def test_scales_never_fall_below_zero_and_may_rise_again() -> None:
    """At a large lr some are cut at 0; a later step takes some of these up again."""
    model = network()
    opt = qzo(model, lr=1e-2)
    cut: dict[str, Tensor] = {}
    rose = 0
    for _ in range(20):
        opt.step(closure_of(model))
        for name in SCALES:
            scales = model.get_parameter(name).detach()
            assert (scales >= 0).all()
            rose += int(
                (cut.get(name, torch.zeros_like(scales, dtype=torch.bool)) & (scales > 0)).sum()
            )
            cut[name] = scales == 0
    assert rose > 0
    assert sum(int(c.sum()) for c in cut.values()) > 0


@pytest.mark.parametrize(("bits", "dtype"), FORMS)
def test_scales_alone_are_trained(bits: int, dtype: torch.dtype) -> None:
    """Codes, biases and the norm keep their bits; no tensor of floats is as large as a matrix."""
    model = network(dtype)
    numel = {n: p.numel() for n, p in model.named_parameters()}
    opt = qzo(model, weight_bits=bits)
    before = held(model)
    for _ in range(3):
        opt.step(closure_of(model))
    after = held(model)
    assert {n for n in after if not torch.equal(after[n], before[n])} == set(SCALES)
    assert tuple(opt.trained) == SCALES
    assert opt.num_weights == 49 * 2 + 33 * 4
    assert [p.requires_grad for p in opt.trained.values()] == [True, True]
    for name, layer in quantised_layers(model).items():
        assert layer.weight.element_size() == 1
        assert layer.weight.numel() == layer.out_features * -(-layer.in_features * bits // 8)
        assert layer.scales.numel() <= numel[f"{name}.weight"] // 12  # groups of 16, or shorter
    assert all(p.grad is None for p in model.parameters())


def test_others_are_trained_where_asked() -> None:
    model = network()
    opt = qzo(model, others="trained", freeze=["2.*"])
    before = held(model)
    opt.step(closure_of(model))
    after = held(model)
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    assert moved == {*SCALES, "0.bias", "3.bias"} == set(opt.trained)


@pytest.mark.parametrize("executor", ["lockstep", "batched", "in_place"])
def test_executors_agree(executor: str) -> None:
    """Lockstep to the last bit; a batch and in_place to rounding, 1e-5 of the largest scale."""
    models = [network(), network()]
    opts = [qzo(models[0]), qzo(models[1], executor=executor)]
    for model, opt in zip(models, opts, strict=True):
        for _ in range(5):
            opt.step(closure_of(model))
    first, second = (m.get_parameter("0.scales").detach() for m in models)
    atol = 0.0 if executor == "lockstep" else 1e-5 * float(first.max())
    torch.testing.assert_close(first, second, atol=atol, rtol=0)


def test_the_self_check_passes_and_a_failed_step_changes_nothing() -> None:
    model = network()
    opt = qzo(model, check=True)
    assert opt.self_check(closure_of(model)) >= 1
    before, calls = held(model), 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        return closure_of(model)() * (float("nan") if calls == 2 else 1.0)

    with pytest.raises(ArithmeticError):
        opt.step(failing)
    assert same(held(model), before)


# --- resume, replay, ranks ---------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "dtype"), FORMS)
def test_a_replay_is_the_run_and_a_run_goes_on(bits: int, dtype: torch.dtype) -> None:
    whole, again = network(dtype), network(dtype)
    opt, other = qzo(whole, weight_bits=bits), qzo(again, weight_bits=bits)
    for step in range(6):
        record = opt.step(closure_of(whole))
        if step < 3:
            other.replay(1e-5, record.scalars)
        else:  # goes on from its own state
            other.restore(*other.snapshot())
            assert other.step(closure_of(again)).scalars == record.scalars
        assert same(held(whole), held(again))
    assert opt.identity() == other.identity()


def test_two_ranks_make_the_steps_of_one() -> None:
    import threading

    alone, models, ranks = network(), [network(), network()], Ranks(2)
    of_one = qzo(alone, num_queries=2)
    for _ in range(3):
        of_one.step(closure_of(alone))

    def steps(rank: int) -> None:
        opt = qzo(models[rank], num_queries=2)
        for _ in range(3):
            opt.step(ranks.closure(rank, closure_of(models[rank])))

    threads = [threading.Thread(target=steps, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(held(model), held(alone)) for model in models)


# --- what is refused, and a run ----------------------------------------------------------------


def test_a_model_without_scales_is_refused() -> None:
    small = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="no linear layer of the model has 1024 weights or more"):
        qzo(small)
    assert qzo(small, others="trained").num_weights == 12


def test_an_adapter_is_refused() -> None:
    words = [
        "method=qzo",
        "model=tiny-llama",
        "task=toy",
        "+method.adapter={kind: lora, r: 2, alpha: 4, targets: [q_proj]}",
    ]
    with pytest.raises(UserError, match=r"method\.adapter beside method=qzo"):
        check(compose(words))


def test_a_run_keeps_its_scales_and_is_exported_as_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export is the model that was trained: its weights are codes x scales."""
    from safetensors.torch import load_file

    words = "task.num_train=8 task.num_dev=4 task.num_test=4 task.prompt=0 batch_size=2 steps=3"
    words += f" zero_shot=false eval_every=2 runs_dir={tmp_path} method.executor=sequential"
    assert main(["train", "method=qzo", "model=tiny-llama", "task=toy", *words.split()]) == 0
    (run,) = (tmp_path / "default").iterdir()
    assert "linear layers in 4 bits" in capsys.readouterr().out
    assert main(["replay", str(run), "--split", "none"]) == 0
    delta = tmp_path / "a.delta"
    assert main(["export", str(run), str(delta), "--delta"]) == 0
    assert main(["replay", str(delta), "--split", "none"]) == 0
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    groups = saved[name][0].abs()
    assert f"{name.removesuffix('weight')}scales" not in saved
    assert len(set((groups / groups.max() * 7).round(decimals=3).tolist())) <= 8
    assert (
        main(["plan", "method=qzo", "model=tiny-llama", "task=toy", "compute_dtype=bfloat16"]) == 0
    )
    capsys.readouterr()


def test_codes_are_in_the_model_before_the_method_is_made() -> None:
    model = network()
    opt = qzo(model)
    again = qzo(model)  # as for an export: it finds the codes and leaves them
    assert tuple(again.trained) == tuple(opt.trained) == SCALES
    assert all(isinstance(model[i], QuantisedLinear) for i in (0, 3))
