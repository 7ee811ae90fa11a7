"""Scores that are not finite are no result: every method stops at them, with the row, in JSON."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smezo_cli.cli.verbs import main
from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.files import sealed as sealed_module
from smezo_cli.files import strict_json
from smezo_cli.methods.first_order import FirstOrder
from smezo_cli.methods.mezo import MeZO
from smezo_cli.models.load import load_model
from smezo_cli.run import loaded
from smezo_cli.scoring import metrics
from smezo_cli.scoring.candidates import Candidates, encode
from smezo_cli.scoring.evaluation import Evaluation
from smezo_cli.scoring.generation import greedy
from smezo_cli.scoring.objectives import NonFiniteScore, are_scored
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.tasks import Prompt, Row
from smezo_cli.zo.step import NonFiniteLoss

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = math.nan, math.inf
BAD = "~"  # a character of which the model's embedding is NaN, where it is spoilt
TEXTS = ["a joy", "no good", "fine", "so bad", "a hit", "dull", "great fun", "a bore"]
KINDS = {
    "classification": ["task.labels={0: terrible, 1: great}"],
    "choice": ["task.options=[a,b]"],
    "generation": ["task.max_new_tokens=3"],
}


def strict(text: str) -> Any:
    """JSON as the standard has it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def check_files(folder: Path) -> dict[str, Any]:
    """Every JSON file below the folder is strict; the one result.json."""
    for path in folder.rglob("*.json*"):
        for text in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        ):
            strict(text)
    (file,) = folder.rglob("result.json")
    result: dict[str, Any] = strict(file.read_text())
    return result


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Call it, and models that are loaded have this in place of the embedding of BAD."""
    real = loaded.load_model

    def spoil(value: float) -> None:
        def load(*args: Any, **keywords: Any) -> tuple[Any, Any]:
            model, tokenizer = real(*args, **keywords)
            (token,) = tokenizer(BAD, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                model.get_input_embeddings().weight[token] = value
            return model, tokenizer

        monkeypatch.setattr(loaded, "load_model", load)

    return spoil


def data_of(folder: Path, kind: str, bad_in: str) -> list[str]:
    """Settings of a task of own data; a BAD is in every row of dev, or in the second of test."""
    words = [f"task={kind}", "task.prompt='{text}. It was'", *KINDS[kind]]
    words += ["task.num_train=4", "task.num_dev=4"]
    for name in ("dev", "test"):
        rows = [
            {"text": f"{text} {name}", "label": k % 2, "answer": "ok", "a": "bad", "b": "good"}
            for k, text in enumerate(TEXTS)
        ]
        for row in rows if bad_in == "dev" else rows[1:2]:
            row["text"] += BAD if bad_in == name else ""
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*words, f"task.data={folder}/dev.jsonl", f"task.test_data={folder}/test.jsonl"]


def train(folder: Path, words: list[str]) -> int:
    small = ["model=tiny-llama", "model.config.tie_word_embeddings=false", "device=cpu"]
    return main(["train", *small, f"runs_dir={folder}/runs", *words])


FROZEN = ["zero_shot", "icl", "linear_probe"]
STEPS = ["steps=2", "batch_size=2", "eval_every=1"]


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (method, kind)
        for method in (*FROZEN, "mezo", "adamw")
        for kind in (list(KINDS) if method != "linear_probe" else ["classification"])
    ],
)
def test_a_run_stops_at_a_score_that_is_not_finite(
    method: str,
    kind: str,
    split: str,
    spoil: Callable[[float], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It names the row and the cause, ends with 2, and result.json is JSON without a score."""
    spoil(NAN)
    words = [*data_of(tmp_path, kind, split), f"method={method}"]
    words += [] if method in FROZEN else STEPS
    if method == "icl":
        words.append("method.num_demonstrations=1")
    assert train(tmp_path, words) == 2
    error = capsys.readouterr().err
    if "loss nan" in error:  # of a training row: dev was not looked at yet
        assert split == "dev"
        assert method not in FROZEN
    else:
        row = "test/2" if split == "test" else "train/"  # named after its file
        assert f"{split} loss is not finite" in error
        assert f": the scores of row {row}" in error
        assert "nan" in error
    assert "holds numbers that are not finite" in error
    result = check_files(tmp_path / "runs")
    assert result["status"] == "diverged"
    assert result["test"] is None


