"""Draw what was solved: exact, found, their difference, and the error along the training."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    "legend.fontsize": 6.5,
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
        axes = page.subplots(len(names), 4, squeeze=False, width_ratios=(1, 1, 1, 1.4))
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
    low, high = float(exact.min()), float(exact.max())
    most = float((found - exact).abs().max())

    def one(axis: Any, title: str, values: Tensor, limits: tuple[float, float], cmap: str) -> None:
        shown = axis.imshow(
            values.view(len(y), len(x)).numpy(),
            vmin=limits[0],
            vmax=limits[1],
            cmap=cmap,
            extent=(float(x[0]), float(x[-1]), float(y[0]), float(y[-1])),
            origin="lower",
            aspect="auto",
            interpolation="bilinear",
        )
        page.colorbar(shown, ax=axis)
        axis.set(title=title, xlabel=problem.axes[0], ylabel=problem.axes[1])

    one(axes[0], f"{problem.name}: exact", exact, (low, high), "viridis")
    one(
        axes[1],
        f"found, seed {trained.settings.seed}\n({label.partition(', ')[2]})",
        found,
        (low, high),
        "viridis",
    )
    one(axes[2], "found - exact", found - exact, (-most, most), "RdBu_r")


def _errors(axis: Any, groups: Mapping[str, Sequence[Trained]]) -> None:
    for colour, (label, group) in zip(COLOURS * len(groups), groups.items(), strict=False):
        for k, trained in enumerate(group):
            steps, errors = zip(*trained.errors, strict=True)
            share = [step / steps[-1] for step in steps]
            name = label.partition(", ")[2] if k == 0 else None  # less that of the problem
            axis.plot(share, errors, color=colour, linewidth=1, label=name)
    axis.set(
        title="relative l2 error, a line a seed",
        xlabel="share of the steps",
        yscale="log",
    )
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.legend(loc="upper right")
