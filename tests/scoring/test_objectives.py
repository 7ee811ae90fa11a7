"""Accuracy and F1 as what steps lower: figures of probes by an independent path, and whole runs."""

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_cli.cli.verbs import main
from smezo_cli.methods.mezo import MeZO
from smezo_cli.run.numerics import Numerics
from smezo_cli.run.watch import Watch
from smezo_cli.scoring.candidates import Candidates, encode
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.tasks import Prompt
from smezo_cli.zo.step import StepRecord
from tests.scoring.test_scorer import (
    ANSWER,
    ANSWER_ROWS,
    CHOICE,
    CHOICE_ROWS,
    mezo_log_p,
    mezo_scores,
    mezo_texts,
    rows_of,
    tiny,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_TOKEN = Prompt("{text}. It was", ("terrible", "great"))
LABELLED = rows_of([1, 12, 3, 30, 7, 2, 19, 5, 9, 14])
EPS = 0.05  # so large that answers change between the two probes


def accuracy_of_labels(model: Any, tokenizer: Any) -> float:
    """A prompt a candidate, the whole vocabulary: MeZO's inference."""
    best = mezo_scores(model, tokenizer, LABELLED, ONE_TOKEN, 256).argmax(1).tolist()
    return sum(b == row.label for b, row in zip(best, LABELLED, strict=True)) / len(LABELLED)


def accuracy_of_choices(model: Any, tokenizer: Any) -> float:
    """Option after option; the label or the first option is right."""
    num_right = 0
    for row in CHOICE_ROWS:
        texts = mezo_texts(row, CHOICE, row.options)
        means = [p.mean().item() for p in mezo_log_p(model, tokenizer, texts, 256)]
        num_right += means.index(max(means)) in (0, row.label)
    return num_right / len(CHOICE_ROWS)


def f1_of_answers(model: Any, tokenizer: Any) -> float:
    """Token after token over the whole sequence; words in common, as SQuAD counts them."""
    total = 0.0
    for row in ANSWER_ROWS:
        context = tokenizer(ANSWER.template.format(**row.fields))["input_ids"]
        ids = list(context)
        for _ in range(4):
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            ids.append(token)
            if token == tokenizer.eos_token_id or "\n" in tokenizer.decode(ids[len(context) :]):
                break
        answer = tokenizer.decode(ids[len(context) :], skip_special_tokens=True)
        ours = answer.partition("\n")[0].lower().split()
        best = 0.0
        for reference in row.answers:
            theirs = reference.replace(",", "").replace("the ", "").split()
            shared = sum((Counter(ours) & Counter(theirs)).values())
            best = max(best, 2 * shared / (len(ours) + len(theirs)))
        total += best
    return total / len(ANSWER_ROWS)


KINDS: dict[str, tuple[str, Any, Any]] = {
    "classification": (
        "accuracy",
        accuracy_of_labels,
        lambda t: encode(LABELLED, ONE_TOKEN, t, 256),
    ),
    "choice": (
        "accuracy",
        accuracy_of_choices,
        lambda t: encode(CHOICE_ROWS, CHOICE, t, 256, "choice"),
    ),
    "generation": (
        "f1",
        f1_of_answers,
        lambda t: encode(ANSWER_ROWS, ANSWER, t, 256, "generation", 4),
    ),
}


def in_the_mood(name: str, kind: str) -> tuple[Any, Any]:
    """A tiny model; of generation one that likes the words of the references."""
    model, tokenizer = tiny(name)
    if kind == "generation":
        with torch.no_grad():
            for word in (" lovely", " warm", " dull", " cast"):
                for token in tokenizer(word, add_special_tokens=False)["input_ids"]:
                    model.get_input_embeddings().weight[token] *= 4
    return model, tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_measures_the_figure_at_both_probes(kind: str) -> None:
    """projected_grad = [(1 - m+) - (1 - m-)] / (2 eps), each m of a copy with its weights moved."""
    objective, reference, rows_for = KINDS[kind]
    model, tokenizer = in_the_mood("tiny-llama", kind)
    rows = rows_for(tokenizer)
    scorer = Scorer(model, tokenizer)
    options: dict[str, Any] = {"num_queries": 6, "executor": "sequential", "backend": "eager"}
    opt = MeZO(model, lr=1e-3, eps=EPS, seed=3, check=False, **options)
    expected = []
    with torch.no_grad():
        for query in range(6):
            figures = []
            for sign in (1, -1):
                moved = copy.deepcopy(model)
                named = dict(moved.named_parameters())
                direction = opt.mover([query], [sign * EPS])
                for target in opt.targets:
                    named[target.name].view(-1).add_(direction.dense(target)[0])
                figures.append(reference(moved, tokenizer))
            expected.append(((1 - figures[0]) - (1 - figures[1])) / (2 * EPS))
    before = scorer.num_forwards
    record = opt.step(lambda: scorer.objective(rows, objective))
    assert len(set(expected)) > 1, "the probes of this test change nothing"
    # The figures are sums of a few fractions: their order is all that can differ.
    assert record.projected_grad == pytest.approx(expected, abs=1e-12)
    assert scorer.num_forwards - before == record.num_forwards == 12


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_one_less_the_figure_of_an_evaluation(kind: str) -> None:
    """In float64, without rounding to float32, so that a batch of n moves it in steps of 1/n."""
    objective, reference, rows_for = KINDS[kind]
    model, tokenizer = in_the_mood("tiny-opt", kind)
    scorer, rows = Scorer(model, tokenizer), rows_for(tokenizer)
    with torch.no_grad():
        found = scorer.objective(rows, objective)
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(1 - reference(model, tokenizer), abs=1e-12)
        assert torch.equal(scorer.objective(rows, "loss"), scorer.loss(rows))


def test_accuracy_computes_the_label_rows_alone_in_one_forward() -> None:
    """The fast path of the loss: a sequence a row, two logits at the last position."""
    model, tokenizer = tiny("tiny-llama")
    rows = encode(rows_of([5]) * 4, ONE_TOKEN, tokenizer, 256)
    shapes: list[tuple[int, ...]] = []
    model.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.logits.shape)))
    with torch.no_grad():
        Scorer(model, tokenizer).objective(rows, "accuracy")
    assert shapes == [(4, 1, 2)]


