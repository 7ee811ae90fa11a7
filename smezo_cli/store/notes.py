"""Name what a run notes in state.json beside its steps: every key, with its type."""

from typing import Any, TypedDict

Metrics = dict[str, Any]  # of an evaluation, by name; see scoring.evaluation


class PromptNote(TypedDict, total=False):
    """A prompt that was asked on dev, and what it gave there."""

    template: str
    labels: list[str]
    option: str
    sfc: str | None
    dev: Metrics
    dev_calibrated: Metrics
    offsets: list[float]


class Demonstrations(TypedDict):
    """The rows before every row of in-context learning."""

    asked: int
    used: int
    tokens: int
    rows: list[str]
    text: str


class WeightsNote(TypedDict):
    """Digest of the weights after a step."""

    step: int
    sha256: str


class Spike(TypedDict):
    """A projected gradient far above the median."""

    step: int
    value: float
    times_median: float


class WatchNotes(TypedDict, total=False):
    """What the watchdogs have counted; all keys but ``unmoved``, which came later, are there."""

    recent: list[float]
    num: int
    squares: float
    clipped: int
    unmoved: int
    spikes: int
    largest_spike: Spike | None
    losses: float  # since the last evaluation of dev
    num_losses: int
    looks_since: int
    why: str | None


class Early(TypedDict):
    """Where and why a run ended before its last step."""

    step: int
    why: str


class Unsettled(TypedDict):
    """Said of a run that has its result, and has not removed what it no longer needs."""

    goes_on: bool


class Notes(TypedDict, total=False):
    """The notes of a run; each key is there from when it is found."""

    # before the training
    rows: dict[str, str]  # fingerprint of each split
    model: str  # fingerprint
    batching: dict[str, Any]  # scoring.batching.Found in plain values
    prompts: list[PromptNote]
    prompt: int  # the chosen one
    truncated: int  # prompts that were cut
    zero_shot: Metrics
    zero_shot_calibrated: Metrics
    dev_loss_before: float
    demonstrations: Demonstrations
    active_share: float | None
    num_trained: int
    executor: str | None
    micro_batch_size: int
    # by the training; State.start_over forgets these
    lowest_loss: float
    highest_metric: float
    best_look: Metrics
    final_share: float | None
    watch: WatchNotes
    numerics: dict[str, Any]
    stopped_early: Early
    # behind the training
    weights: dict[str, WeightsNote]  # "best" and "last"
    unsettled: Unsettled
