"""Define the values that state.json and result.json are made of, as pydantic checks them."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Required

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, TypeAdapter
from typing_extensions import TypeAliasType, TypedDict

from smezo_cli.files.bounded import is_count, is_number, is_text


def only(is_right: Callable[[Any], bool]) -> PlainValidator:
    """Take a value as it is if the function says so."""

    def check(value: Any) -> Any:
        if not is_right(value):
            raise ValueError
        return value

    return PlainValidator(check)


def also(is_right: Callable[[Any], bool]) -> AfterValidator:
    """Refuse a value of the right type for which the function returns False."""

    def check(value: Any) -> Any:
        if not is_right(value):
            raise ValueError
        return value

    return AfterValidator(check)


def by(of: Any) -> PlainValidator:
    """Check a value as another type than the one that mypy sees."""
    return PlainValidator(TypeAdapter[Any](of).validate_python)


def no_others(of: type) -> BeforeValidator:
    """Refuse a mapping that has keys besides those of a TypedDict."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and not value.keys() <= of.__annotations__.keys():
            raise ValueError
        return value

    return BeforeValidator(check)


# --- single values ---------------------------------------------------------------------------

Text = Annotated[str, only(is_text)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, only(is_count)]  # a whole number from 0
Number = Annotated[float, only(is_number)]  # old files hold NaN and Infinity, too
Size = Annotated[float, only(lambda value: isinstance(value, float) and value >= 0)]
FiniteSize = Annotated[Size, also(math.isfinite)]
# Names of files beside state.json, and of none elsewhere.
TensorFile = Annotated[
    str, Field(strict=True, pattern=r"^(weights|optimizer)-[0-9]{1,12}\.safetensors$")
]
Anything = dict[Any, Any]

# A metric of newer versions may be more than a number.
Metric = TypeAliasType(
    "Metric",
    Annotated[
        "Number | Flag | list[Number] | dict[Text, Metric | Text | None]",
        Field(union_mode="left_to_right"),
    ],
)
# By name, of an evaluation.
Metrics = Annotated[dict[str, Any], by(dict[Text, Metric | Text | None])]


def says(text: str) -> Any:
    """Describe a key, for docs/guide/result-json.md."""
    return Field(description=text)


# --- what both files hold --------------------------------------------------------------------


class Gain(TypedDict, total=False):
    """Say how much better the trained model is than another one on the same rows."""

    gain: Annotated[Number, says("Difference of the two metrics.")]
    standard_error: Annotated[Number, says("Its paired standard error.")]


class _MetricsOfRows(TypedDict, total=False):
    """Hold metrics over the rows of a split whose labels are known."""

    accuracy: Annotated[Number, says("Of classification and choice: the share of right answers.")]
    f1: Annotated[Number, says("Of generation: word F1 with the nearest reference.")]
    exact_match: Annotated[Number, says("Of generation: the share of exact answers.")]
    standard_error: Annotated[Number | None, says("Standard error of accuracy or f1.")]
    n: Annotated[Count, says("Number of rows with a label.")]
    loss: Annotated[Number, says("The training loss on these rows.")]
    auc: Annotated[
        Number | None, says("Of two classes: area under the ROC curve. null for more classes.")
    ]
    parts: Annotated[
        dict[Text, Metrics],
        says(
            "Of a mixture: these metrics of each part. accuracy is then their mean, whatever the "
            "sizes of the parts, and loss their mean by task.weights."
        ),
    ]


class _MetricsOfTest(_MetricsOfRows, total=False):
    """Hold metrics of the trained model, with what it gains over the model before training."""

    calibrated_accuracy: Annotated[
        Number, says("Of classification: accuracy with label offsets that were fitted on dev.")
    ]
    over_zero_shot: Annotated[Gain, says("Gain over the model before training.")]
    over_zero_shot_calibrated: Annotated[
        Gain, says("Gain over the calibrated model before training.")
    ]


_all_are_metrics = BeforeValidator(TypeAdapter[Any](Metrics).validate_python)
# Beside the keys above there may be others, of newer versions; they too are metrics.
MetricsOfRows = Annotated[_MetricsOfRows, _all_are_metrics]
MetricsOfTest = Annotated[_MetricsOfTest, _all_are_metrics]


def _is_compared(metrics: Mapping[str, Any]) -> bool:
    counts = any(name in metrics for name in ("accuracy", "f1"))
    return counts and metrics.get("standard_error", 0.0) is not None


ComparedMetrics = Annotated[MetricsOfRows, also(_is_compared)]


class _Best(TypedDict, total=False):
    """Hold the best evaluation on dev."""

    step: Annotated[Count | None, says("Its step. null before the first evaluation.")]


Best = Annotated[_Best, _all_are_metrics]


class Dev(TypedDict, total=False):
    """Hold evaluations on dev."""

    best: Annotated[Best | None, says("The best one: its step, and its metrics as in test.")]


class LeftOut(TypedDict):
    """Why a prompt was not asked on all rows of dev (prompt_rows)."""

    rows: Annotated[Count, says("First rows of dev on which it was asked.")]
    gain: Annotated[Number, says("By how much the best prompt's metric was higher there.")]
    standard_error: Annotated[Number, says("Its paired standard error.")]


class Prompt(TypedDict, total=False):
    """Hold a prompt, and what it came to on dev before training."""

    template: Required[Annotated[Text, says("The template, with fields in braces.")]]
    labels: Required[Annotated[list[Text], says("The word of each class.")]]
    option: Annotated[Text | None, says("Of choice: the template of an option.")]
    sfc: Annotated[Text | None, says("The domain-conditional prompt of task.sfc=true.")]
    dev: Annotated[Metrics | None, says("Metrics on dev before training.")]
    dev_calibrated: Annotated[Metrics | None, says("The same with label offsets.")]
    offsets: Annotated[list[Number], says("Label offsets that were fitted on dev.")]
    part: Annotated[Text, says("Of a mixture: the part that it is of.")]
    left_out: Annotated[LeftOut, says("Why it was not asked on all rows of dev.")]


class Dominant(TypedDict):
    """Say which block of a model is its dominant layer, and by how much."""

    block: Annotated[Count, says("The one that was trained, from 0.")]
    num_blocks: Annotated[Count, says("Of the model.")]
    ratio: Annotated[Number, says("Its largest entry over the median magnitude of its output.")]
    factor: Annotated[Number, says("What that had to be above.")]


class SavedWeights(TypedDict):
    """Name the weights of a step."""

    step: Annotated[Count, says("The step.")]
    sha256: Annotated[Text, says("SHA-256 of the trained tensors.")]


class Together(TypedDict):
    """Say what may be computed in one forward without another result."""

    pads: Annotated[Flag, says("Rows of different lengths, padded to one.")]
    caches: Annotated[Flag, says("Candidates of a row behind one cached prefix.")]
    together: Annotated[Flag, says("Several rows.")]


class _Batching(TypedDict):
    """Say which rows share a forward; see docs/guide/batches.md."""

    scores: Annotated[Together, no_others(Together), says("Where candidates are scored.")]
    answers: Annotated[Together, no_others(Together), says("Where answers are generated.")]
    difference: Annotated[Number | None, says("The largest difference that was measured.")]


Batching = Annotated[_Batching, no_others(_Batching)]
