"""Draw figures with matplotlib."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smezo_cli.report.series import Figure, Panel, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Page
    from matplotlib.transforms import Transform


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))

STYLE: dict[str, Any] = {
    "svg.hashsalt": "smezo",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "errorbar.capsize": 3,
}


def drawn(figure: Figure, files: Sequence[Path]) -> list[tuple[Path, bytes]]:
    """Draw a figure; return the content of each file."""
    import matplotlib.style

    contents = []
    with matplotlib.style.context(["default", STYLE]):
        drawing = page(figure)
        for file in files:
            form = file.suffix[1:]
            about = {"Software": None} if form == "png" else {"Date": None, "Creator": None}
            out = io.BytesIO()
            drawing.savefig(out, format=form, dpi=160, metadata=about)
            contents.append((file, out.getvalue()))
    return contents


def page(figure: Figure) -> "Page":
    """Draw a figure with matplotlib, its panels in one column or two."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Page

    columns = min(2, len(figure.panels))
    rows = -(-len(figure.panels) // columns)
    longest = max(len(panel.series) for panel in figure.panels)
    height = 0.9 + 0.34 * longest if figure.kind == "memory" else 2.6 + 0.17 * (longest + 1)
    drawing = Page(figsize=(5.2 * columns, height * rows), layout="constrained")
    FigureCanvasAgg(drawing)
    for k, panel in enumerate(figure.panels):
        axes = drawing.add_subplot(rows, columns, k + 1)
        axes.set_title(_plain(panel.title))
        axes.set_xlabel(figure.x)
        if figure.kind == "memory":
            _bars(axes, panel)
        else:
            axes.set_ylabel(panel.y)
            _lines(axes, panel, figure.kind)
    return drawing


def _lines(axes: "Axes", panel: Panel, kind: str) -> None:
    """Draw curves with bands, or points with error bars, and a legend below them."""
    along = kind in ("curve", "active")
    if kind == "lr":
        axes.set_xscale("log")
    if not along:  # points that are moved aside would not count in matplotlib's own limits
        axes.set_autoscale_on(False)
        _set_limits(axes, panel, kind == "lr")
    places = [x for series in panel.series for x in series.x]
    crowd = [k for k, s in enumerate(panel.series) if any(places.count(x) > 1 for x in s.x)]
    crowd = [] if along else crowd
    for k, series in enumerate(panel.series):
        colour = COLOURS[k]
        style: dict[str, Any] = {"color": colour, "linestyle": _DASHES[k]}
        style["label"] = _plain(series.label)
        marker = "" if along and len(series.x) > 60 else _MARKERS[k]
        sd = [value or 0.0 for value in series.sd]
        spread = any(value is not None for value in series.sd)
        if along or not spread:
            axes.plot(series.x, series.mean, marker=marker, **style)
        else:
            # Points of one x are drawn beside each other; the data stay at x.
            aside = 3 * (crowd.index(k) - (len(crowd) - 1) / 2) if k in crowd else 0.0
            style["transform"] = axes.transData + _to_the_right(axes, aside)
            axes.errorbar(series.x, series.mean, yerr=sd, marker=marker, **style)
        if along and spread:
            low = [m - s for m, s in zip(series.mean, sd, strict=True)]
            high = [m + s for m, s in zip(series.mean, sd, strict=True)]
            axes.fill_between(series.x, low, high, color=colour, alpha=0.15, linewidth=0)
        if series.absent:
            axes.plot(
                series.absent,
                [0.0] * len(series.absent),
                transform=axes.get_xaxis_transform(),
                marker="x",
                color=colour,
                linestyle="none",
                clip_on=False,
                label=_plain(f"{series.name}: diverged"),
            )
    for name, value in panel.levels:
        axes.axhline(value, color="#666666", linewidth=1, linestyle=(0, (1, 2)), label=name)
    several = any(len(v) > 1 for series in panel.series for v in series.values)
    words = "mean ± sd over n seeds" if several else "one seed each: no spread"
    count = len(panel.series) + len(panel.levels)
    axes.legend(
        title=words,
        title_fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=1 if count <= 2 else 2,
    )


def _set_limits(axes: "Axes", panel: Panel, is_log: bool) -> None:
    """Set limits that show every point with a margin around it."""
    xs = [x for series in panel.series for x in (*series.x, *series.absent)]
    ys = [value for _, value in panel.levels]
    for series in panel.series:
        for mean, sd in zip(series.mean, series.sd, strict=True):
            ys += [mean - (sd or 0.0), mean + (sd or 0.0)]
    if is_log:
        axes.set_xlim(min(xs) / 1.3, max(xs) * 1.3)
    else:
        axes.set_xlim(min(xs) - 0.05, max(xs) + 0.05)
    if ys:  # else every run has diverged
        margin = 0.05 * (max(ys) - min(ys)) or 1.0
        axes.set_ylim(min(ys) - margin, max(ys) + margin)


def _to_the_right(axes: "Axes", points: float) -> "Transform":
    from matplotlib.transforms import ScaledTranslation

    page = axes.get_figure(root=True)
    assert page is not None
    return ScaledTranslation(points / 72, 0, page.dpi_scale_trans)


def _plain(text: str) -> str:
    """Escape dollar signs, which matplotlib reads as formulas."""
    return text.replace("$", r"\$")


def _bars(axes: "Axes", panel: Panel) -> None:
    """Draw a bar for each method, with the largest peak of its runs behind it."""
    names = [_peak(series)[0] for series in panel.series]
    peaks = [_peak(series)[1] for series in panel.series]
    bars = axes.barh(names, peaks, color=COLOURS[0], height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, max(peaks) * 1.15)


def _peak(series: Series) -> tuple[str, float]:
    (values,) = series.values
    return f"{_plain(series.name)} ({len(values)} run{'s' * (len(values) > 1)})", max(values)