def test_training_that_diverges_names_the_row_and_the_last_good_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that a step made infinite: the dev score of a row, not a loss alone."""
    words = [*data_of(tmp_path, "classification", "none"), "method=mezo", *STEPS]
    assert train(tmp_path, [*words, "lr=1e38", "lr_schedule=constant"]) == 2
    error = capsys.readouterr().err
    assert "dev loss is not finite at step 1: the scores of row train/" in error
    assert "; no checkpoint was good in " in error
    assert "lr=1e+38 is too large here: lower it" in error
    result = check_files(tmp_path / "runs")
    assert (result["status"], result["step"]) == ("diverged", 1)


ABSURD = [
    *((method, "lr=1e38") for method in ("adamw", "lora", "prefix")),
    *((method, "lr=1e300") for method in ("sgd", "mezo_adam", "lozo_m", "addax")),
    *((method, "eps=1e38") for method in ("sparse_mezo", "fzoo", "hizoo")),
]


@pytest.mark.parametrize(("method", "word"), ABSURD)
def test_absurd_lr_and_eps_end_in_one_sentence(
    method: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is too large first: a loss, a gradient, or a factor of the update."""
    words = [*data_of(tmp_path, "classification", "none"), f"method={method}", *STEPS]
    words += ["lr_schedule=constant", "zero_shot=false", word]
    assert train(tmp_path, words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "; no checkpoint was good in " in error
    assert "is too large here: lower it" in error
    assert ("or eps" in error) == (method not in ("adamw", "lora", "prefix", "sgd"))
    assert check_files(tmp_path / "runs")["status"] == "diverged"


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "Adamax"])
def test_an_update_that_no_float_can_hold_is_no_crash(name: str) -> None:
    """Of any optimizer, also where decay has moved weights before the factor is refused."""
    model = torch.nn.Linear(3, 1)
    optimizer = partial(getattr(torch.optim, name), lr=1e300, weight_decay=0.5)
    method = FirstOrder(model, optimizer=optimizer)

    def two_steps() -> None:
        for _ in range(2):
            method.step(lambda: model(torch.ones(2, 3)).square().mean())

    with pytest.raises(NonFiniteLoss):
        two_steps()


