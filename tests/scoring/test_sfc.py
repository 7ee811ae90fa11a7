"""Calibration by the domain-conditional prompt (SFC) against its formula, written out here.

score(option) = sum of log p(its tokens | prompt) - sum of log p(its tokens | base prompt), as
MeZO's code computes it; in evaluation, and of classification in the loss that is trained on.
"""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from smezo_cli.cli.verbs import main
from smezo_cli.config.compose import compose
from smezo_cli.config.digest import digest
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.methods.mezo import MeZO
from smezo_cli.models.load import load_model
from smezo_cli.plan.planner import plan
from smezo_cli.run.console import Console
from smezo_cli.run.evaluate import evaluate
from smezo_cli.run.measure import Batch
from smezo_cli.scoring.candidates import Candidates, encode
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.tasks import Prompt, Row
from tests import CONF

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["tiny-llama", "tiny-opt"]  # without and with a BOS
FP32 = 1e-5  # sums of some ten log-probabilities of size 6, in another order
TEXTS = ["the film was dull", "warm", "a lovely pace and a clumsy plot with no ending", "so stale"]
OPTIONS = [("dull", "so lovely"), ("it was great", "no"), ("warm",), ("a", "b c", "the plot")]

# prompt, base prompt, kind; the base may be empty, or show what rows of a domain have in common
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "rte": ("{text}\nYes or No?\n", "", ("Yes", "No")),
    "sst2": ("{text} It was", "It was", ("terrible", "great")),
    "multi": ("{text} It was", "It was", ("not so good", "great", "splendid")),
    "empty-multi": ("{text}\nYes or No?\n", "", ("Yes it is", "No")),
    "newline": ("{text}\nIs it good?\n", "\n", ("Yes", "No", "Maybe")),
    "copa": ("{text} {conjunction}", "{conjunction}", ()),
    "piqa": ("Question: {text}\nAnswer:", "Answer:", ()),
    "empty-choice": ("Question: {text}\nAnswer:", "", ()),
}


def tiny(name: str) -> tuple[Any, Any]:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    return load_model(node, dtype=torch.float32, device=torch.device("cpu"), cache=Path("/nowhere"))


def kind_of(case: str) -> str:
    return "classification" if CASES[case][2] else "choice"


def rows_of(case: str) -> list[Row]:
    conjunctions = ("so", "because", "so", "so")
    return [
        Row(
            {"text": text, "conjunction": conjunctions[k]},
            k % len(options),
            str(k),
            options=() if CASES[case][2] else options,
        )
        for k, (text, options) in enumerate(zip(TEXTS, OPTIONS, strict=True))
    ]


def prompt_of(case: str) -> Prompt:
    template, base, labels = CASES[case]
    return Prompt(template, labels, sfc=base)


def encoded(case: str, tokenizer: Any, **changes: Any) -> list[Candidates]:
    prompt = dataclasses.replace(prompt_of(case), **changes)
    return encode(rows_of(case), prompt, tokenizer, 128, kind_of(case))


def log_p(model: Any, tokenizer: Any, context: str, full: str) -> Tensor:
    """Log-probability of each token that `full` adds to `context`: a forward of it alone."""
    ids, before = (list(tokenizer(text)["input_ids"]) for text in (full, context))
    if not before:  # nothing stands there: the begin of a text
        ids, before = [tokenizer.bos_token_id, *ids], [tokenizer.bos_token_id]
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    of_tokens = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return of_tokens[len(before) - len(ids) :]


def texts_of(case: str, row: Row, template: str) -> list[tuple[str, str]]:
    """Context, and context with each candidate behind it, stripped of blanks."""
    context = template.format(**row.fields).strip(" ")
    blank = "" if context[-1:].isspace() else " "
    words = CASES[case][2] or row.options
    return [(context, (context + blank + word).strip(" ")) for word in words]


def expected_scores(case: str, model: Any, tokenizer: Any) -> list[Tensor]:
    """The formula, a tensor a row."""
    template, base, _ = CASES[case]
    return [
        torch.stack(
            [
                log_p(model, tokenizer, *own).sum() - log_p(model, tokenizer, *less).sum()
                for own, less in zip(
                    texts_of(case, row, template), texts_of(case, row, base), strict=True
                )
            ]
        )
        for row in rows_of(case)
    ]


