"""MeZO-Adam: torch's Adam on a gradient written out, its state, its trajectory."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smezo_cli.cli.verbs import main
from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.mezo_adam import MeZOAdam
from tests.zo.test_optimizer import closure_of, mlp, run, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def adam(model: nn.Module, **options: Any) -> MeZOAdam:
    defaults: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "seed": 5, "backend": "eager"}
    defaults |= {"check": False, "executor": "sequential", "keep_noise": False}
    return MeZOAdam(model, **(defaults | options))


def gradients(opt: MeZOAdam, model: nn.Module, projected: list[float]) -> None:
    """g = mean of p_q z_q of the step to come, written out in float64, as .grad."""
    named = dict(model.named_parameters())
    for target in opt.targets:
        g = torch.zeros(target.parameter.numel(), dtype=torch.float64)
        for q, p in enumerate(projected):
            z, _ = opt.mover([q], [1.0]).dense(target)
            g += p * z.double() / len(projected)
        named[target.name].grad = g.view_as(named[target.name]).to(named[target.name].dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_queries": 3},
        {"betas": [0.5, 0.9], "adam_eps": 1e-3},
        {"weight_decay": 0.1},
        {"noise": "rademacher", "freeze": ["2.*"]},
        {"clip_projected_grad": 0.5},
        {"keep_noise": True},
        {"executor": "lockstep"},
    ],
    ids=str,
)
def test_steps_are_those_of_torchs_adam_on_the_gradient_written_out(
    options: dict[str, Any],
) -> None:
    """In float64: one gradient a step however many queries, the lr as scheduled."""
    model, reference = mlp(), mlp().double()
    opt = adam(model, **options)
    theirs = torch.optim.AdamW(
        [p for n, p in reference.named_parameters() if not ("freeze" in options and n[0] == "2")],
        lr=1e-2,
        betas=tuple(options.get("betas", (0.9, 0.999))),
        eps=options.get("adam_eps", 1e-8),
        weight_decay=options.get("weight_decay", 0.0),
    )
    for step in range(8):
        factor = 1 / (1 + step)
        opt.set_lr_factor(factor)
        theirs.param_groups[0]["lr"] = factor * 1e-2
        # The losses are float64, so that those of this call are those of the step.
        found = list(adam_probe(opt, model))
        limit = options.get("clip_projected_grad", float("inf"))
        gradients(opt, reference, [max(-limit, min(g, limit)) for g in found])
        assert list(opt.step(closure_of(model)).projected_grad) == found
        theirs.step()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        # Weights of size 1 are stored to 6e-8 eight times; a move is lr times a ratio of moments,
        # each known to some 1e-6 of itself after eight roundings.
        assert (p.double() - q).abs().max().item() < 1e-6, name
    state = theirs.state_dict()["state"]
    moments = opt.snapshot()[1]
    for index, target in enumerate(opt.targets):
        for key in ("exp_avg", "exp_avg_sq"):
            wanted = state[index][key].view(-1)
            got = moments[f"{target.name}/{key}"]
            torch.testing.assert_close(got.double(), wanted, rtol=2e-5, atol=1e-6)


def adam_probe(opt: MeZOAdam, model: nn.Module) -> list[float]:
    """Projected gradients of the step to come, measured without making it."""
    with torch.no_grad():
        pairs = [opt.losses_at(closure_of(model), q) for q in range(opt.num_scalars)]
    return [(plus - minus) / 2e-3 for plus, minus in pairs]


def test_the_probes_are_those_of_mezo() -> None:
    """Noise is keyed by name and step: at the same weights both methods see the same losses."""
    a, b = mlp(), mlp()
    options: dict[str, Any] = {"eps": 1e-3, "seed": 5, "check": False, "executor": "sequential"}
    mezo = MeZO(b, lr=1e-2, backend="eager", **options)
    assert adam(a).step(closure_of(a)) == mezo.step(closure_of(b))
    assert not same(weights_of(a), weights_of(b))


KINDS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "three queries": {"num_queries": 3},
    "signs": {"noise": "rademacher"},
    "decay": {"weight_decay": 0.1},
    "stochastic": {"rounding": "stochastic"},
    "stochastic, three queries": {"rounding": "stochastic", "num_queries": 3, "weight_decay": 0.1},
    "in place": {"executor": "in_place", "keep_noise": "auto"},
    "noise kept": {"keep_noise": True},
}


def made(model: nn.Module, kind: str, **more: Any) -> list[tuple[float, tuple[float, ...]]]:
    opt, steps = adam(model, **(KINDS[kind] | more)), []
    for step in range(6):
        opt.set_lr_factor(1 / (step + 1))
        record = opt.step(closure_of(model))
        steps.append((opt.param_groups[0]["lr"], record.projected_grad))
    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_gives_the_same_weights_and_the_same_moments(
    kind: str, dtype: torch.dtype
) -> None:
    """Without a forward; and it goes on from there with the same bits."""
    model, again = mlp(dtype), mlp(dtype)
    steps = made(model, kind)
    opt = adam(again, **KINDS[kind])
    for lr, projected_grad in steps[:4]:
        opt.replay(lr, projected_grad)
    for step in (4, 5):
        opt.set_lr_factor(1 / (step + 1))
        assert opt.step(closure_of(again)).projected_grad == steps[step][1]
    assert same(weights_of(model), weights_of(again))
    assert not same(weights_of(model), weights_of(mlp(dtype)))


@pytest.mark.parametrize("kind", ["the paper's", "three queries", "stochastic, three queries"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_and_threads_give_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    """Eager in one thread, Numba's in two, noise kept: tensors of odd sizes, of many chunks too."""

    def large() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 701), nn.Tanh(), nn.Linear(701, 301), nn.Linear(301, 3))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
        return model.to(dtype)

    model, threads = large(), torch.get_num_threads()
    steps = made(model, kind)
    ways: list[dict[str, Any]] = [{"backend": "compiled"}]
    if kind == "the paper's":
        ways.append({"keep_noise": True})
    try:
        torch.set_num_threads(2)
        for way in ways:
            again = large()
            opt = adam(again, **(KINDS[kind] | way))
            for lr, projected_grad in steps:
                opt.replay(lr, projected_grad)
            assert same(weights_of(model), weights_of(again)), way
    finally:
        torch.set_num_threads(threads)