@pytest.mark.parametrize("method", ["hizoo", "cubic_newton"])
def test_an_eps_whose_square_is_zero_is_called_too_small(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*data_of(tmp_path, "classification", "none"), f"method={method}", *STEPS]
    assert train(tmp_path, [*words, "zero_shot=false", "eps=1e-300"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a number of step 0 is not finite" in error
    assert error.endswith("eps=1e-300 is too small here: raise it.\n")
    assert check_files(tmp_path / "runs")["status"] == "diverged"


def scorer_of() -> Scorer:
    node = check(compose(["model=tiny-llama", "task=toy", "method=zero_shot"])).model
    return Scorer(*load_model(node, dtype=torch.float32, device="cpu", cache=Path(".")))


def test_a_hidden_state_that_is_not_finite_is_named_by_its_row() -> None:
    """The features of a linear probe, one row of three."""
    scorer = scorer_of()
    rows = [Row({"text": text}, k % 2, f"id{k}") for k, text in enumerate(["ok", BAD, "good"])]
    prompt = Prompt("{text}. It was", ("terrible", "great"))
    batch = encode(rows, prompt, scorer.tokenizer, 99)
    assert all(found.isfinite().all() for _, found in scorer.features_all(batch))
    (token,) = scorer.tokenizer(BAD, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        next(scorer.model.parameters())[token] = NAN
    with pytest.raises(NonFiniteScore, match="the hidden state of row id1 is not finite"):
        list(scorer.features_all(batch))


@pytest.mark.parametrize("objective", ["accuracy", "f1"])
def test_an_objective_over_scores_that_are_not_finite_stops_the_step(objective: str) -> None:
    """The most probable of NaN is no answer, right or wrong: the weights stay as they were."""
    scorer = scorer_of()
    model, tokenizer = scorer.model, scorer.tokenizer
    kind = "generation" if objective == "f1" else "classification"
    labels = () if kind == "generation" else ("terrible", "great")
    answers = ("ok",) if kind == "generation" else ()
    rows = [Row({"text": text}, k % 2, text, answers=answers) for k, text in enumerate(TEXTS[:3])]
    batch = encode(rows, Prompt("{text}. It was", labels), tokenizer, 99, kind, 3)
    assert scorer.objective(batch, objective).isfinite()
    with torch.no_grad():
        next(model.parameters())[:] = NAN
    opt = MeZO(model, lr=1e-3, eps=1e-3, check=False, backend="eager")
    before = [p.clone() for p in model.parameters()]
    assert scorer.objective(batch, objective).isnan()
    assert scorer.objective_sum(batch, objective).isnan()
    with pytest.raises(NonFiniteLoss, match="loss nan and nan at step 0"):
        opt.step(lambda: scorer.objective(batch, objective))
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.nan_to_num(), was.nan_to_num())


def test_verbs_on_a_trained_run_stop_too(
    spoil: Callable[[float], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`eval`, `predict` and `replay` end with 2, name the row, and write and print no figures."""
    spoil(NAN)
    good = data_of(tmp_path, "classification", "none")
    assert train(tmp_path, [*good, "method=mezo", *STEPS]) == 0
    (file,) = tmp_path.rglob("result.json")
    run = str(file.parent)
    capsys.readouterr()
    (tmp_path / "other").mkdir()
    data_of(tmp_path / "other", "classification", "test")
    other = f"task.test_data={tmp_path}/other/test.jsonl"
    out = tmp_path / "out.jsonl"
    lines = (
        ("test/2", ["eval", run, other, "--out", str(out)]),
        ("2", ["predict", run, f"{tmp_path}/other/test.jsonl", "--out", str(out)]),
        ("test/2", ["replay", run, other]),
    )
    for name, words in lines:
        assert main(words) == 2, words
        printed = capsys.readouterr()
        assert f"the scores of row {name} are nan, nan; " in printed.err, words
        assert "embed_tokens.weight of model=tiny-llama holds numbers" in printed.err
        assert "test accuracy" not in printed.out
        assert not out.exists()
    assert main(["predict", run, "--field", "text=fine"]) == 0
    assert all(map(math.isfinite, strict(capsys.readouterr().out)["scores"]))


def test_an_answer_to_which_a_token_cannot_be_told_is_none() -> None:
    """NaN behind the first token of one of two rows; the other row is answered."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            logits = torch.zeros(len(input_ids), 1, 4)
            logits[:, :, 2] = 1
            if input_ids.shape[1] > 2:
                logits[1] = NAN
            return type("Output", (), {"logits": logits})

    class Tokenizer:
        pad_token_id = eos_token_id = 0

        def decode(self, ids: list[int], **_: Any) -> str:
            return "w" * len(ids)

    assert greedy(Model(), Tokenizer(), [[1, 2], [1, 3]], 3) == ["www", None]
    row = Candidates((), (), -1, False, "generation", context=(1,), id="q7")
    with pytest.raises(NonFiniteScore, match="next token of row q7 are not finite"):
        Evaluation([row, row], torch.full((2, 1), -INF), ["www", None])  # type: ignore[list-item]  # as greedy gives


# --- a candidate that is ruled out ----------------------------------------------------------------


def row(label: int, classes: int = 2) -> Candidates:
    full = tuple((1, k) for k in range(classes))
    words = ("bad", "good", "so-so")[:classes]
    return Candidates(full, (1,) * classes, label, False, words=words, id=f"r{label}")


@pytest.mark.parametrize(
    ("scores", "label", "good"),
    [
        ([0.0, -INF], 0, True),
        ([0.0, -INF], -1, True),
        ([0.0, -INF], 1, False),  # its loss is infinite
        ([-INF, -INF], -1, False),
        ([0.0, NAN], 0, False),
        ([0.0, INF], 1, False),
        ([-INF, NAN], -1, False),
    ],
)
def test_which_scores_are_scores(scores: list[float], label: int, good: bool) -> None:
    """-inf of a candidate is one, but of the right one or of all; NaN and inf are none."""
    found = torch.tensor([scores])
    assert are_scored([row(label)], found).tolist() == [good]
    if good:
        Evaluation([row(label)], found)
        return
    with pytest.raises(NonFiniteScore, match=f"the scores of row r{label} are "):
        Evaluation([row(label)], found)


def test_figures_where_a_model_rules_classes_out() -> None:
    """Rows where one of two classes is impossible: figures are finite, its score null in JSON."""
    rows = [row(0), row(1), row(1), row(0)]
    scores = torch.tensor([[1.0, -INF], [-INF, 0.0], [2.0, 1.0], [1.0, 3.0]])
    found = Evaluation(rows, scores)
    offsets = metrics.fit_offsets(found.scores, found.labels)
    assert offsets.isfinite().all()
    assert metrics.accuracy(found.scores + offsets, found.labels) == 0.75
    figures = found.figures(offsets)
    assert all(math.isfinite(figure) for figure in figures.values())
    assert strict(strict_json.dumps(found.predictions()))[0]["scores"] == [0.0, None]


def test_offsets_of_three_classes_of_which_rows_lack_one() -> None:
    """As good as the best of a grid, and finite."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 3, generator=generator)
    labels = torch.randint(3, (40,), generator=generator)
    scores[torch.arange(20), (labels[:20] + 1) % 3] = -INF
    offsets = metrics.fit_offsets(scores, labels)
    assert offsets.isfinite().all()
    grid = torch.linspace(-3, 3, 61)
    tried = [
        metrics.accuracy(scores + torch.tensor([0.0, a, b]), labels) for a in grid for b in grid
    ]
    assert metrics.accuracy(scores + offsets, labels) >= max(tried) - 0.05
    nothing = torch.tensor([[0.0, -INF], [-INF, 0.0]])
    assert metrics.fit_offsets(nothing, torch.tensor([0, 1])).tolist() == [0.0, 0.0]


# --- JSON -----------------------------------------------------------------------------------------


def test_json_that_is_written_is_that_of_the_standard() -> None:
    """What is finite as json writes it, to the character; what is not, and all in it, as null."""
    good = {"a": [1, 2.5, None, True], "b": {"c": "NaN", "é": 1e-300}}
    for how in ({}, {"indent": 2}, {"ensure_ascii": False}, {"sort_keys": True}):
        assert strict_json.dumps(good, **how) == json.dumps(good, **how)
    bad = {"a": [NAN, (INF, 1.0)], "b": {"c": -INF, "d": 4.0}}
    wanted = {"a": [None, [None, 1.0]], "b": {"c": None, "d": 4.0}}
    assert strict(strict_json.dumps(bad)) == wanted
    sealed = sealed_module.sealed(bad | {"sha256": "of before"})
    again = strict(strict_json.dumps(sealed))
    assert sealed_module.unsealed(again) == wanted


def test_a_run_of_before_that_holds_nan_is_still_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`runs`, `plot` and a second `train` take it; what is printed as JSON is strict."""
    words = [*data_of(tmp_path, "classification", "none"), "method=mezo", *STEPS]
    assert train(tmp_path, words) == 0
    (file,) = tmp_path.rglob("result.json")
    result = json.loads(file.read_text())
    result["test"] |= {"loss": NAN, "auc": NAN}
    result["dev"]["best"]["loss"] = NAN
    del result["sha256"]
    file.write_text(json.dumps(result | {"sha256": sealed_module._seal(result)}))
    assert "NaN" in file.read_text()
    with (file.parent / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 2, "dev.accuracy": 0.5, "dev.loss": NaN}\n')
    capsys.readouterr()
    for more in ([], ["--mean"], ["--sort", "score"]):
        assert main(["runs", "--runs-dir", f"{tmp_path}/runs", "--json", *more]) == 0
        (record,) = strict(capsys.readouterr().out)
        assert record["score"] == result["test"]["accuracy"]
    assert main(["runs", "--runs-dir", f"{tmp_path}/runs"]) == 0
    sources = ["curve", "--runs-dir", f"{tmp_path}/runs", "--y", "loss"]
    assert main(["plot", *sources, "--out", f"{tmp_path}/figure.svg"]) == 0


def test_a_bench_of_scores_that_are_not_finite_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A forward alone has no loss, by which that would be found."""
    from smezo_cli.models import load as models

    real = models.load_model

    def load(*args: Any, **keywords: Any) -> tuple[Any, Any]:
        model, tokenizer = real(*args, **keywords)
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(NAN)
        return model, tokenizer

    monkeypatch.setattr(models, "load_model", load)
    out = tmp_path / "bench.json"
    words = f"bench model=tiny-llama batch_size=2 length=8 device=cpu --rounds 1 --json {out}"
    assert main([*words.split(), "--only", "forward"]) == 2
    assert "forward: its scores are not finite" in capsys.readouterr().err
    assert not out.exists()