def expected_loss(case: str, model: Any, tokenizer: Any) -> Tensor:
    """Cross-entropy over calibrated scores; of choice MeZO's loss, in which none is compared."""
    rows = rows_of(case)
    if kind_of(case) == "classification":
        found = expected_scores(case, model, tokenizer)
        return -torch.stack(
            [scores.log_softmax(0)[row.label] for scores, row in zip(found, rows, strict=True)]
        ).mean()
    golds = [texts_of(case, row, CASES[case][0])[row.label] for row in rows]
    return -torch.cat([log_p(model, tokenizer, *gold) for gold in golds]).mean()


# ------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_scores_are_those_of_the_formula(case: str, name: str) -> None:
    """In a batch and one by one; of classification up to a constant of the row."""
    model, tokenizer = tiny(name)
    rows, expected = encoded(case, tokenizer), expected_scores(case, model, tokenizer)
    scorer = Scorer(model, tokenizer)
    found = scorer.scores(rows)
    plain = Scorer(model, tokenizer).scores([dataclasses.replace(c, base=None) for c in rows])
    moved = 0.0
    for i, (row, wanted) in enumerate(zip(rows, expected, strict=True)):
        for scores in (found[i], scorer.scores([row])[0]):
            ours = scores[: len(wanted)]
            assert scores[len(wanted) :].tolist() == [-float("inf")] * (len(scores) - len(wanted))
            if kind_of(case) == "classification":
                ours, wanted = ours - ours.mean(), wanted - wanted.mean()
            torch.testing.assert_close(ours, wanted, rtol=0, atol=FP32)
        gap = found[i, : len(wanted)] - plain[i, : len(wanted)]
        moved = max(moved, float((gap - gap.mean()).abs().max()))
    assert moved > 0.01, "the calibration of this test changes nothing"


@pytest.mark.parametrize("case", ["rte", "sst2", "multi", "copa", "piqa"])
def test_losses_and_gradients_are_those_of_the_formula(case: str) -> None:
    """Backpropagation goes through the base, too: the loss is one function of the weights."""
    model, tokenizer = tiny("tiny-opt")
    loss = expected_loss(case, model, tokenizer)
    weights = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, weights)
    ours = Scorer(model, tokenizer).loss(encoded(case, tokenizer))
    torch.testing.assert_close(ours, loss, rtol=0, atol=FP32)
    for one, other in zip(torch.autograd.grad(ours, weights), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("executor", ["sequential", "lockstep"])
@pytest.mark.parametrize("case", ["rte", "multi", "copa"])
def test_a_projected_gradient_is_that_of_the_formula(case: str, executor: str) -> None:
    """[L(theta + eps z) - L(theta - eps z)] / (2 eps), of copies with their weights moved."""
    eps = 1e-2
    model, tokenizer = tiny("tiny-llama")
    rows, scorer = encoded(case, tokenizer), Scorer(model, tokenizer)
    options: dict[str, Any] = {"executor": executor, "backend": "eager", "check": False}
    opt = MeZO(model, lr=1e-3, eps=eps, seed=3, **options)
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            named = dict(moved.named_parameters())
            direction = opt.mover([0], [sign * eps])
            for target in opt.targets:
                named[target.name].view(-1).add_(direction.dense(target)[0])
            losses.append(float(expected_loss(case, moved, tokenizer)))
    record = opt.step(lambda: scorer.loss(rows))
    # Losses of size 1 are known to some 1e-6 each, over 2 eps.
    expected = (losses[0] - losses[1]) / (2 * eps)
    assert record.projected_grad[0] == pytest.approx(expected, abs=5e-4)
    assert record.loss == pytest.approx(sum(losses) / 2, abs=FP32)


@torch.no_grad()
def test_masked_models_are_calibrated_at_the_mask() -> None:
    """log-softmax over the labels at the mask, less that at the mask of the base prompt."""
    model, tokenizer = tiny("tiny-roberta")
    prompt = Prompt("{text} It was {mask} .", ("terrible", "great"), sfc="It was {mask} .")
    rows = [Row({"text": text}, k % 2, str(k)) for k, text in enumerate(TEXTS)]
    found = Scorer(model, tokenizer).scores(encode(rows, prompt, tokenizer, 128))
    words = [
        tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in prompt.labels
    ]

    def at_mask(text: str) -> Tensor:
        ids = tokenizer(text.replace("{mask}", tokenizer.mask_token))["input_ids"]
        logits = model(torch.tensor([ids])).logits[0, ids.index(tokenizer.mask_token_id)]
        return logits[words].float().log_softmax(0)

    base = at_mask("It was {mask} .")
    for row, ours in zip(rows, found, strict=True):
        wanted = at_mask(prompt.template.replace("{text}", row.fields["text"])) - base
        torch.testing.assert_close(ours - ours.mean(), wanted - wanted.mean(), rtol=0, atol=FP32)


@torch.no_grad()
def test_demonstrations_stand_before_the_prompt_and_not_before_the_base() -> None:
    """And what they have in common is still computed once; so MeZO's `--sfc`."""
    model, tokenizer = tiny("tiny-llama")
    head = "a joy.\nYes or No?\nYes\n\nno fun.\nYes or No?\nNo\n\n"
    rows, shown = encoded("rte", tokenizer), encoded("rte", tokenizer, head=head)
    assert [row.base for row in rows] == [row.base for row in shown]
    scorer = Scorer(model, tokenizer)
    bare = [dataclasses.replace(row, base=None) for row in shown]
    base = expected_scores("rte", model, tokenizer)
    plain = scorer.scores([dataclasses.replace(row, base=None) for row in rows])
    less = plain[0] - base[0]  # what the base takes off, up to a constant of the row
    expected = scorer.scores(bare) - less
    scorer.holds_common = True
    with scorer.holding(shown):
        assert scorer._held is not None
        found = scorer.scores(shown)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours - ours.mean(), wanted - wanted.mean(), rtol=0, atol=5e-5)


