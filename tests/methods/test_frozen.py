"""Methods that take no steps: what they ask the model, and that it stays as it was."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_cli.cli.verbs import main
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.methods.frozen import InContext, LinearProbe
from smezo_cli.models.load import load_model
from smezo_cli.plan.planner import plan
from smezo_cli.run.evaluate import features
from smezo_cli.scoring.candidates import Candidates, encode
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.store.partial_scores import Part
from smezo_cli.tasks import Prompt, Row
from tests.composed import settings_of

TINY = ["model=tiny-llama", "task=toy", "device=cpu", "task.prompt=0"]
TINY += ["task.num_train=24", "task.num_dev=8", "task.num_test=12"]
FAMILIES = ["tiny-llama", "tiny-opt", "tiny-mistral", "tiny-qwen2", "tiny-gemma3"]

pytestmark = pytest.mark.usefixtures("one_thread")


def scorer_of(name: str) -> Scorer:
    node = settings_of(f"model={name}", "task=toy", "method=zero_shot").model
    model, tokenizer = load_model(node, dtype=torch.float32, device="cpu", cache=Path("."))
    return Scorer(model, tokenizer)


def run_of(tmp_path: Path, *words: str) -> tuple[Path, dict[str, Any]]:
    """Train; the run's folder and its result."""
    assert main(["train", *TINY, f"runs_dir={tmp_path}/runs", *words]) == 0
    (file,) = (tmp_path / "runs").rglob("result.json")
    result: dict[str, Any] = json.loads(file.read_text())
    return file.parent, result


