"""Put a run back to where an earlier start left it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smezo_cli.config.digest import digest
from smezo_cli.errors import UserError
from smezo_cli.methods.base import Method, replays
from smezo_cli.run.begin import Run
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.replay import rebuild, restore
from smezo_cli.store.notes import Notes
from smezo_cli.store.trajectory import Damaged, Recorder, Trajectory, differences, read
from smezo_cli.tasks import Prompt
from smezo_cli.tasks.base import fingerprint


def check_data(run: Run, loaded: Loaded) -> None:
    """Note the rows and the model of the run; refuse others than it began with.

    Raises:
        UserError: the rows, the model or the prompts have changed.
    """
    notes, path = run.notes, run.folder.path
    # Other ranks have read their rows already.
    alone = run.team is None
    if changed := loaded.differing_rows(notes.get("rows", {}), may_renumber=alone):
        raise UserError(
            f"the {' and '.join(changed)} rows are not those that {path} began "
            "with: put the data back, or start over with if_exists=fresh."
        )
    rows = {n: fingerprint(getattr(loaded.task, n)) for n in ("train", "dev", "test")}
    model = loaded.fingerprint()
    if notes.get("model", model) != model:
        raise UserError(
            f"the model is not the one that {path} began with: put its weights "
            "back (or the same revision), or start over with if_exists=fresh."
        )
    if "prompt" in notes and not _are_noted(loaded.prompts, notes):
        raise UserError(
            f"the prompts are not those that {path} began with; start over with if_exists=fresh."
        )
    notes["rows"], notes["model"] = rows, model


def _are_noted(prompts: tuple[Prompt, ...], notes: Notes) -> bool:
    """Say whether the noted prompts are as many as these, each with as many labels."""
    noted = notes.get("prompts", [])
    return len(noted) == len(prompts) and all(
        note.get("part", "") == prompt.part
        and len(note["labels"]) == len(prompt.labels) == len(note.get("offsets", prompt.labels))
        for note, prompt in zip(noted, prompts, strict=True)
    )


def put_back(run: Run, loaded: Loaded, method: Method) -> Recorder | None:
    """Put weights and method back to the state; what of the state is not good is undone.

    Returns:
        The recorder of the steps that follow; None for a method whose steps cannot be applied
        again.

    Raises:
        UserError: the folder is of another run, or cannot be written.
    """
    if not replays(method):
        _put_back_saved(run, loaded, method)
        return None
    state, folder = run.state, run.folder
    path = folder.path / "trajectory.bin"
    header = {
        "identity": method.identity(),
        "model": run.notes["model"],
        "config": digest(run.config),
        "rows": run.notes["rows"],
    }
    known = _known_steps(run, path, header)
    best = state.best_step or 0
    if run.settings.keep == "best" and folder.nearest(state, best, run.say) is None:
        # The model itself may be anywhere; of its own the run keeps what it may go back to.
        folder.save_weights(state, 0, method.trained, method.snapshot()[0])
        folder.save_state(state)
    if known is not None:
        rebuild(loaded, method, folder, state, known, state.step, run.say, goes_on=True)
    return Recorder(path, header, method, known, run.lost)


def _put_back_saved(run: Run, loaded: Loaded, method: Method) -> None:
    """Put back the weights that are saved; start over if they are damaged.

    Of a finished run that cannot be extended the best weights alone are there, and no step follows.
    """
    state, folder = run.state, run.folder
    if state.step and (bad := _damaged_weights(run)):
        name = run.settings.method["name"]
        run.say(f"  {' and '.join(bad)} damaged or missing, and {name} has no trajectory:")
        run.say("  trained again from the first step on")
        state.start_over()
    if state.step:
        if not folder.has_metrics(state):
            left = folder.mend_metrics(state)
            run.say(
                f"  metrics.jsonl is damaged: {left} of {state.step} steps can be read, the rest "
                "is lost"
            )
        saved = state.step if state.step in state.weights() else state.best_step or 0
        loaded.set_weights(folder.load_weights(state, saved), folder.path)
        restore(method, state.method, folder.load_optimizer(state, saved), folder)


def _damaged_weights(run: Run) -> list[str]:
    """Return the names of files that are damaged, or without which the run cannot go on."""
    state, folder = run.state, run.folder
    found = folder.damaged_weights(state)
    last = run.notes.get("weights", {}).get("last")
    is_at_its_end = last is not None and state.looked == state.step == last["step"]
    needed = {state.best_step or state.step} | (set() if is_at_its_end else {state.step})
    return found + [folder.weights_path(n).name for n in sorted(needed - {*state.weights()})]


def _known_steps(run: Run, path: Path, header: Mapping[str, Any]) -> Trajectory | None:
    """Return the recorded steps that are good; the state starts over where it says more."""
    state, folder, known = run.state, run.folder, None
    if path.exists():
        try:
            known = read(path)
        except Damaged as error:
            run.say(f"  {error}")
    count = 0 if known is None else len(known)
    if known is not None and (other := differences(known.header, header)):
        raise UserError(
            f"{path} was written with another {' and '.join(other)}: put that back, or start "
            "over with if_exists=fresh."
        )
    if known is not None and known.damage:
        run.say(f"  trajectory.bin: {known.damage}")
    if count < state.step:
        run.say(f"  the {state.step - count} steps from step {count} on are trained again")
        state.start_over()
    elif not folder.has_metrics(state):
        run.say("  metrics.jsonl is damaged: it is written anew")
        state.start_over()
    elif run.settings.keep == "all" and (bad := folder.damaged_weights(state)):
        run.say(f"  {' and '.join(bad)} damaged or missing: all weights are saved anew")
        state.start_over()
    if count > state.step:
        run.say(f"  {count - state.step} steps after step {state.step} are recorded: applied")
    return known