# --------------------------------------------------------------------------------- its price


def test_forwards_counted_are_forwards_made_and_label_rows_alone_are_computed() -> None:
    """Where labels are one token the base is a row more of the same forward."""
    model, tokenizer = tiny("tiny-llama")
    (first, *_) = encoded("rte", tokenizer)
    rows = [first] * 3
    seen: list[torch.Size] = []
    model.register_forward_hook(lambda _, __, output: seen.append(output.logits.shape))
    scorer = Scorer(model, tokenizer)
    opt = MeZO(model, lr=1e-6, eps=1e-3, backend="eager", check=False, executor="sequential")
    record = opt.step(lambda: scorer.loss(rows))
    assert len(seen) == scorer.num_forwards == record.num_forwards == 2
    assert {(shape[0], shape[2]) for shape in seen} == {(4, 2)}


def test_parts_of_a_batch_add_up_to_its_loss() -> None:
    """Micro-batches: each has the base for itself."""
    model, tokenizer = tiny("tiny-opt")
    rows = encoded("sst2", tokenizer)
    scorer = Scorer(model, tokenizer)
    with torch.no_grad():
        whole = float(scorer.loss(rows))
        for size in (1, 3):
            assert float(Batch(scorer, rows, "loss", size)()) == pytest.approx(whole, abs=FP32)


@torch.no_grad()
def test_figures_of_an_evaluation_are_those_of_the_formula() -> None:
    """Accuracy by calibrated scores; the loss is the one that is trained on, also of choice."""
    model, tokenizer = tiny("tiny-opt")
    scorer, bar = Scorer(model, tokenizer), Console().bar("", 1)
    for case in ("rte", "multi", "copa", "empty-choice"):
        rows = encoded(case, tokenizer)
        found = evaluate(scorer, rows, bar, lambda: False)
        best = [int(s.argmax()) for s in expected_scores(case, model, tokenizer)]
        right = [k == row.label for k, row in zip(best, rows, strict=True)]
        figures = found.figures()
        assert figures["accuracy"] == sum(right) / len(right)
        loss = float(expected_loss(case, model, tokenizer))
        assert figures["loss"] == pytest.approx(loss, abs=FP32)
        assert [line["prediction"] for line in found.predictions()] == best
        assert 1 - float(scorer.objective(rows, "accuracy")) == figures["accuracy"]


