"""Define state.json and result.json: every key, what it holds, and how it is checked.

A file may come from anywhere and be read long after it was written. In result.json and in the notes
of state.json a key that is unknown here is passed over (a newer version wrote it), and a key may be
missing (the file is older than the key). The keys of state.json itself are all there, and no
others. A value that no run writes makes the whole file unsound: it is then treated as damaged.

:class:`Result` is the one description of result.json; docs/guide/result-json.md is made from it.
The mappings are TypedDicts, so that what is written and what is read are plain dictionaries.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Required

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from smezo_cli.files.bounded import is_count, is_text
from smezo_cli.store.notes import Notes
from smezo_cli.store.values import (
    Anything,
    Batching,
    Count,
    Dev,
    Dominant,
    MetricsOfRows,
    MetricsOfTest,
    Number,
    Prompt,
    SavedWeights,
    TensorFile,
    Text,
    also,
    no_others,
    says,
)

# pydantic keeps an error for every value that is wrong; files of runs have a few hundred values.
_MOST_VALUES = 1 << 16

# --- state.json ------------------------------------------------------------------------------


class _MethodNumbers(TypedDict, total=False):
    num_steps: Count  # the rest is for the method to check


class SavedState(TypedDict):
    """Hold the content of state.json; see :class:`smezo_cli.store.folder.State`."""

    step: Count
    looked: Count
    best_step: Count | None
    best_loss: Number | None
    method: _MethodNumbers
    notes: Notes
    train_seconds: Number
    num_forwards: Count
    peak_memory_bytes: Count
    metrics_bytes: Count
    metrics_sha256: Text
    files: dict[TensorFile, Text]


def _hangs_together(state: SavedState) -> bool:
    if max(state["best_step"] or 0, state["looked"]) > state["step"]:
        return False
    if state["looked"] and state["best_step"] is None:  # the first evaluation is the best so far
        return False
    notes = state["notes"]
    if "prompt" not in notes:
        return True
    chosen = notes["prompt"]
    numbers = [chosen] if isinstance(chosen, int) else chosen
    return bool(numbers) and max(numbers) < len(notes.get("prompts", ()))


# --- result.json -----------------------------------------------------------------------------


class Sparsity(TypedDict, total=False):
    """Shares of the trained weights that are not perturbed."""

    requested: Annotated[Number | None, says("The setting. null where the method has none.")]
    realised: Annotated[Number | None, says("At the start.")]
    final: Annotated[Number | None, says("After the last step.")]


_Shares = Annotated[
    Sparsity, BeforeValidator(TypeAdapter(dict[Text, Number | None]).validate_python)
]


class Result(TypedDict, total=False):
    """Hold the content of result.json, in the order in which it is written."""

    schema: Annotated[Any, says("Version of this format: 2. Files of version 1 have no sha256.")]
    status: Required[
        Annotated[Text, says("running, done, stopped, failed or diverged (a loss was not finite).")]
    ]
    error: Annotated[Any, says("Why the run ended without a result. null where it has one.")]
    task: Annotated[Text, says("Name of the task.")]
    model: Annotated[Text, says("Name of the model.")]
    method: Annotated[Text, says("Name of the method.")]
    recipes: Annotated[Any, says("Names of the recipes that set values; the later one wins.")]
    test: Annotated[
        MetricsOfTest | None, says("The tested weights on the test rows. null until then.")
    ]
    zero_shot: Annotated[MetricsOfRows | None, says("The model before training, on the test rows.")]
    zero_shot_calibrated: Annotated[
        MetricsOfRows | None, says("The same with label offsets that were fitted on dev.")
    ]
    metric: Annotated[Literal["accuracy", "f1"], says("The metric that counts: accuracy or f1.")]
    objective: Annotated[
        Any, says("What the steps lower: loss, or 1 less accuracy or f1. null without steps.")
    ]
    demonstrations: Annotated[
        Any,
        says(
            "Of method=icl: asked and used (their numbers), tokens (their length), rows (ids); of "
            "a mixture these of each part by name."
        ),
    ]
    dev: Annotated[Dev | None, says("Evaluations on dev.")]
    weights: Annotated[
        dict[Text, SavedWeights] | None, says("The best (tested) and the last weights.")
    ]
    prompt: Annotated[
        Prompt | list[Prompt] | None,
        says("The prompt that was chosen on dev; of a mixture the list of those of the parts."),
    ]
    prompts_left_out: Annotated[
        list[Prompt],
        says(
            "Prompts that were clearly worse on the first prompt_rows rows of dev, with what they "
            "came to there; absent without prompt_rows."
        ),
    ]
    truncated_prompts: Annotated[Any, says("How many prompts were too long and cut on the left.")]
    batching: Annotated[Batching | None, says("Which rows share a forward.")]
    data_fingerprint: Annotated[Any, says("SHA-256 of the data files of the user.")]
    data_notes: Annotated[Any, says("What a reader of the metrics must know of the rows.")]
    model_fingerprint: Annotated[
        Any,
        says(
            "Of the base model: 12 hex digits of a SHA-256 over the names, shapes and dtypes of "
            "its tensors and 64 weights of each."
        ),
    ]
    model_commit: Annotated[
        Text | None, says("Of a model from the hub: the commit that its revision stood for.")
    ]
    trust_remote_code: Annotated[Any, says("Whether Python files of the model were executed.")]
    train_rows: Annotated[
        Any,
        says("Of the training rows: 12 hex digits of a SHA-256 over their ids, texts and labels."),
    ]
    test_rows: Annotated[Any, says("The same of the test rows.")]
    sparsity: Annotated[_Shares, says("Shares of the trained weights that are not perturbed.")]
    num_trained: Annotated[Any, says("Number of trained weights.")]
    dominant_layer: Annotated[
        Dominant | None,
        says("Of method.layers=dominant: the layer. null before it is found; absent otherwise."),
    ]
    frozen_unread: Annotated[
        Any, says("Parts of the model that text never reads (images, sound); they are frozen.")
    ]
    kept_inputs: Annotated[
        Any,
        says(
            "first_block, num_blocks: forwards of steps, and evaluations of rows that had been "
            "scored before, began at this block, whose inputs were kept. null where that could "
            "not be; absent with keep_inputs=false."
        ),
    ]
    lr: Annotated[Number | None, says("Learning rate. null where the method has none.")]
    lr_schedule: Annotated[Any, says("constant, linear or cosine.")]
    warmup_steps: Annotated[Any, says("Steps over which the learning rate rises.")]
    keep: Annotated[Text, says("Which weights are tested and kept: best, last or all.")]
    eps: Annotated[Number | None, says("Size of the perturbation. null where there is none.")]
    eval_every: Annotated[
        Any,
        says(
            "Of eval_every=null: the number that it stood for when the run began. Absent otherwise."
        ),
    ]
    batch_size: Annotated[Any, says("Rows of a step.")]
    batch_order: Annotated[Any, says("shuffled or stratified.")]
    micro_batch_size: Annotated[Any, says("Rows of a forward. null: all rows of a step.")]
    rank: Annotated[Any, says("The rank that wrote the file: 0.")]
    world_size: Annotated[Any, says("Number of ranks.")]
    query_ranks: Annotated[Any, says("Ranks among which the queries of a step are divided.")]
    rank_peak_memory_bytes: Annotated[Any, says("Peak memory of each rank.")]
    rank_micro_batch_sizes: Annotated[Any, says("Micro-batch size of each rank at the end.")]
    steps: Annotated[Count, says("Steps that were asked for.")]
    step: Annotated[Count, says("Steps that were made.")]
    stopped_early: Annotated[
        Any, says("step and why, where stop_if_diverged or patience ended the run. Else null.")
    ]
    num_forwards: Annotated[
        Any,
        says(
            "Losses measured by steps, each a pass over all of its rows in however many "
            "micro-batches; evaluations are not counted."
        ),
    ]
    train_seconds: Annotated[Number, says("Seconds spent in steps; evaluations are not counted.")]
    watch: Annotated[
        Any,
        says(
            "projected_grads: how many were measured. projected_grad_rms: their root mean square. "
            "clipped, spikes, unmoved: how many of them were clipped, were above 10 times the "
            "running median, were 0. largest_spike: its step, value and times_median. null "
            "without projected gradients."
        ),
    ]
    numerics: Annotated[
        Any,
        says(
            "moved_share, rms_move: which share of the weights differs from the base model, and by "
            "how much. underflow: the share of active weights that the last update left as they "
            "were. sampled: entries these follow from. In low precision also loss_error_rms, "
            "loss_error_mean, loss_noise, projected_grad_noise and noise_forwards; see "
            "docs/guide/precision.md."
        ),
    ]
    peak_memory_bytes: Annotated[Count, says("Peak memory; of several GPUs the sum.")]
    seed: Annotated[Count, says("Seed of perturbations, batches and initialisation.")]
    data_seed: Annotated[Any, says("Seed by which rows are drawn.")]
    dtype: Annotated[Any, says("Number format of the weights.")]
    compute_dtype: Annotated[Any, says("Number format of matrix products.")]
    device: Annotated[Any, says("cpu, cuda or cuda:N.")]
    device_map: Annotated[Any, says("Device of each module, where the model is spread.")]
    attention: Annotated[Any, says("Implementation of attention.")]
    noise: Annotated[Any, says("Distribution of perturbations: gaussian or rademacher.")]
    passes: Annotated[Any, says("Computes noise and updates: numba, triton or eager.")]
    executor: Annotated[Any, says("How losses are measured; see method.executor.")]
    onednn_layers: Annotated[Any, says("Linear layers that oneDNN computed.")]
    digest: Annotated[Any, says("Digest of the settings, as in the name of the folder.")]
    started: Annotated[Any, says("When this process started, UTC.")]
    ended: Annotated[Any, says("When the run ended, UTC. null while it runs.")]
    versions: Annotated[
        Anything, says("Versions of smezo and of libraries; commit, machine and threads.")
    ]
    command: Annotated[Any, says("The command that makes this run.")]
    sha256: Annotated[Any, says("SHA-256 of all other keys, as sorted JSON.")]


# Of a finished run, what is computed with.
_NEEDED = ("task", "model", "method", "test", "steps", "seed", "train_seconds", "peak_memory_bytes")


def _is_complete(result: Mapping[str, Any]) -> bool:
    """Return whether a result that calls itself done has what tables are made of."""
    if result["status"] != "done":
        return True
    if any(result.get(name) is None for name in _NEEDED):
        return False
    if result.get("prompt") == []:
        return False
    test = result["test"]
    gains = [value for name, value in test.items() if name.startswith("over_")]
    return result.get("metric", "accuracy") in test and all(isinstance(g, dict) for g in gains)


# --- checks ----------------------------------------------------------------------------------

_state = TypeAdapter[Any](Annotated[SavedState, no_others(SavedState), also(_hangs_together)])
_result = TypeAdapter[Any](Result)
_prompt = TypeAdapter[Any](Prompt | list[Prompt])
_batching = TypeAdapter[Any](Batching | None)
_metrics = TypeAdapter[Any](MetricsOfTest | None)
_evaluations = TypeAdapter[Any](list[tuple[Count, Number]])


def _fits(type_: TypeAdapter[Any], value: object) -> bool:
    """Return whether a value is of a type, and small enough to be looked at."""
    waiting, count = [value], 0
    while waiting:
        node = waiting.pop()
        inside = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        count += len(inside)
        if count > _MOST_VALUES:
            return False
        waiting += inside
    try:
        type_.validate_python(value)
    except ValidationError:
        return False
    return True


def is_sound_state(saved: Mapping[str, Any]) -> bool:
    """Return whether a run could have written this state.json; its numbers name files later."""
    return _fits(_state, saved)


def is_sound_result(result: Mapping[str, Any]) -> bool:
    """Return whether a run could have written this result.json."""
    return _fits(_result, result) and _is_complete(result)


def is_prompt(value: object) -> bool:
    """Return whether a run could have noted this prompt."""
    return value != [] and _fits(_prompt, value)


def is_batching(value: object) -> bool:
    """Return whether this is a :class:`Batching` in plain values, or None."""
    return _fits(_batching, value)


def is_known(step: object, sha256: object, figures: Sequence[object]) -> bool:
    """Return whether these are a step, the digest of its weights, and metrics of it (or None)."""
    return is_count(step) and is_text(sha256) and all(_fits(_metrics, of) for of in figures)


def is_looks(value: object) -> bool:
    """Return whether these are steps and the metric on dev at each, as pairs."""
    return _fits(_evaluations, value)
