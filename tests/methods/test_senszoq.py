"""SensZOQ against a reference in float64: its mask, its steps, and whole runs that share a mask."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from smezo_cli.cli.verbs import main
from smezo_cli.methods.senszoq import SensZOQ
from smezo_cli.models.quantised import freeze_as_codes
from smezo_cli.store import mask
from smezo_cli.store.saved import Saved, save_tensors
from smezo_cli.zo.step import NonFiniteLoss
from tests.methods.reference import weights64, z_of
from tests.methods.test_every_method import node_of
from tests.zo.test_optimizer import X, Y, bits, closure_of, mlp, same, seeded, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"sparsity": 0.9, "scope": "global"}
NAMES = ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"]


def losses_of(model: nn.Module, num: int = 16) -> list[Callable[[], Tensor]]:
    """The loss of one row at a time."""

    def one(k: int) -> Tensor:
        dtype = next(model.parameters()).dtype
        return (model(X[k : k + 1].to(dtype)).double() - Y[k]).square().mean()

    return [lambda k=k: one(k) for k in range(num)]  # type: ignore[misc]  # a default binds k


def chosen(model: nn.Module, **settings: Any) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return SensZOQ.choose(model, parameters, {"": losses_of(model)}, SETTINGS | settings)


def reference_mask(model: nn.Module, sparsity: float, scope: str) -> dict[str, Tensor]:
    """The largest means of squared gradients of single rows, by autograd and a sort."""
    twin = mlp().double()
    names, squares = list(dict(twin.named_parameters())), dict[str, Tensor]()
    for loss in losses_of(twin):
        found = torch.autograd.grad(loss(), list(twin.parameters()))
        for name, g in zip(names, found, strict=True):
            squares[name] = squares.get(name, 0) + g.square().view(-1)
    masks = {}
    every = torch.cat(list(squares.values()))
    for name in names:
        pool = every if scope == "global" else squares[name]
        kept = max(1, len(pool) - round(sparsity * len(pool)))
        places = (squares[name] >= pool.sort(descending=True).values[kept - 1]).nonzero().view(-1)
        if len(places):
            masks[name] = places
    return masks


def made(model: nn.Module, index: dict[str, Tensor] | None, **more: Any) -> SensZOQ:
    given = {"lr": 1e-2, "eps": 1e-3, "backend": "eager", "check": False}
    return SensZOQ(model, index=index, **given | {"executor": "sequential"} | more)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.999])
def test_the_mask_is_that_of_the_mean_squared_gradients_of_single_rows(
    scope: str, sparsity: float
) -> None:
    model = mlp()
    before = weights_of(model)
    found = chosen(model, sparsity=sparsity, scope=scope)
    wanted = reference_mask(model, sparsity, scope)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert same(weights_of(model), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_places_are_counted_beside_the_state() -> None:
    """8 bytes each; a plan counts the mask by itself."""
    index = chosen(mlp())
    opt = made(mlp(), index)
    assert opt.mask_bytes == 8 * sum(map(len, index.values())) > 0
    assert opt.state_bytes == 0
    assert made(mlp(), None).mask_bytes == 0


def test_the_default_step_is_about_as_long_as_that_of_mezo() -> None:
    """z of a thousandth of the weights is sqrt(1000) times shorter."""
    found, mezo = (node_of(name) for name in ("senszoq", "mezo"))
    shorter = (1 - found["sparsity"]) ** 0.5
    assert found["lr"] * shorter == pytest.approx(mezo["lr"], rel=0.1)


def test_squares_of_the_gradient_of_the_batch_are_another_mask() -> None:
    """The mean over rows of squares is not the square of the mean: the rows' gradients differ."""
    model = mlp()
    of_rows = chosen(model, sparsity=0.8)
    whole = {"": [closure_of(model)]}
    settings = SETTINGS | {"sparsity": 0.8}
    of_batch = SensZOQ.choose(model, dict(model.named_parameters()), whole, settings)
    assert {n: p.tolist() for n, p in of_rows.items()} != {
        n: p.tolist() for n, p in of_batch.items()
    }