def bits(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


# --- what rows have in common is computed once ---------------------------------------------------

HEAD = "a joy. It was great\n\nno. It was terrible\n\n"
WORDS = ["bad", "a fine film", "not so good", "no fun at all", "no"]


def rows_of(kind: str, tokenizer: Any, max_length: int = 200) -> list[Candidates]:
    prompt = Prompt("{text}. It was", ("terrible", "great") if kind == "classification" else ())
    rows = [
        Row(
            {"text": text},
            k % 2,
            str(k),
            options=("bad", "better") if kind == "choice" else (),
            answers=("a word",) if kind == "generation" and k else (),
        )
        for k, text in enumerate(WORDS)
    ]
    prompt = dataclasses.replace(prompt, head=HEAD)
    return encode(rows, prompt, tokenizer, max_length, kind, 5)


@pytest.mark.parametrize("kind", ["classification", "choice", "generation"])
@pytest.mark.parametrize("name", FAMILIES)
def test_held_tokens_give_the_same_scores_and_answers(name: str, kind: str) -> None:
    """Rows behind keys and values held against rows computed whole, one by one.

    Sums of float32 in another order: 1e-5 is what logits of size 1 allow.
    """
    scorer = scorer_of(name)
    rows = rows_of(kind, scorer.tokenizer)
    with torch.no_grad():
        whole = [scorer.scores([row])[0] for row in rows]
        answers = [scorer.generate([row])[0] for row in rows] if kind == "generation" else []
    widths: list[int] = []
    handle = scorer.model.register_forward_pre_hook(
        lambda module, args, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    scorer.holds_common = True
    with scorer.holding(rows):
        head = widths.pop()
        for chosen, scores in scorer.score_all(rows):
            for i, of_row in zip(chosen, scores, strict=True):
                assert torch.allclose(of_row[: len(whole[i])], whole[i], atol=1e-5)
        for chosen, texts in scorer.generate_all(rows) if answers else ():
            assert texts == [answers[i] for i in chosen]
    handle.remove()
    ids = scorer.tokenizer(HEAD)["input_ids"]
    assert head >= len(ids) - 1  # a tokenizer may merge the last newline with what follows
    assert max(widths) < max(row.width for row in rows) - head + 1
    assert scorer._held is None


def test_rows_that_were_cut_are_computed_whole_beside_those_that_were_not() -> None:
    """A cut row lacks the first tokens of the head, so nothing held may be used for it."""
    scorer = scorer_of("tiny-llama")
    longest = max(row.width for row in rows_of("choice", scorer.tokenizer))
    rows = rows_of("choice", scorer.tokenizer, longest - 3)
    assert {row.truncated for row in rows} == {True, False}
    with torch.no_grad():
        whole = [scorer.scores([row])[0] for row in rows]
    scorer.holds_common = True
    with scorer.holding(rows):
        assert scorer._held is not None
        for chosen, scores in scorer.score_all(rows):
            for i, of_row in zip(chosen, scores, strict=True):
                assert torch.allclose(of_row, whole[i], atol=1e-5)


def test_a_window_that_would_be_left_is_not_used() -> None:
    """A sliding window counts what is held, so rows beyond it are computed whole."""
    scorer = scorer_of("tiny-mistral")
    rows = rows_of("classification", scorer.tokenizer)
    scorer.model.config.sliding_window = 8  # type: ignore[union-attr]  # of transformers
    scorer.holds_common = True
    with scorer.holding(rows):
        assert scorer._held is None


# --- demonstrations ------------------------------------------------------------------------------


def test_demonstrations_follow_from_the_seed_and_leave_room_for_the_longest_row() -> None:
    examples = [(str(i), f" row {i} is good ") for i in range(50)]
    method = InContext(num_demonstrations=4, seed=3)
    note = method.choose(examples, len, 1000, 100)
    assert note == method.choose(examples, len, 1000, 100)
    other = InContext(num_demonstrations=4, seed=4).choose(examples, len, 1000, 100)
    assert other["rows"] != note["rows"]
    assert (note["asked"], note["used"], len(set(note["rows"]))) == (4, 4, 4)
    assert note["text"] == "".join(f"row {i} is good\n\n" for i in note["rows"])
    # Fewer where they do not fit: the first ones, as many as go.
    whole = len(note["text"])
    assert method.choose(examples, len, whole + 20, 20) == note
    fewer = method.choose(examples, len, whole + 19, 20)
    assert (fewer["rows"], fewer["used"]) == (note["rows"][:3], 3)
    # A row that takes more than half of the window does not push all of them out.
    assert method.choose(examples, len, 100, 99)["tokens"] <= 50
    # As many as there are.
    assert method.choose(examples[:2], len, 1000, 100)["used"] == 2
    with pytest.raises(Exception, match="not one of them fits"):
        method.choose(examples, len, 20, 19)


def test_icl_run_equals_prompts_written_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every prediction against transformers alone on demonstrations and row as one text.

    Then eval and predict say the same, and nothing was trained, saved or exported.
    """
    folder, result = run_of(tmp_path, "method=icl", "method.num_demonstrations=3")
    from smezo_cli.tasks import load_task

    settings = check(compose([*TINY, "method=icl"]))
    task = load_task(settings.task, data_seed=0, cache=tmp_path)
    by_id = {row.id: row for row in task.train}
    prompt = task.prompts[0]
    shown = [by_id[name] for name in result["demonstrations"]["rows"]]
    head = "\n\n".join(
        f"{prompt.context(row.fields)} {prompt.labels[row.label]}".strip() for row in shown
    )
    assert result["demonstrations"]["used"] == len(shown) == 3
    scorer = scorer_of("tiny-llama")
    words = [scorer.tokenizer(f" {word}")["input_ids"][-1] for word in prompt.labels]
    lines = (folder / "predictions-test.jsonl").read_text().splitlines()
    for row, line in zip(task.test, map(json.loads, lines), strict=True):
        ids = scorer.tokenizer(f"{head}\n\n{prompt.context(row.fields)}", return_tensors="pt")
        with torch.no_grad():
            logits = scorer.model(**ids).logits[0, -1, words]
        log_p = logits.double().log_softmax(0)
        assert torch.allclose(torch.tensor(line["scores"]).double(), log_p, atol=1e-5)
    assert (result["status"], result["step"], result["num_forwards"]) == ("done", 0, 0)
    assert result["test"]["calibrated_accuracy"] >= 0
    assert bits(folder) == ["state.json"]

    before = {key: result["test"][key] for key in ("accuracy", "loss")}
    capsys.readouterr()
    assert main(["eval", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"test accuracy {before['accuracy']:.4f}" in out
    assert f"loss  {before['loss']:.4f}" in out
    assert main(["eval", str(folder), "--base"]) == 0
    assert f"accuracy {result['zero_shot']['accuracy']:.4f}" in capsys.readouterr().out
    field = task.test[0].fields["text"]
    assert main(["predict", str(folder), "--field", f"text={field}"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores == pytest.approx(json.loads(lines[0])["scores"], abs=1e-5)
    for words_ in (["export", str(folder), "x"], ["export", str(folder), "x", "--delta"]):
        assert main(words_) == 2
        assert "there is nothing to export" in capsys.readouterr().err
    assert main(["eval", str(folder), "--step", "3"]) == 2
    assert "took no steps" in capsys.readouterr().err


def test_zero_shot_is_what_other_runs_report_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a second call skips it, runs and plan know it."""
    folder, result = run_of(tmp_path / "a", "method=zero_shot")
    _, trained = run_of(tmp_path / "b", "method=mezo", "steps=1", "batch_size=2")
    for key in ("zero_shot", "zero_shot_calibrated", "test_rows", "prompt"):
        assert result[key] == trained[key]
    own = {key: result["test"][key] for key in result["zero_shot"]}
    assert own == result["zero_shot"]
    calibrated = result["zero_shot_calibrated"]["accuracy"]
    assert result["test"]["calibrated_accuracy"] == calibrated
    look = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in look] == [0]
    capsys.readouterr()
    run_of(tmp_path / "a", "method=zero_shot")
    assert "done already" in capsys.readouterr().out
    assert main(["runs", "--runs-dir", str(tmp_path), "method=zero_shot", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["score"] == result["test"]["accuracy"]


def test_an_interrupted_run_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once demonstrations were chosen, it goes on to the same numbers."""
    from smezo_cli.run import best

    _, whole = run_of(tmp_path / "whole", "method=icl")
    report = best.report

    def killed(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(best, "report", killed)
    words = ["train", *TINY, f"runs_dir={tmp_path}/part/runs", "method=icl"]
    assert main(words) == 130
    monkeypatch.setattr(best, "report", report)
    _, again = run_of(tmp_path / "part", "method=icl")
    for key in ("test", "dev", "demonstrations", "zero_shot"):
        assert again[key] == whole[key]


@pytest.mark.parametrize("kind", ["choice", "generation"])
def test_icl_of_choice_and_generation(tmp_path: Path, kind: str) -> None:
    """From a file of one's own; the answers are those of the model asked by itself."""
    records = [{"q": f"what is {i}", "a": "one", "b": "two", "label": i % 2} for i in range(40)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    words = [f"task={kind}", f"task.data={tmp_path}/own.jsonl", "task.prompt='{q}? It is'"]
    words += (
        ["task.options=[a,b]"]
        if kind == "choice"
        else ["task.columns={answer: a}", "task.max_new_tokens=4"]
    )
    sizes = ["task.num_train=10", "task.num_dev=4", "task.num_test=6"]
    line = ["train", "model=tiny-llama", "device=cpu", "method=icl", *sizes, *words]
    assert main([*line, "method.num_demonstrations=2", f"runs_dir={tmp_path}/runs"]) == 0
    (file,) = (tmp_path / "runs").rglob("result.json")
    result = json.loads(file.read_text())
    assert (result["status"], result["demonstrations"]["used"]) == ("done", 2)
    if kind == "generation":
        scorer = scorer_of("tiny-llama")
        state = json.loads((file.parent / "checkpoint" / "state.json").read_text())
        head = state["notes"]["demonstrations"]["text"]
        assert head.count("? It is one\n\n") == 2
        for predicted in (file.parent / "predictions-test.jsonl").read_text().splitlines():
            found = json.loads(predicted)
            text = f"{head}what is {found['id'].partition('/')[2]}? It is"
            row = Candidates((), (), -1, False, "generation", context=(), max_new_tokens=4)
            ids = tuple(scorer.tokenizer(text)["input_ids"])
            assert scorer.generate([dataclasses.replace(row, context=ids)]) == [found["prediction"]]


# --- linear probing ------------------------------------------------------------------------------


def _newton(x: torch.Tensor, labels: torch.Tensor, classes: int, l2: float) -> torch.Tensor:
    """Probabilities (n, classes) of the same regression, by Newton's method in float64.

    Derivatives are autograd's; the last class has its weights, as in the probe.
    """
    x = (x - x.mean(0)) / x.std(0, correction=0)
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    inputs = torch.cat([x, ones], 1)
    size = inputs.shape[1]
    free = torch.cat([torch.ones(size - 1), torch.zeros(1)]).repeat(classes).double()

    def loss(w: torch.Tensor) -> torch.Tensor:
        logits = inputs @ w.view(classes, size).T
        of_rows = logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]
        return of_rows.sum() + l2 / 2 * (free * w * w).sum()

    w = torch.zeros(classes * size, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, w)
        curvature = torch.autograd.functional.hessian(loss, w)
        # A bias added to all classes changes nothing: the smallest step of all is taken.
        w = w - torch.linalg.lstsq(curvature, gradient[:, None], driver="gelsd").solution[:, 0]
    assert gradient.abs().max() < 1e-9
    return (inputs @ w.view(classes, size).T).softmax(1)


@pytest.mark.parametrize(("classes", "l2"), [(2, 1.0), (3, 0.3), (2, 50.0)])
def test_probe_is_the_minimum_that_newton_finds(classes: int, l2: float) -> None:
    """1e-4: the gradient allowed, 1e-5, over the curvature that the penalty guarantees."""
    draw = torch.Generator().manual_seed(classes)
    labels = torch.arange(80) % classes
    features = torch.randn(80, 6, generator=draw) * torch.tensor([1, 10, 0.1, 1, 1, 5]) + 3
    features[:, 0] += labels
    probe = LinearProbe(l2=l2).fit(features, labels, classes)
    ours = (features.double() @ probe["weight"].T + probe["bias"]).softmax(1)
    assert torch.allclose(ours, _newton(features.double(), labels, classes, l2), atol=1e-4)


def test_a_number_that_never_changes_is_no_feature_and_nan_is_refused() -> None:
    features = torch.tensor([[1.0, 2.0], [1.0, -2.0], [1.0, 2.5], [1.0, -1.0]])
    probe = LinearProbe(l2=1.0).fit(features, torch.tensor([0, 1, 0, 1]), 2)
    assert torch.equal(probe["weight"][:, 0], torch.zeros(2, dtype=torch.float64))
    with pytest.raises(Exception, match="not finite"):
        LinearProbe(l2=1.0).fit(features / 0, torch.tensor([0, 1, 0, 1]), 2)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt", "tiny-roberta"])
def test_features_are_the_hidden_states_that_transformers_gives(name: str) -> None:
    """Of the last token of each prompt; of a masked model behind the transform of its head."""
    scorer = scorer_of(name)
    model: Any = scorer.model
    masked = name == "tiny-roberta"
    template = "{text} . It was {mask} ." if masked else "{text}. It was"
    rows = [Row({"text": text}, 0, str(k)) for k, text in enumerate(WORDS)]
    encoded = encode(rows, Prompt(template, ("terrible", "great")), scorer.tokenizer, 100)
    found_by_row = features(scorer, encoded, lambda: False, Part(len(encoded)))
    for row, found in zip(encoded, found_by_row, strict=True):
        ids = row.context if masked else row.full[0][:-1]
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            hidden = out.hidden_states[-1][0, row.mask if row.mask is not None else -1]
            if masked:
                hidden = model.lm_head.layer_norm(
                    torch.nn.functional.gelu(model.lm_head.dense(hidden))
                )
        assert torch.allclose(found.float(), hidden, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-roberta"])
def test_probe_run_changes_the_probe_alone_and_is_used_again(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """eval and predict repeat its numbers; the model keeps its bits; nothing is exported."""
    from smezo_cli.run import zero_shot
    from smezo_cli.store.saved import tensors_digest

    models: list[tuple[torch.nn.Module, str]] = []
    real = zero_shot.choose_batching

    def noted(run: Any, loaded: Any) -> None:
        model = loaded.model
        models.append((model, tensors_digest(dict(model.named_parameters()))))
        real(run, loaded)

    monkeypatch.setattr(zero_shot, "choose_batching", noted)
    words = [f"model={name}", "task=toy", "device=cpu", "task.num_train=40"]
    words += ["task.num_dev=8", "task.num_test=12", "method=linear_probe"]
    if name == "tiny-roberta":
        words += ["task.prompt='{text} . It was {mask} .'", "task.labels=[terrible,great]"]
    assert main(["train", *words, f"runs_dir={tmp_path}/runs"]) == 0
    ((model, before),) = models
    assert tensors_digest(dict(model.named_parameters())) == before
    (file,) = (tmp_path / "runs").rglob("result.json")
    folder, result = file.parent, json.loads(file.read_text())
    assert bits(folder) == ["state.json", "weights-0.safetensors"]
    hidden = check(compose(words)).model["config"]["hidden_size"]
    assert result["num_trained"] == 2 * (hidden + 1)
    assert result["num_forwards"] > 0
    assert (result["status"], result["step"]) == ("done", 0)
    lines = (folder / "predictions-test.jsonl").read_text().splitlines()
    capsys.readouterr()
    assert main(["eval", str(folder), "--out", str(tmp_path / "again.jsonl")]) == 0
    assert f"test accuracy {result['test']['accuracy']:.4f}" in capsys.readouterr().out
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert [line["scores"] for line in again] == [json.loads(line)["scores"] for line in lines]
    field = again[0]["fields"]["text"]
    assert main(["predict", str(folder), "--field", f"text={field}"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores == pytest.approx(again[0]["scores"], abs=1e-5)
    assert main(["export", str(folder), str(tmp_path / "x")]) == 2
    assert "nothing to export" in capsys.readouterr().err


def test_a_fit_is_stopped_at_once_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is to be saved, so nothing is waited for."""
    _, whole = run_of(tmp_path / "whole", "method=linear_probe")
    with monkeypatch.context() as patched:

        def endless(*args: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("it went on")

        patched.setattr(LinearProbe, "fit", endless)
        words = ["train", *TINY, f"runs_dir={tmp_path}/part/runs", "method=linear_probe"]
        assert main(words) == 130
        (file,) = (tmp_path / "part").rglob("result.json")
        assert json.loads(file.read_text())["status"] == "stopped"
    _, again = run_of(tmp_path / "part", "method=linear_probe")
    for key in ("test", "dev", "weights", "zero_shot"):
        assert again[key] == whole[key]


# --- settings and plan ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("method=zero_shot steps=5", "steps would be ignored"),
        ("method=icl batch_size=8", "batch_size would be ignored"),
        ("method=icl keep=all", "keep would be ignored"),
        ("method=icl lr_schedule=linear", "lr_schedule would be ignored"),
        ("method=icl patience=2", "patience would be ignored"),
        ("method=icl batch_order=stratified", "batch_order would be ignored"),
        ("method=icl compile=true", "has no passes to compile"),
        ("method=icl lr=1e-3", "method icl has no lr"),
        ("method=icl method.num_demonstrations=0", "whole number of at least 1"),
        ("method=icl model=tiny-roberta", "fills masks"),
        ("method=zero_shot method.num_demonstrations=4", "icl has"),
        ("method=linear_probe method.l2=0", "a number above 0"),
        ("method=linear_probe steps=3", "steps would be ignored"),
        ("method=linear_probe task=copa", "is of kind choice"),
        ("method=mezo steps=0", "at least 1"),
    ],
)
def test_mistake_is_one_sentence(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "model=tiny-llama", "task=toy", "device=cpu", f"runs_dir={tmp_path}"]
    assert main([*line, *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err


def test_plan_of_a_probe_counts_its_rows() -> None:
    found = plan(check(compose(["model=opt-125m", "task=sst2", "method=linear_probe"])))
    assert found.work["rows whose hidden states are computed"] == 1000
    assert found.work["rows in evaluations, at most"] == 2 * 500 + 2 * 1000
    assert found.phases["evaluation"] > 0


@pytest.mark.parametrize("task", ["sst2", "copa", "squad"])
def test_plan_of_icl_holds_the_keys_of_its_demonstrations(task: str) -> None:
    """One sequence of 2,048 tokens: 2 x 12 layers x 768 numbers a token of opt-125m in float16."""
    words = ["model=opt-125m", f"task={task}", "device=cpu"]
    zero, icl = (
        plan(check(compose([*words, f"method={m}"])), capacity=1 << 36, tokens=60)
        for m in ("zero_shot", "icl")
    )
    shown = 32 * 60 * 2 * 12 * 768
    assert icl.phases["evaluation"] > shown * 2
    assert icl.peak > zero.peak
    assert zero.work["forwards of training"] == icl.work["forwards of training"] == 0
    assert zero.disk == icl.disk == 0
