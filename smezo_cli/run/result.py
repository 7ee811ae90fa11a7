"""Make the content of result.json, and the lines that close a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from smezo_cli.config.describe import command
from smezo_cli.config.digest import digest
from smezo_cli.config.fixed import is_frozen
from smezo_cli.kinds import METRICS
from smezo_cli.models.onednn import num_onednn
from smezo_cli.run import kept_inputs, layers
from smezo_cli.run.begin import Run
from smezo_cli.run.console import duration, in_words
from smezo_cli.run.leader import Dismissed
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.loggers import Loggers
from smezo_cli.run.measure import Measure
from smezo_cli.run.rows import Rows, one_class_left
from smezo_cli.run.watch import report_lines, spike_report
from smezo_cli.store import versions
from smezo_cli.store.folder import SCHEMA
from smezo_cli.store.notes import Notes, noted_demonstrations, noted_prompt
from smezo_cli.store.partial_scores import PartialScores
from smezo_cli.store.trajectory import Recorder
from smezo_cli.store.values import Metrics


@dataclass
class SoFar:
    """Hold what the stages of a run have returned so far, for its result, however it ends.

    Attributes:
        loaded: task and model.
        partial: scores of evaluations whose results are not saved.
        rows: encoded.
        measure: takes the steps.
        passes: name of those that move the weights.
        recorder: of the steps.
        keeps_state: whether the method has tensors that its next step depends on.
        loggers: open.
        dismissed: what the ranks said when they were let go.
    """

    loaded: Loaded | None = None
    partial: PartialScores | None = None
    rows: Rows | None = None
    measure: Measure | None = None
    passes: str | None = None
    recorder: Recorder | None = None
    keeps_state: bool = False
    loggers: Loggers | None = None
    dismissed: Dismissed | None = None


def of(
    run: Run,
    so_far: SoFar,
    status: str,
    *,
    test: Metrics | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """Return the content of result.json; conf/ says what the settings in it mean.

    Args:
        run: the run.
        so_far: what its stages have returned.
        status: "running", "done", "stopped", "failed" or "diverged".
        test: metrics of the best weights on the test rows.
        error: why the run ended.
    """
    s, notes = run.settings, run.notes
    return {
        "schema": SCHEMA,
        "status": status,
        "error": error,
        "task": s.task["name"],
        "model": s.model["name"],
        "method": s.method["name"],
        "recipes": run.recipes,
        "test": test,
        **_found(run, notes),
        **_of_rows(run, so_far, notes),
        **_of_model(run, so_far.loaded, notes),
        **_of_training(run, so_far, notes),
        **_of_machine(run, so_far, notes),
        "digest": digest(run.config),
        "started": run.started,
        "ended": None if status == "running" else versions.now(),
        # There may be fewer threads than at the start.
        "versions": run.versions | {"threads": torch.get_num_threads()},
        "command": command(),
    }


def _found(run: Run, notes: Notes) -> dict[str, Any]:
    """Return both zero-shots, the best evaluation of dev, and the digests of the weights."""
    s, shown = run.settings, noted_demonstrations(notes)
    told = {part: {k: v for k, v in of.items() if k != "text"} for part, of in shown.items()}
    return {
        "zero_shot": notes.get("zero_shot"),
        "zero_shot_calibrated": notes.get("zero_shot_calibrated"),
        "metric": METRICS[s.task["kind"]],
        "objective": None if is_frozen(s.method) else run.objective,
        "demonstrations": told.get("", told or None),
        "dev": {"best": {"step": run.state.best_step, **notes.get("best_look", {})}},
        "weights": notes.get("weights"),
    }


def _of_rows(run: Run, so_far: SoFar, notes: Notes) -> dict[str, Any]:
    """Return the prompt, and what a reader must know of the rows."""
    task = None if so_far.loaded is None else so_far.loaded.task
    data_notes: list[str] = []
    if task is not None:
        left = one_class_left(task, so_far.rows.train if so_far.rows is not None else [])
        data_notes = [*task.notes, *left]
    return {
        "prompt": noted_prompt(notes) if "prompt" in notes else None,
        **_left_out(run, notes),
        "truncated_prompts": notes.get("truncated"),
        "batching": notes.get("batching"),
        "data_fingerprint": None if task is None else task.fingerprint,
        "data_notes": data_notes,
    }


def _left_out(run: Run, notes: Notes) -> dict[str, Any]:
    """Return the prompts that the first rows of dev ruled out: nothing where nobody asked."""
    if run.settings.prompt_rows is None:
        return {}
    return {"prompts_left_out": [of for of in notes.get("prompts", ()) if "left_out" in of]}


def _of_model(run: Run, loaded: Loaded | None, notes: Notes) -> dict[str, Any]:
    """Return which model it was, which rows, and how much of it was trained."""
    s, rows = run.settings, notes.get("rows", {})
    active = {"realised": notes.get("active_share"), "final": notes.get("final_share")}
    config = None if loaded is None else loaded.model.config
    return {
        "model_fingerprint": notes.get("model"),
        # Of a model from the hub, what its revision stood for.
        "model_commit": getattr(config, "_commit_hash", None),
        "trust_remote_code": bool(s.model.get("trust_remote_code")),
        "train_rows": rows.get("train"),
        "test_rows": rows.get("test"),
        "sparsity": {
            "requested": s.sparsity,
            **{name: None if share is None else 1 - share for name, share in active.items()},
        },
        "num_trained": notes.get("num_trained"),
        **layers.noted(s.method, notes),
        # Of a model that also takes images or sound.
        "frozen_unread": None if loaded is None else (loaded.unread or None),
        **kept_inputs.found(loaded, s.keep_inputs),
    }


def _of_training(run: Run, so_far: SoFar, notes: Notes) -> dict[str, Any]:
    """Return how the run trained, and what that took."""
    s, state, measure, dismissed = run.settings, run.state, so_far.measure, so_far.dismissed
    return {
        "lr": s.lr,
        "lr_schedule": s.lr_schedule,
        "warmup_steps": s.warmup_steps,
        "keep": s.keep,
        "eps": s.eps,
        **_resolved(run),
        "batch_size": s.batch_size,
        "batch_order": s.batch_order,
        "micro_batch_size": s.micro_batch_size if measure is None else measure.size,
        "rank": 0,
        "world_size": 1 if run.team is None else run.team.size,
        "query_ranks": s.query_ranks,
        "rank_peak_memory_bytes": None if dismissed is None else dismissed.peaks,
        "rank_micro_batch_sizes": None if dismissed is None else dismissed.sizes,
        "steps": s.steps,
        "step": state.step,
        "stopped_early": notes.get("stopped_early"),
        "num_forwards": state.num_forwards,
        "train_seconds": state.train_seconds,
        "watch": spike_report(notes),
        "numerics": dict(notes.get("numerics", {})),
        "peak_memory_bytes": max(state.peak_memory_bytes, run.memory.read()),
    }


def _resolved(run: Run) -> dict[str, int]:
    """Return the number that eval_every=null stands for: nothing where the setting is one."""
    is_open = run.config.get("eval_every") is None and not is_frozen(run.settings.method)
    return {"eval_every": run.settings.eval_every} if is_open else {}


def _of_machine(run: Run, so_far: SoFar, notes: Notes) -> dict[str, Any]:
    """Return what the run computed with."""
    s, loaded = run.settings, so_far.loaded
    return {
        "seed": s.seed,
        "data_seed": s.data_seed,
        "dtype": s.dtype,
        "compute_dtype": s.compute_dtype or s.dtype,
        "device": str(run.device),
        "device_map": None if loaded is None else loaded.device_map,
        "attention": None if loaded is None else loaded.attention,
        "noise": s.method.get("noise"),
        "passes": so_far.passes,
        "executor": notes.get("executor"),
        # Where oneDNN was wrong on the way, 0.
        "onednn_layers": None if loaded is None else num_onednn(loaded.model),
    }


def summary(run: Run, result: Mapping[str, Any]) -> str:
    """Return the lines that close a finished run."""
    test, sparsity, metric = result["test"], result["sparsity"], result["metric"]
    which = "last" if result["keep"] == "last" else f"best dev {run.objective} at"
    which = f"{which} step {result['dev']['best']['step']}"
    which = "no step" if is_frozen(run.settings.method) else which
    lines = [
        f"test {metric} {test[metric]:.4f} +- {test['standard_error']:.4f}"
        f"  (n={test['n']}, {which})"
    ]
    if line := in_words(test, metric):
        lines.append(f"  {line}")
    for name in ("zero_shot", "zero_shot_calibrated"):
        if f"over_{name}" in test:
            gain = test[f"over_{name}"]
            lines.append(
                f"  over {name.replace('_', '-', 1).replace('_', ' '):<22}"
                f"{result[name][metric]:.4f}  {gain['gain']:+.4f} +- "
                f"{gain['standard_error']:.4f} (paired)"
            )
    if metric == "f1":
        lines.append(f"  exact match    {test['exact_match']:.4f}")
    if test.get("auc") is not None and (result["zero_shot"] or {}).get("auc") is not None:
        lines.append(f"  ranking (AUC)  {result['zero_shot']['auc']:.4f} -> {test['auc']:.4f}")
    if sparsity["requested"] is not None:
        lines.append(
            f"  sparsity  {sparsity['requested']:g} asked, "
            f"{sparsity['realised']:.4f} realised, "
            f"{sparsity['final']:.4f} at the end"
        )
    if found := result.get("dominant_layer"):
        lines.append(f"  layers    {layers.words(found)}")
    lines += report_lines(result["numerics"], result["watch"])
    work = f"{result['num_forwards']} forwards, {duration(result['train_seconds'])} of training"
    lines.append(
        f"  {work if result['num_trained'] else 'nothing trained'}, "
        f"peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
    return "\n".join([*lines, f"  {run.folder.path}/result.json"])
