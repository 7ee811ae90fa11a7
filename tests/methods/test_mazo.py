"""MaZO against a reference in float64: its mask over tasks, its steps, and a run on a mixture."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smezo_cli.cli.verbs import main
from smezo_cli.methods.mazo import MaZO
from smezo_cli.store import mask
from tests.methods.reference import weights64, z_of
from tests.methods.test_senszoq import losses_of
from tests.run.test_mixture import parts_word
from tests.zo.test_optimizer import bits, closure_of, mlp, same, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"sparsity": 0.7, "alpha": 1.0, "beta": 1.0}


def tasks_of(model: nn.Module) -> dict[str, list[Callable[[], Tensor]]]:
    """Two tasks: the first rows, and the other ones at a hundred times the loss."""
    every = losses_of(model)
    large = [lambda loss=loss: 100 * loss() for loss in every[5:]]  # type: ignore[misc]  # a default binds loss
    return {"a": every[:5], "b": large}


def chosen(
    model: nn.Module,
    tasks: Mapping[str, list[Callable[[], Tensor]]] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return MaZO.choose(model, parameters, tasks or tasks_of(model), SETTINGS | settings)


def reference_mask(names: list[str], sparsity: float, alpha: float, beta: float) -> dict[str, Any]:
    """Row by row in plain loops, with gradients by autograd."""
    twin = mlp().double()
    tasks, weights = tasks_of(twin), dict(twin.named_parameters())
    every = {
        name: [torch.autograd.grad(loss(), list(weights.values())) for loss in tasks[name]]
        for name in names
    }
    found = {}
    for k, (name, weight) in enumerate(weights.items()):
        width = weight.shape[-1]
        matrix = weight.detach().view(-1, width)
        places = []
        for r, w in enumerate(matrix):
            total = torch.zeros(width, dtype=torch.float64)
            for gradients in every.values():
                g = torch.stack([of_row[k].view(-1, width)[r] for of_row in gradients])
                saliency, greedy = g.square().mean(0) * w**2 / 2, g.mean(0) ** 2
                score = saliency / saliency.norm() + alpha * greedy / greedy.norm()
                score = score + beta * w.abs() / w.norm()
                total += score / score.norm()
            kept = max(1, width - round(sparsity * width))
            places += [r * width + int(c) for c in total.argsort(descending=True)[:kept]]
        found[name] = sorted(places)
    return found


def plain(index: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: places.tolist() for name, places in index.items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.99])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.0, 0.0), (3.0, 0.5)])
def test_the_mask_is_the_top_of_each_row_over_all_tasks(
    sparsity: float, alpha: float, beta: float
) -> None:
    model = mlp()
    before = weights_of(model)
    found = chosen(model, sparsity=sparsity, alpha=alpha, beta=beta)
    assert plain(found) == reference_mask(["a", "b"], sparsity, alpha, beta)
    assert same(weights_of(model), before)


def test_a_task_counts_the_same_whatever_the_scale_of_its_loss() -> None:
    """And one task alone has a mask of its own: the sum is over both."""
    model = mlp()
    tasks = tasks_of(model)
    scaled = {"a": tasks["a"], "b": [lambda f=f: f() / 100 for f in tasks["b"]]}  # type: ignore[misc]  # a default binds f
    both = plain(chosen(model))
    assert plain(chosen(model, scaled)) == both
    for name in ("a", "b"):
        alone = plain(chosen(model, {name: tasks[name]}))
        assert alone == reference_mask([name], 0.7, 1.0, 1.0)
        assert alone != both


def test_rows_without_a_gradient_are_chosen_by_magnitude() -> None:
    model = nn.Embedding(3, 4)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2, 3, 4], [-4, 1, 2, 3], [0, 0, 0, 0]]))
    loss = lambda: model(torch.tensor([0])).square().sum()  # noqa: E731  # a closure of one line
    found = MaZO.choose(model, {"weight": model.weight}, {"": [loss]}, SETTINGS | {"sparsity": 0.5})
    assert found["weight"].tolist() == [2, 3, 4, 7, 8, 9]  # equal scores: the first places


def test_thirty_steps_are_those_of_the_paper() -> None:
    """Float32 against float64: what is rounded 30 times stays below 2e-4 of weights about 1."""
    model, twin = mlp(), mlp().double()
    index = chosen(model)
    opt = MaZO(model, index=index, lr=1e-2, eps=1e-3, backend="eager", check=False)
    masks = {n: torch.zeros(p.numel(), dtype=torch.float64) for n, p in twin.named_parameters()}
    for name, places in index.items():
        masks[name][places] = 1
    for step in range(30):
        record = opt.step(closure_of(model))
        assert record.num_forwards == 2
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


def test_a_mixture_is_trained_and_reported_by_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *("train", "task=mixture", parts_word(tmp_path), "task.num_train=6", "task.num_dev=4"),
        *("task.num_test=4", "model=tiny-llama", "device=cpu", "method=mazo", "lr=1e-3"),
        *("batch_size=2", "eval_every=2", "method.mask_rows=2", "method.executor=sequential"),
        *("lr_schedule=constant", f"runs_dir={tmp_path / 'runs'}"),
    ]
    assert main([*words, "steps=2"]) == 0
    (run,) = (tmp_path / "runs" / "default").iterdir()
    assert "of 4 training rows" in capsys.readouterr().out  # two of each part
    result = json.loads((run / "result.json").read_text())
    assert result["test"]["parts"].keys() == {"toy", "pairs"}
    kept = (run / mask.NAME).read_bytes()
    assert main([*words, "steps=3"]) == 0
    assert (run / mask.NAME).read_bytes() == kept
    assert main(["replay", str(run)]) == 0