# ------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("task", "fields", "options", "context", "candidates"),
    [
        ("rte", {"premise": "P", "hypothesis": "H"}, (), "", ("Yes", "No")),
        ("cb", {"premise": "P", "hypothesis": "H"}, (), "", ("Yes", "No", "Maybe")),
        ("boolq", {"passage": "P", "question": "q"}, (), "", ("No", "Yes")),
        ("wsc", {"text": "T", "span1_text": "A", "span2_text": "b"}, (), "", ("No", "Yes")),
        ("wic", {"word": "w", "sentence1": "A", "sentence2": "B"}, (), "", ("No", "Yes")),
        ("multirc", {"paragraph": "P", "question": "q", "answer": "a"}, (), "", ("No", "Yes")),
        ("sst2", {"sentence": "S"}, (), "It was", ("It was terrible", "It was great")),
        (
            "copa",
            {"premise": "P.", "conjunction": "because"},
            ("He ran.", "I ran."),
            "because",
            ("because he ran.", "because I ran."),
        ),
        (
            "record",
            {"passage": "P", "query": "@placeholder won"},
            ("Ann", "Eve"),
            "-",
            ("- Ann won", "- Eve won"),
        ),
        ("piqa", {"goal": "G", "sol1": "A", "sol2": "B"}, ("A", "B"), "Answer:", None),
        ("siqa", {"context": "C", "question": "Q"}, ("a", "b"), "Answer:", None),
    ],
)
def test_base_prompts_are_those_of_mezo(
    task: str,
    fields: dict[str, str],
    options: tuple[str, ...],
    context: str,
    candidates: tuple[str, ...] | None,
) -> None:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / "task" / f"{task}.yaml"))
    (first, *others) = node["prompts"]
    assert not any("sfc" in other for other in others)
    labels = tuple(first.get("labels", ()))
    prompt = Prompt(first["template"], labels, first.get("option", "{option}"), sfc=first["sfc"])
    row = Row(fields, 0, "1", options=options)
    assert prompt.base is not None
    assert prompt.base.context(fields) == context
    wanted = candidates or tuple(f"{context} {option}" for option in options)
    assert prompt.base.candidates(row) == wanted
    assert check(compose([f"task={task}", "model=tiny-llama", "task.sfc=true"])).task["sfc"]