def test_a_snapshot_restored_goes_on_with_the_same_bits() -> None:
    """And weights without their moments take no further step, unless none was made."""
    model, other = mlp(), mlp()
    opt = adam(model)
    run(opt, closure_of(model), 3)
    saved = {n: t.clone() for n, t in opt.snapshot()[1].items()}
    numbers = json.loads(json.dumps(opt.snapshot()[0]))
    other.load_state_dict(model.state_dict())
    resumed = adam(other)
    resumed.restore(numbers, saved)
    assert run(opt, closure_of(model), 3) == run(resumed, closure_of(other), 3)
    assert same(weights_of(model), weights_of(other))
    state = opt.state_dict()
    run(opt, closure_of(model), 1)
    resumed.load_state_dict(state)
    run(resumed, closure_of(other), 1)
    assert same(weights_of(model), weights_of(other))
    resumed.restore(numbers, {})
    with pytest.raises(ValueError, match="the moments of step 3 were not restored"):
        resumed.step(closure_of(other))
    resumed.restore(numbers | {"num_steps": 0}, {})
    resumed.step(closure_of(other))
    for wrong in ({}, {**saved, "0.weight/exp_avg": torch.zeros(3)}):
        with pytest.raises((LookupError, ValueError)):
            resumed.restore(numbers, wrong or {"other": torch.zeros(1)})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"betas": [0.9]}, "two numbers"),
        ({"betas": [0.9, 1.0]}, "two numbers"),
        ({"adam_eps": 0.0}, "adam_eps"),
    ],
    ids=str,
)
def test_arguments_out_of_range(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        adam(mlp(), **options)


# ------------------------------------------------------------------------------------- whole runs

RUN = [
    *("task=toy", "model=tiny-llama", "device=cpu", "method=mezo_adam", "lr=1e-2", "steps=10"),
    *("batch_size=4", "eval_every=3", "full_save_every=4", "task.num_train=32", "task.num_dev=16"),
    *("task.num_test=24", "method.executor=sequential", "task.prompt=0"),
]


def result_of(name: str) -> tuple[Path, Mapping[str, Any]]:
    (folder,) = Path("runs", name).iterdir()
    return folder, json.loads((folder / "result.json").read_text())


def test_a_run_is_replayed_exported_and_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At any step, with the moments of the last whole checkpoint or from the trajectory alone."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *RUN, "name=whole", "steps=14"]) == 0
    _, whole = result_of("whole")
    damages = ("nothing", "moments", "all")
    assert main(["train", *RUN, f"name={damages[0]}"]) == 0
    for damage in damages[1:]:
        shutil.copytree(Path("runs", damages[0]), Path("runs", damage))
    for damage in damages:
        folder, first = result_of(damage)
        saved = {p.name for p in (folder / "checkpoint").iterdir()}
        assert {"optimizer-8.safetensors", "weights-8.safetensors"} <= saved
        assert f"weights-{first['dev']['best']['step']}.safetensors" in saved
        if damage == "moments":
            path = folder / "checkpoint" / "optimizer-8.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        if damage == "all":
            for path in (folder / "checkpoint").glob("*.safetensors"):
                path.unlink()
        capsys.readouterr()
        assert main(["train", *RUN, f"name={damage}", "steps=14"]) == 0
        assert ("optimizer-8.safetensors is damaged" in capsys.readouterr().out) == (
            damage == "moments"
        )
        folder, longer = result_of(damage)
        assert longer["weights"] == whole["weights"]
        assert longer["dev"] == whole["dev"]
        for step in (3, 7, 14):
            assert main(["replay", str(folder), "--step", str(step), "--split", "none"]) == 0
    folder, _ = result_of("nothing")
    assert main(["replay", str(folder)]) == 0
    assert main(["export", str(folder), "my.delta", "--delta", "--step", "5"]) == 0
    assert main(["replay", "my.delta", "--split", "none"]) == 0
    capsys.readouterr()
    assert main(["eval", str(folder), "--step", "11", "--out", "p.jsonl"]) == 0
