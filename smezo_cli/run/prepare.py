"""Prepare the training: how steps are measured, by which executor, and who watches them."""

from functools import partial

from smezo_cli.files.space import check_space
from smezo_cli.machine.waiting import waiting
from smezo_cli.methods.base import Method
from smezo_cli.run.batches import Batches
from smezo_cli.run.begin import Run
from smezo_cli.run.leader import lead
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.measure import Measure, saying_why_not_batched
from smezo_cli.run.numerics import Numerics
from smezo_cli.run.watch import Watch


def measure_for(run: Run, loaded: Loaded, method: Method) -> Measure:
    """Return what takes the steps, in micro-batches of the size that an earlier start came to."""
    size, notes = run.settings.micro_batch_size, run.notes
    if size is None and (size := notes.get("micro_batch_size")) is not None:
        run.say(f"  micro_batch_size={size}, as the memory was too small for more")

    def halved(line: str, smaller: int) -> None:
        run.say(line)
        notes["micro_batch_size"] = smaller

    tell = partial(lead, run, method)
    weights = loaded.task.weights
    return Measure(loaded.scorer, run.objective, size, run.team, halved, tell, weights)


def passes_of(run: Run, method: Method) -> str | None:
    """Say which passes move the weights; return their name, None if the method has none."""
    passes = getattr(method, "passes", None)
    if passes is None:
        return None
    why = getattr(method, "why_eager", "")
    hint = f" ({why}; fused passes would be faster, with the same numbers)"
    run.say(f"  passes  {passes.name}{hint if why else ''}")
    return str(passes.name)


def prepare(run: Run, method: Method, measure: Measure, batches: Batches) -> None:
    """Choose the executor, check the free space, and note how many weights are trained.

    Raises:
        UserError: a disk is too full, or the memory too small for a single row.
    """
    _choose_executor(run, method, measure, batches)
    notes, weights = run.notes, method.trained.values()
    check_space(run.folder.path, 3 * sum(p.numel() * p.element_size() for p in weights))
    if "active_share" not in notes:
        notes["active_share"] = method.active_share()
        notes["num_trained"] = method.num_weights
    run.say(
        f"  trains {method.num_weights / 1e6:.1f} M weights, "
        f"{notes['active_share']:.4f} of them active"
    )
    if remark := getattr(method, "remark", ""):
        run.say(f"  method  {remark}")


def _choose_executor(run: Run, method: Method, measure: Measure, batches: Batches) -> None:
    """Let a method that can measure its losses in two ways try both on the next batch.

    A run that goes on asks anew: the numbers are the same, and the machine may be another.
    """
    choose = getattr(method, "choose_executor", None)
    if choose is None:
        return
    with saying_why_not_batched(), waiting("trying how losses are measured fastest"):
        seconds = measure.until_it_fits(choose, batches.rows(run.state.step))
    words = ", ".join(f"{name} {spent:.3g} s" for name, spent in seconds.items())
    chosen: str = method.executor  # type: ignore[attr-defined]  # there, where choose_executor is
    run.notes["executor"] = chosen
    if seconds:
        run.say(f"  executor  {chosen} (two forwards: {words})")


def watch_for(run: Run, numerics: Numerics) -> Watch:
    """Return the watchdogs that the settings ask for."""
    return Watch(
        run.notes,
        numerics,
        stop_if_diverged=run.settings.stop_if_diverged,
        patience=run.settings.patience,
        reference=run.notes.get("dev_loss_before"),
        objective=run.objective,
    )