@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_a_row_without_a_label_has_no_figure(name: str) -> None:
    model, tokenizer = tiny("tiny-llama")
    unknown = Candidates(((1, 2), (1, 3)), (1, 1), -1, False)
    with pytest.raises(ValueError, match=f"without a label has no {name}"):
        Scorer(model, tokenizer).objective([unknown], name)


# ------------------------------------------------------------------------------------- whole runs

TOY = [
    *("task=toy", "model=tiny-llama", "device=cpu", "method=mezo", "method.objective=accuracy"),
    *("batch_size=32", "steps=20", "eval_every=2", "eps=1e-1", "lr=3e-2", "task.prompt=0"),
    "task.num_dev=32",
]


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def the_run() -> Path:
    (run,) = Path("runs/default").iterdir()
    return run


def test_a_run_on_accuracy_takes_its_best_look_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the trajectory alone follow the same weights; a longer run goes on as one made whole."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TOY]) == 0
    run = the_run()
    lines, result = lines_of(run), json.loads((run / "result.json").read_text())
    errors = [line["loss"] for line in lines if "projected_grad" in line]
    assert all(abs(64 * error - round(64 * error)) < 1e-9 for error in errors)
    assert len(set(errors)) > 3
    looks = [line for line in lines if "dev.accuracy" in line]
    best = min(looks, key=lambda look: (-look["dev.accuracy"], look["dev.loss"], look["step"]))
    assert result["dev"]["best"]["step"] == best["step"]
    assert result["objective"] == "accuracy"
    out = capsys.readouterr().out
    assert f"best dev accuracy at step {best['step']}" in out
    assert main(["replay", str(run)]) == 0
    assert main(["train", *TOY, "steps=24"]) == 0
    assert main(["train", *TOY, "steps=24", "name=whole"]) == 0
    (whole,) = Path("runs/whole").iterdir()
    assert whole.name == run.name
    assert (whole / "trajectory.bin").stat().st_size == (run / "trajectory.bin").stat().st_size
    ended = [json.loads((r / "result.json").read_text()) for r in (run, whole)]
    assert ended[0]["weights"] == ended[1]["weights"]


def test_answers_are_generated_at_the_probed_weights_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F1 as the objective of a generation task, whose forwards cannot run in lockstep."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"what is {i} and 1,it is {i + 1}\n" for i in range(20))
    Path("my.csv").write_text(f"text,answer\n{rows}")
    words = [
        *("task=generation", "task.data=my.csv", 'task.prompt="{text} It is"'),
        *("task.max_new_tokens=3", "model=tiny-llama", "device=cpu", "method=mezo"),
        *("method.objective=f1", "eps=1e-1", "steps=2", "batch_size=4", "eval_every=1"),
    ]
    assert main(["train", *words]) == 0
    result = json.loads((the_run() / "result.json").read_text())
    assert (result["objective"], result["metric"]) == ("f1", "f1")
    assert (result["executor"], result["num_forwards"]) == ("sequential", 4)


def test_the_train_figure_is_not_taken_for_a_loss() -> None:
    """stop_if_diverged compares losses: of another objective those of dev alone."""

    class Still:
        trained = {"w": torch.nn.Parameter(torch.zeros(3))}  # noqa: RUF012 - never changed

    for objective, why in (("loss", "mean train loss"), ("accuracy", None)):
        notes: dict[str, Any] = {}
        method: Any = Still()
        watch = Watch(
            notes,
            Numerics(method, 0, notes),
            stop_if_diverged=2.0,
            reference=0.3,
            objective=objective,
        )
        watch.after_step(1, StepRecord(1.0, (0.0,), 2))
        watch.after_evaluation(0.2, True)
        assert (watch.why is None) == (why is None)
        assert why is None or why in str(watch.why)
        watch.after_evaluation(math.nextafter(0.6, 1), False)
        assert "dev loss" in str(watch.why)
