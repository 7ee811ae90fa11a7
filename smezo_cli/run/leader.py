"""Lead the other ranks from rank 0: tell them what comes next, and let them go."""

from dataclasses import dataclass
from typing import Any

from smezo_cli.config.method_keys import trait
from smezo_cli.methods.base import Method, compares_losses
from smezo_cli.run import parcel
from smezo_cli.run.begin import Run
from smezo_cli.run.follower import facts
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.measure import Measure
from smezo_cli.run.ranks import Ranks
from smezo_cli.store import mask
from smezo_cli.store.trajectory import Recorder


@dataclass(frozen=True)
class Dismissed:
    """Hold what all ranks said at the end, by rank.

    Attributes:
        peaks: most memory that each used, in bytes.
        sizes: rows that each had in a forward at the end; None: all.
    """

    peaks: list[int]
    sizes: list[int | None]


def call(run: Run, team: Ranks) -> None:
    """Let the other ranks load; from here on a stop waits until no exchange is under way."""
    team.asked = lambda: run.stop.asked
    run.stop.patient = True  # an exchange that is broken off leaves the others in it
    team.start()


def agree(run: Run, loaded: Loaded, team: Ranks) -> None:
    """Refuse ranks that differ in data, model, settings or smezo.

    Raises:
        UserError: a rank differs, or cannot take part.
        Stopped: a rank was asked to stop.
    """
    team.agree(facts(loaded, run.settings))
    run.say(
        f"  ranks   {team.size}: {team.of_rows} share the rows"
        + (f", {team.of_queries} the queries" if team.of_queries > 1 else "")
    )
    run.check_stop()


def hand_layers(run: Run, team: Ranks) -> None:
    """Tell the other ranks which layer is the dominant one, if it alone is trained."""
    if found := run.notes.get("dominant_layer"):
        team.tell("layers", found=found)


def hand_mask(run: Run, team: Ranks) -> None:
    """Send the other ranks the mask, if the method has one: all train the same entries."""
    if trait(run.settings.method, "needs_mask", default=False):
        parcel.send(team, run.folder.path / mask.NAME, "mask")


def teach(run: Run, team: Ranks, recorder: Recorder | None) -> None:
    """Send the other ranks the recorded steps, from which their weights follow; or the weights.

    Weights that are saved are loaded from the run folder by ranks that see it, and sent otherwise.
    """
    if recorder is not None:
        known = recorder.trajectory()
        columns = known.columns(len(known)).astype("<f8")
        team.tell("trajectory", columns.tobytes(), queries=len(columns) - 1)
    elif (step := run.state.step) and step in run.state.weights():  # else no step follows
        path = run.folder.weights_path(step)
        if not hand_out(run, team, step):
            parcel.send(team, path, "saved", name=path.name, sha256=run.state.files[path.name])
        team.tell("restore", numbers=run.state.method)


def lead(run: Run, method: Method, step: int, until: int) -> None:
    """Let the other ranks, if there are any, take the steps from `step` up to `until` too."""
    if run.team is not None:
        assert compares_losses(method)
        width = max(map(method.exchanged, range(step, until)))
        run.team.take_steps(step, until, width, prompt=run.notes["prompt"])


def hand_out(run: Run, team: Ranks, step: int) -> bool:
    """Let the other ranks load the saved weights of a step; return whether all of them could."""
    path = run.folder.weights_path(step).absolute()
    return team.hand_out(str(path), run.state.files[path.name])


def dismiss(run: Run, team: Ranks, measure: Measure) -> Dismissed:
    """Let the other ranks go, and say which of them ran out of memory on the way."""
    found: list[dict[str, Any]] = team.memory()
    for rank, of in enumerate(found, start=1):
        if of["halved"]:
            size = of["micro_batch_size"]
            run.say(f"  rank {rank} was out of memory: it ended with {size} rows at once")
    if 0 < (most := team.most_queries) < team.of_queries:  # it was not known before
        queries = "1 query" if most == 1 else f"{most} queries"
        run.say(f"  query_ranks={team.of_queries}: no step had more than {queries} to share")
    dismissed = Dismissed(
        [run.memory.read(), *(of["peak"] for of in found)],
        [measure.size, *(of["micro_batch_size"] for of in found)],
    )
    team.leave()
    return dismissed
