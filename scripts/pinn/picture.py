"""Draw what was solved: exact, found, their difference, and the error along the training."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from pinn.problems import PROBLEMS
from pinn.training import Trained

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: dict[str, Any] = {
    "svg.hashsalt": "smezo",
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.frameon": False,
    "legend.fontsize": 7,
}


def draw(groups: Mapping[str, Sequence[Trained]], file: Path) -> None:
    """Write an SVG with a row for each problem.

    Args:
        groups: trainings that differ in the seed alone, by their label. The first of a problem is
            shown as a map, all of them as lines.
        file: ends in .svg.
    """
    names = list(dict.fromkeys(g[0].settings.problem for g in groups.values()))
    with style.context(["default", STYLE]):
        page = Figure(figsize=(11, 2.7 * len(names)), layout="constrained")
        FigureCanvasAgg(page)
        axes = page.subplots(len(names), 4, squeeze=False)
        for row, name in zip(axes, names, strict=True):
            of_problem = {k: g for k, g in groups.items() if g[0].settings.problem == name}
            label, first = next(iter(of_problem.items()))
            _maps(page, row[:3], label, first[0])
            _errors(row[3], of_problem)
        out = io.BytesIO()
        page.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    file.write_bytes(out.getvalue())


def _maps(page: Figure, axes: Sequence[Any], label: str, trained: Trained) -> None:
    problem = PROBLEMS[trained.settings.problem]
    points, x, y = problem.section(41)
    exact, found = problem.exact(points), trained.found(points)
    levels = torch.linspace(float(exact.min()), float(exact.max()), 15).tolist()
    most = float((found - exact).abs().max())
    around_0 = torch.linspace(-most, most, 15).tolist()

    def one(axis: Any, title: str, values: Tensor, levels: list[float], colours: str) -> None:
        grid = values.view(len(y), len(x))
        drawn = axis.contourf(x, y, grid, levels=levels, cmap=colours, extend="both")
        page.colorbar(drawn, ax=axis)
        axis.set(title=title, xlabel=problem.axes[0], ylabel=problem.axes[1])

    one(axes[0], f"{problem.name}: exact", exact, levels, "viridis")
    one(axes[1], f"found, seed {trained.settings.seed}\n{label}", found, levels, "viridis")
    one(axes[2], "found - exact", found - exact, around_0, "RdBu_r")


def _errors(axis: Any, groups: Mapping[str, Sequence[Trained]]) -> None:
    for colour, (label, group) in zip(COLOURS * len(groups), groups.items(), strict=False):
        for k, trained in enumerate(group):
            steps, errors = zip(*trained.errors, strict=True)
            share = [step / steps[-1] for step in steps]
            name = f"{label}, {steps[-1]} steps" if k == 0 else None
            axis.plot(share, errors, color=colour, linewidth=1, label=name)
    axis.set(
        title="relative l2 error, a line a seed",
        xlabel="share of the steps",
        yscale="log",
    )
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.legend()