def test_what_is_frozen_gets_no_gradient_and_keeps_its_flag() -> None:
    model = mlp()
    some = {n: p for n, p in model.named_parameters() if n.startswith("0.")}
    model.get_parameter("3.bias").requires_grad_(False)
    found = SensZOQ.choose(model, some, {"": losses_of(model)}, SETTINGS)
    assert found.keys() <= {"0.weight", "0.bias"}
    assert [p.requires_grad for _, p in model.named_parameters()] == [True] * 5 + [False]


def test_entries_without_a_gradient_are_never_taken() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(8))

        def forward(self) -> Tensor:
            return self.w[:3].square().sum()

    model = Half()
    found = SensZOQ.choose(model, {"w": model.w}, {"": [model]}, SETTINGS | {"sparsity": 0.0})
    assert found["w"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no weight has a gradient"):
        SensZOQ.choose(model, {"w": model.w}, {"": [lambda: model.w.sum() * 0]}, SETTINGS)
    with pytest.raises(NonFiniteLoss):
        SensZOQ.choose(model, {"w": model.w}, {"": [lambda: model.w.sum() / 0]}, SETTINGS)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_thirty_steps_are_those_of_the_paper(scope: str) -> None:
    """Float32 against float64: what is rounded 30 times stays below 2e-4 of weights about 1."""
    model, twin = mlp(), mlp().double()
    index = chosen(model, scope=scope, sparsity=0.8)
    opt = made(model, index)
    masks = {n: torch.zeros(p.numel(), dtype=torch.float64) for n, p in twin.named_parameters()}
    for name, places in index.items():
        masks[name][places] = 1
    for step in range(30):
        opt.step(closure_of(model))
        z, losses = z_of(weights64(twin), step), []
        mz = {n: masks[n].view(p.shape) * z[n] for n, p in twin.named_parameters()}
        with torch.no_grad():
            for shift in (1e-3, -2e-3):
                for name, p in twin.named_parameters():
                    p += shift * mz[name]
                losses.append(float(closure_of(twin)()))
            slope = (losses[0] - losses[1]) / 2e-3
            for name, p in twin.named_parameters():
                p += (1e-3 - 1e-2 * slope) * mz[name]
    for name, found in weights64(model).items():
        torch.testing.assert_close(found, weights64(twin)[name], rtol=0, atol=2e-4)
        at_rest = bits(model.get_parameter(name)) == bits(mlp().get_parameter(name))
        assert bool(at_rest.view(-1)[masks[name] == 0].all())
    assert not same(weights_of(model), weights_of(mlp()))
    # Of all weights that might have been chosen, tensors without one included.
    wanted = sum(map(len, index.values())) / sum(p.numel() for p in model.parameters())
    assert opt.active_share() == pytest.approx(wanted)


def test_a_mask_belongs_to_the_identity_and_to_the_tensors() -> None:
    index = chosen(mlp())
    other = chosen(mlp(), sparsity=0.8)
    first, again, third = (made(mlp(), i).identity() for i in (index, dict(index), other))
    assert first == again
    assert first["index"] != third["index"]
    with pytest.raises(ValueError, match="entries of nothing"):
        made(mlp(), {"nothing": torch.tensor([0])})
    with pytest.raises(ValueError, match="outside"):
        made(mlp(), {"0.bias": torch.tensor([11])})
    with pytest.raises(ValueError, match="in order"):
        made(mlp(), {"0.bias": torch.tensor([3, 3])})
    with pytest.raises(ValueError, match="in_place"):
        made(mlp(), index, executor="in_place")


def test_steps_around_codes_are_those_of_a_model_whose_frozen_weights_are_rounded() -> None:
    """Thirty steps against float64, at the noise of the weights that a layer keeps.

    A probe's losses are of float32 products over 32 columns, so 2e-4 bears them, as above.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    x = torch.randn(8, 32, generator=seeded(3))

    def loss(of: nn.Module, dtype: torch.dtype) -> Callable[[], Tensor]:
        return lambda: (of(x.to(dtype)).double() - 1).square().mean()

    index = {"0.weight": torch.tensor([5, 77, 1023]), "2.bias": torch.tensor([1])}
    exact = model[0].weight.detach().clone()
    freeze_as_codes(model, {"0.weight": index["0.weight"]}, bits=4, group_size=16)
    opt = made(model, index, frozen_bits=4)
    assert {t.name for t in opt.targets} == {"0.kept", "2.bias"}
    assert opt.active_share() == pytest.approx(4 / (32 * 32 + 32 + 64 + 2))
    assert opt.identity() != made(model, index).identity()
    layer: Any = model[0]
    twin = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)).double()
    with torch.no_grad():
        twin[0].weight.copy_(layer.dense())
        for name in ("0.bias", "2.weight", "2.bias"):
            twin.get_parameter(name).copy_(model.get_parameter(name))
    off = twin[0].weight.view(-1) != exact.double().view(-1)
    assert off.sum() > 900
    assert not off[index["0.weight"]].any()
    trained = {"0.kept": ("0.weight", index["0.weight"]), "2.bias": ("2.bias", index["2.bias"])}
    for step in range(30):
        opt.step(loss(model, torch.float32))
        z, losses = z_of({"0.kept": torch.zeros(3), "2.bias": torch.zeros(2)}, step), []
        z["2.bias"] = z["2.bias"][1:]
        with torch.no_grad():
            for shift in (1e-3, -2e-3):
                for own, (name, at) in trained.items():
                    twin.get_parameter(name).view(-1)[at] += shift * z[own]
                losses.append(float(loss(twin, torch.float64)()))
            slope = (losses[0] - losses[1]) / 2e-3
            for own, (name, at) in trained.items():
                twin.get_parameter(name).view(-1)[at] += (1e-3 - 1e-2 * slope) * z[own]
    torch.testing.assert_close(layer.dense().double(), twin[0].weight, rtol=0, atol=2e-4)
    torch.testing.assert_close(model[2].bias.double(), twin[2].bias, rtol=0, atol=2e-4)
    assert (layer.kept - exact.view(-1)[index["0.weight"]]).abs().max() > 1e-3


# --- files -----------------------------------------------------------------------------------

MODEL = mask.Model({"a": [3, 4], "b": [5]}, "float32", "0123456789ab")
INDEX = {"a": torch.tensor([0, 7, 11]), "b": torch.tensor([4])}


def test_a_mask_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / mask.NAME
    mask.write(path, INDEX, MODEL)
    found = mask.read(path, MODEL)
    assert found.keys() == INDEX.keys()
    assert all(torch.equal(found[n], INDEX[n]) and found[n].dtype == torch.int64 for n in found)
    assert Saved(path)["a"].dtype == torch.int32
    half = mask.Model(MODEL.shapes, "bfloat16", "ba9876543210")  # other digits, as of other bits
    assert mask.read(path, half).keys() == INDEX.keys()


def test_what_is_no_mask_of_the_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    mask.write(path, INDEX, MODEL)
    whole = path.read_bytes()

    def refused(words: str, model: mask.Model = MODEL) -> None:
        with pytest.raises(Exception, match=words) as caught:
            mask.read(path, model)
        assert type(caught.value).__name__ == "UserError"
        assert str(caught.value).endswith(".")

    refused("another model", mask.Model(MODEL.shapes, "float32", "ffffffffffff"))
    refused("another model", mask.Model({"a": [4, 3], "b": [5]}, "float32", MODEL.fingerprint))
    refused("another model", mask.Model({"b": [5]}, "float32", MODEL.fingerprint))
    for content in (b"", b"no tensors", whole[:-5], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(content)
        refused("damaged")
    save_file(INDEX, path)  # of somebody else: no word on the model
    refused("damaged")
    about = {"shapes": {n: MODEL.shapes[n] for n in INDEX}, "dtype": "float32"}
    about["model"] = MODEL.fingerprint
    for bad in ([3, 1, 0], [0, 99], [-1, 2]):
        save_tensors(path, INDEX | {"a": torch.tensor(bad)}, about)
        refused("damaged")
    save_tensors(path, INDEX | {"a": torch.ones(3)}, about)
    refused("damaged")
    with path.open("wb") as file:
        file.truncate(1 << 30)  # a hole: takes no room
    refused("at most")
    path.unlink()
    refused("No such file")


# --- whole runs ------------------------------------------------------------------------------

_TINY = [
    *("method=senszoq", "model=tiny-llama", "device=cpu", "task=toy", "task.prompt=0"),
    *("task.num_train=8", "task.num_dev=4", "task.num_test=4", "sparsity=0.99", "lr=1e-2"),
    *("batch_size=2", "eval_every=2", "lr_schedule=constant", "method.mask_rows=3"),
    "method.executor=sequential",
]


def test_the_plan_counts_the_backpropagation_of_the_mask(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stages = {}
    for method in ("method=senszoq", "method=mezo"):
        words = [method if word.startswith("method=") else word for word in _TINY]
        kept = [w for w in words if "mask_rows" not in w and not w.startswith("sparsity")]
        assert main(["plan", *kept]) == 0
        lines = capsys.readouterr().out.splitlines()
        stages[method] = [line.split()[0] for line in lines if line.startswith("    ")]
    assert "mask" in stages["method=senszoq"]
    assert "mask" not in stages["method=mezo"]


def train(tmp_path: Path, *words: str) -> int:
    return main(["train", *_TINY, f"runs_dir={tmp_path}", *words])


def test_runs_keep_share_and_refuse_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "steps=3") == 0
    (run,) = (tmp_path / "default").iterdir()
    kept = (run / mask.NAME).read_bytes()
    result = json.loads((run / "result.json").read_text())
    assert "3 training rows" in capsys.readouterr().out
    # Goes on, with the mask that it has: the numbers are those of a run that was never stopped.
    assert train(tmp_path, "steps=5") == 0
    assert "of an earlier start" in capsys.readouterr().out
    assert (run / mask.NAME).read_bytes() == kept
    assert main(["replay", str(run)]) == 0
    assert main(["eval", str(run), "--step", "1"]) == 0
    # The mask of another run: the same weights in the end.
    assert train(tmp_path / "b", "steps=5", f"method.mask_from={run}") == 0
    (other,) = (tmp_path / "b" / "default").iterdir()
    assert (other / mask.NAME).read_bytes() == kept
    ends = [json.loads((r / "result.json").read_text())["weights"] for r in (run, other)]
    assert ends[0] == ends[1]
    assert result["steps"] == 3
    capsys.readouterr()
    refusals = [
        (["export", str(run), str(tmp_path / "d"), "--delta"], "a delta does not hold"),
        (["train", *_TINY, "steps=2", f"runs_dir={tmp_path / 'c'}", "method.mask_from=/no"], "/no"),
        (
            [
                *("train", *_TINY, "steps=2", f"runs_dir={tmp_path / 'c'}", "model=tiny-opt"),
                f"method.mask_from={run}",
            ],
            "another model",
        ),
    ]
    for words, expected in refusals:
        assert main(words) == 2
        said = capsys.readouterr().err
        assert expected in said
        assert "Traceback" not in said
    (run / mask.NAME).write_bytes(kept[:-3])
    assert main(["replay", str(run), "--split", "none"]) == 2
    assert "damaged" in capsys.readouterr().err
    assert train(tmp_path, "steps=6") == 0  # makes it anew, and goes on
    assert (run / mask.NAME).read_bytes() == kept


def test_a_run_around_codes_goes_on_and_is_replayed_scored_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method.frozen_bits=4", 'method.freeze=["*mlp*"]', "dtype=bfloat16", "sparsity=0.9"]
    assert train(tmp_path, "steps=3", *words) == 0
    (run,) = (tmp_path / "default").iterdir()
    said = capsys.readouterr().out
    assert "in 4 bits around" in said
    assert "was not measured" not in said  # the loss noise of bfloat16
    assert not any("mlp" in name for name in Saved(run / mask.NAME))
    assert train(tmp_path, "steps=5", *words) == 0
    assert main(["replay", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    assert main(["eval", str(run), "--step", "1"]) == 0
    assert main(["eval", str(run), "--base"]) == 0
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "Traceback" not in capsys.readouterr().err
