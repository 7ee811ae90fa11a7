"""Name what a run notes in state.json beside its steps: every key, its type, how it is checked."""

from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

from typing_extensions import TypedDict

from smezo_cli.files.bounded import is_number
from smezo_cli.store.values import (
    Batching,
    ComparedMetrics,
    Count,
    Dominant,
    FiniteSize,
    Flag,
    Metrics,
    Number,
    Prompt,
    SavedWeights,
    Size,
    Text,
    also,
    by,
    no_others,
    only,
)

_Compared = Annotated[Metrics, by(ComparedMetrics)]


class Demonstrations(TypedDict):
    """Describe the rows before every row of in-context learning."""

    asked: Count
    used: Count
    tokens: Count
    rows: NotRequired[Annotated[list[str], only(lambda value: True)]]
    text: Text


class Spike(TypedDict):
    """Describe a projected gradient far above the median."""

    step: Count
    value: Number
    times_median: Number


class WatchNotes(TypedDict):
    """Hold what the watchdogs have counted."""

    recent: list[FiniteSize]
    num: Count
    squares: Size
    clipped: Count
    unmoved: NotRequired[Count]  # a run may be older than this count
    spikes: Count
    largest_spike: Spike | None
    losses: Number  # since the last evaluation of dev
    num_losses: Count
    looks_since: Count
    why: Text | None


def _agrees(watch: WatchNotes) -> bool:
    has_recent, has_spike = bool(watch["recent"]), watch["largest_spike"] is not None
    return (watch["num"] > 0) is has_recent and (watch["spikes"] > 0) is has_spike


class Early(TypedDict):
    """Say where and why a run ended before its last step."""

    step: int
    why: str


class Unsettled(TypedDict):
    """Say that a run has its result, and has not removed what it no longer needs."""

    goes_on: Flag


def _moves_come_together(numerics: Mapping[str, Any]) -> bool:
    return ("moved_share" in numerics) == ("rms_move" in numerics)


class Notes(TypedDict, total=False):
    """Hold the notes of a run; each key is there from when it is found."""

    # before the training
    rows: Annotated[  # fingerprint of each split
        dict[Text, Text], also(lambda rows: rows.keys() >= {"train", "dev", "test"})
    ]
    model: Text  # fingerprint
    dominant_layer: Dominant
    batching: Annotated[dict[str, Any], by(Batching)]  # scoring.batching.Found in plain values
    prompts: list[Prompt]
    prompt: Annotated[int | list[int], by(Count | list[Count])]  # the chosen one, or of each part
    truncated: Count  # prompts that were cut
    zero_shot: _Compared
    zero_shot_calibrated: _Compared
    dev_loss_before: Number
    demonstrations: Demonstrations
    demonstrations_of: dict[Text, Demonstrations]  # of each part of a mixture
    active_share: Number | None
    num_trained: Count
    executor: Text | None
    micro_batch_size: Annotated[Count, also(bool)]
    most_at_once: dict[Text, Annotated[Count, also(bool)]]  # tokens of an evaluation's forward
    eval_every: Annotated[Count, also(bool)]  # what null stood for when the run began
    # by the training; State.start_over forgets these
    lowest_loss: Annotated[float, only(lambda value: value is None or is_number(value))]
    highest_metric: Number
    best_look: _Compared
    final_share: Number | None
    watch: Annotated[WatchNotes, also(_agrees)]
    numerics: Annotated[dict[str, Any], by(dict[Text, Number | None]), also(_moves_come_together)]
    stopped_early: Annotated[Early, only(lambda value: isinstance(value, dict))]
    # behind the training
    weights: dict[Text, SavedWeights]  # "best" and "last"
    unsettled: Annotated[Unsettled, no_others(Unsettled)]
    reopened: Flag  # the run has its result, and what is damaged of it is being mended


def chosen_prompts(notes: Notes) -> list[Prompt]:
    """Return the notes of the chosen prompt: one, or in a mixture one of each part."""
    chosen = notes["prompt"]
    return [notes["prompts"][k] for k in ([chosen] if isinstance(chosen, int) else chosen)]


def noted_prompt(notes: Notes) -> Prompt | list[Prompt]:
    """Return the note of the chosen prompt, or in a mixture the list of those of the parts."""
    found = chosen_prompts(notes)
    return found[0] if isinstance(notes["prompt"], int) else found


def noted_demonstrations(notes: Notes) -> dict[str, Demonstrations]:
    """Return the demonstrations by part; "" is that of a single task."""
    own = {"": notes["demonstrations"]} if "demonstrations" in notes else {}
    return own | notes.get("demonstrations_of", {})