SMALL = ["model=tiny-llama", "device=cpu", "compile=false"]
OWN = ['task.prompt="{text}. It was"', "task.labels={0: terrible, 1: great}"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["task=toy", "task.sfc=true"], "no domain-conditional prompt is known for this prompt of"),
        (["task=toy", "task.sfc=true"], "boolq, cb, copa, multirc, piqa, record, rte, siqa, sst2"),
        (["task=piqa", "task.prompt=1", "task.sfc=true"], "give it by task.sfc_prompt=TEMPLATE"),
        (["task=rte", "task.sfc=true", 'task.prompt="{premise}"'], "task.sfc_prompt=TEMPLATE"),
        (["task=sst2", "task.sfc=true", "model=tiny-roberta"], "task.sfc_prompt=TEMPLATE"),
        (
            ["task=sst2", "task.sfc=true", "model=tiny-roberta", "task.sfc_prompt=x"],
            "tiny-roberta fills masks: give a template with its place, {mask}",
        ),
        (
            ["task=sst2", "task.sfc=true", 'task.sfc_prompt="It was {mask}"'],
            "tiny-llama fills no masks: leave out its place, {mask}",
        ),
        (["task=rte", "task.sfc_prompt=x"], "add task.sfc=true, or leave it out"),
        (
            ["task=rte", "task.sfc=true", "method=linear_probe"],
            "linear_probe scores no label words",
        ),
        (["task=rte", "task.sfc=yes"], "task.sfc must be true or false"),
        (["task=squad", "task.sfc=true"], "task squad has no task.sfc"),
        (["task=squad", "+task.sfc=true"], "there is no task.sfc"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        check(compose([*SMALL[:1], *words]))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_is_in_the_digest_only_where_it_is_asked_for() -> None:
    """Keys that came later, and the base prompts of tasks that do not use them, are not in it."""
    plain, asked, given = (
        compose(["task=rte", "model=tiny-llama", *more])
        for more in ([], ["task.sfc=true"], ["task.sfc=true", "task.sfc_prompt=x"])
    )
    before: Any = OmegaConf.to_container(plain, resolve=True)
    del before["task"]["sfc"], before["task"]["sfc_prompt"]
    for node in before["task"]["prompts"]:
        del node["sfc"]
    assert digest(before) == digest(plain)
    assert len({digest(plain), digest(asked), digest(given)}) == 3


def own_file(folder: Path) -> Path:
    lines = [f"{TEXTS[k % 4]} {k},{k % 2},film\n" for k in range(30)]
    (folder / "own.csv").write_text("text,label,genre\n" + "".join(lines))
    return folder / "own.csv"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_calibrated_from_zero_shot_to_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user's rows and base prompt, which may show a column: train, eval, replay, predict."""
    words = ["task=classification", f"task.data={own_file(tmp_path)}", *OWN, *SMALL]
    words += ["task.sfc=true", 'task.sfc_prompt="The {genre} was"', "method=mezo", "batch_size=4"]
    words += ["steps=2", "eval_every=1", f"runs_dir={tmp_path}/runs"]
    assert main(["train", *words]) == 0
    (file,) = (tmp_path / "runs").rglob("result.json")
    result, run = json.loads(file.read_text()), str(file.parent)
    assert result["prompt"]["sfc"] == "The {genre} was"
    assert result["num_forwards"] == plan(check(compose(words))).work["forwards of training"] == 4
    assert main(["eval", run, "--base", "--split", "dev"]) == 0
    capsys.readouterr()
    assert main(["eval", run]) == 0
    assert f"test accuracy {result['test']['accuracy']:.4f}" in capsys.readouterr().out
    assert main(["replay", run]) == 0  # figures and weights are those of the run
    # By the formula, from the model as it came.
    model, tokenizer = tiny("tiny-llama")
    for line in lines_of(file.parent / "predictions-dev-base.jsonl"):
        text = line["fields"]["text"]
        with torch.no_grad():
            scores = torch.stack(
                [
                    log_p(model, tokenizer, f"{text}. It was", f"{text}. It was {word}").sum()
                    - log_p(model, tokenizer, "The film was", f"The film was {word}").sum()
                    for word in ("terrible", "great")
                ]
            )
        wanted = scores.double().log_softmax(0).tolist()
        assert line["scores"] == pytest.approx(wanted, abs=FP32)
    capsys.readouterr()
    assert main(["predict", run, "--field", "text=warm", "--field", "genre=play"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["predict", run, "--field", "text=warm", "--field", "genre=plot"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] != first["scores"]
    assert main(["predict", run, "--field", "text=warm"]) == 2
    assert "task.sfc_prompt='The {genre} was'" in capsys.readouterr().err
    assert main(["eval", run, "task.sfc=false", "--out", f"{tmp_path}/x"]) == 2
    assert "a trained run keeps this setting" in capsys.readouterr().err


def test_a_plan_has_the_base_in_its_forwards() -> None:
    """A row more in a forward of classification, the gold option alone in one of choice."""
    found = []
    for more in ([], ["task.sfc=true"]):
        words = ["task=rte", "model=tiny-llama", "method=mezo", "steps=10", "batch_size=1", *more]
        found.append(plan(check(compose([*words, *SMALL[1:]])), capacity=10**9, tokens=64))
    plain, calibrated = found
    assert calibrated.phases["step"] > plain.phases["step"]
    assert calibrated.work["forwards of training"] == plain.work["forwards of training"] == 20
    assert any("task.sfc=true" in line for line in calibrated.assumptions)
    for words in (["task=copa"], ["task=rte", "method=icl"]):
        settings = check(compose([*words, "model=tiny-llama", "task.sfc=true", "device=cpu"]))
        assert plan(settings, capacity=10**9, tokens=64).peak > 0


def mentions(sequence: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(sequence[i : i + len(part)]) == list(part) for i in range(len(sequence)))


def test_an_empty_base_begins_where_a_text_begins() -> None:
    """Behind the BOS where the tokenizer puts one there; else behind BOS or EOS, never nothing."""
    _, with_bos = tiny("tiny-opt")
    _, without = tiny("tiny-llama")
    for tokenizer in (with_bos, without):
        (row, *_) = encoded("rte", tokenizer)
        assert row.base is not None
        bos = tokenizer.bos_token_id
        assert row.base.full == tuple(
            (bos, *tokenizer(word, add_special_tokens=False)["input_ids"]) for word in ("Yes", "No")
        )
        assert mentions(row.full[0], tokenizer("Yes or No", add_special_tokens=False)["input_ids"])
    without.bos_token = None
    (row, *_) = encoded("rte", without)
    assert row.base is not None
    assert {ids[0] for ids in row.base.full} == {without.eos_token_id}
    without.eos_token = None
    with pytest.raises(UserError, match=r"task\.sfc_prompt='' is no token"):
        encoded("rte", without)
