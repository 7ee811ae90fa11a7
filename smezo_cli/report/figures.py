"""Find the points of the papers' figures in runs: what `smezo plot` draws.

Seeds are merged, and nothing else: runs that differ in a setting are lines of their own. Nothing is
interpolated, smoothed away or counted twice; what is left out is said. No torch, no matplotlib.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from smezo_cli.errors import UserError
from smezo_cli.report.runs import Run, one_a_seed, repeats
from smezo_cli.report.series import (
    Figure,
    Group,
    Panel,
    Series,
    Source,
    by_panel,
    check_rows,
    differing_settings,
    finished,
    merge_seeds,
    method_name,
    natural,
    one_metric,
    requested_sparsity,
    score,
)


def sparsity(sources: Sequence[Source]) -> Figure:
    """Return test accuracy against sparsity; MeZO stands at 0, zero-shot is a level.

    Of several learning rates the one with the best dev accuracy of the first seed is taken, as in
    a table (:mod:`smezo_cli.report.cells`).

    Raises:
        UserError: runs of one point differ in more than lr, or were tested on other rows.
    """
    figure = Figure("sparsity", "sparsity (fraction of weights not perturbed)")
    for title, members in by_panel(sources, lambda _: "").items():
        runs = [run for source in members for run in finished(source.runs)]
        check_rows(title, members)
        panel = Panel(title, f"test {one_metric(members)} (%)")
        points: dict[str, dict[float, list[Group]]] = {}
        for source in members:
            at: dict[tuple[str, float], list[Run]] = {}
            for run in finished(source.runs):
                place = 0.0 if method_name(run).startswith("MeZO") else requested_sparsity(run)
                if place is None:
                    words = f"{title}: {method_name(run)} has no sparsity and is left out."
                    figure.notes += [words] if words not in figure.notes else []
                else:
                    at.setdefault((method_name(run), place), []).append(run)
            for (name, place), found in at.items():
                groups = [
                    _one_a_seed(f"{title}, {name} at sparsity {place:g}", group, figure.notes)
                    for group in merge_seeds([Source(tuple(found), name, source.chosen)], ())
                ]
                points.setdefault(name, {}).setdefault(place, []).extend(groups)
        for name in sorted(points, key=natural):
            best = {
                place: _best(f"{title}, {name} at sparsity {place:g}", groups, figure.notes)
                for place, groups in sorted(points[name].items())
            }
            values = tuple(tuple(score(r) for r in group.runs) for group in best.values())
            panel.series.append(Series(name, tuple(best), values))
        zero = [
            100 * float(z[run.metric])
            for run in runs
            if isinstance((z := run.result.get("zero_shot") or {}).get(run.metric), int | float)
        ]
        if len(set(zero)) == 1:
            panel.levels.append(("zero-shot", zero[0]))
        elif zero:
            low, high = min(zero), max(zero)
            panel.levels.append(("zero-shot (mean)", statistics.fmean(zero)))
            figure.notes.append(f"{title}: zero-shot differs, {low:.1f} to {high:.1f}.")
        figure.add(panel)
    return figure


def _one_a_seed(where: str, group: Group, notes: list[str]) -> Group:
    """Return the group with one run a seed; others are noted."""
    kept, repeated = one_a_seed(group.runs)
    notes += repeats(where, repeated)
    return replace(group, runs=kept)


def _best(where: str, groups: Sequence[Group], notes: list[str]) -> Group:
    """Return the group with the best dev score, of groups that differ in lr."""
    if len(groups) == 1:
        return groups[0]
    differing = sorted(
        {
            word.partition("=")[0]
            for g in groups
            for word in differing_settings(g.settings, [other.settings for other in groups])
        }
        - {"lr"}
    )
    if differing or any(g.chosen for g in groups):
        raise UserError(
            f"{where}: these runs differ in {', '.join(differing) or 'lr'} and are not mixed; "
            f"choose with KEY=VALUE, such as {differing[0] if differing else 'lr'}=X."
        )
    shared = set.intersection(*({*g.by_seed()} for g in groups))
    if not shared:
        raise UserError(
            f"{where}: no seed was run with every lr, so that dev cannot choose one; "
            "choose with lr=X."
        )
    seed = min(shared)

    def on_dev(group: Group) -> tuple[float, float]:
        run = group.by_seed()[seed]
        best = (run.result.get("dev") or {}).get("best") or {}
        return best.get(run.metric, 0.0), -best.get("loss", 0.0)

    chosen = max(groups, key=on_dev)
    rates = ", ".join(f"{g.runs[0].result['lr']:g}" for g in groups)
    lr = chosen.runs[0].result["lr"]
    notes.append(f"{where}: lr={lr:g} of {rates}, by dev of seed {seed}.")
    return chosen


def lr(sources: Sequence[Source]) -> Figure:
    """Return test accuracy against the learning rate, with marks where all seeds diverged."""
    figure = Figure("lr", "learning rate")
    for title, members in by_panel(sources, lambda _: "").items():
        check_rows(title, members)
        panel = Panel(title, f"test {one_metric(members)} (%)")
        for group in merge_seeds(members, ("lr",)):
            at: dict[float, list[Run]] = {}
            for run in group.runs:
                if run.result.get("lr") is not None:
                    at.setdefault(float(run.result["lr"]), []).append(run)
            if not at:
                figure.notes.append(f"{title}: {group.name} has no lr and is left out.")
                continue
            done: dict[float, tuple[Run, ...]] = {}
            for rate in sorted(at):
                kept, repeated = one_a_seed(finished(at[rate]))
                figure.notes += repeats(f"{title}, {group.name}, lr={rate:g}", repeated)
                done[rate] = kept
            panel.series.append(
                Series(
                    group.name,
                    tuple(rate for rate, kept in done.items() if kept),
                    tuple(tuple(score(r) for r in kept) for kept in done.values() if kept),
                    tuple(rate for rate, kept in done.items() if not kept),
                )
            )
        figure.add(panel)
    return figure


def memory(sources: Sequence[Source]) -> Figure:
    """Return peak memory by method in GB (1e9 bytes): the allocator's on CUDA, else resident."""
    figure = Figure("memory", "peak memory (GB, the largest of the runs)")

    def device(run: Run) -> str:
        return str(run.result.get("device") or "").partition(":")[0]

    for title, members in by_panel(sources, device).items():
        panel = Panel(title, "")
        for group in merge_seeds(members, ("lr", "eval_every", "steps", "lr_schedule")):
            peaks = tuple(
                float(run.result["peak_memory_bytes"]) / 1e9 for run in finished(group.runs)
            )
            if peaks:
                panel.series.append(Series(group.name, (0.0,), (peaks,)))
        figure.add(panel)
    return figure
