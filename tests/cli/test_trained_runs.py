"""`smezo eval`, `predict` and `export` on finished runs of every kind of task."""

import json
import math
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smezo_cli.cli.verbs import main
from smezo_cli.config.compose import compose
from smezo_cli.config.digest import with_later_keys
from smezo_cli.config.settings import check
from smezo_cli.errors import UserError
from smezo_cli.models.load import load_model
from smezo_cli.scoring import scorer
from smezo_cli.scoring.scorer import Scorer

# So large a step that the model answers otherwise than before.
TRAIN = (
    "model=tiny-llama method=adamw lr=1e-2 steps=6 eval_every=2 batch_size=4 keep=all device=cpu"
)
COUNTS = "task.num_train=16 task.num_dev=8 task.num_test=12"
WORDS = (("dull", "stale", "bleak"), ("warm", "clever", "bright"))


def _table(header: str, line: Callable[[int], str]) -> str:
    return "\n".join([header, *map(line, range(36))]) + "\n"


# By kind: the file, the words of the task, and the columns that a row to predict needs.
KINDS = {
    "classification": (
        _table("text,label", lambda i: f"the plot was {WORDS[i % 2][i % 3]} and {i},{i % 2}"),
        "'task.prompt={text} It was' 'task.labels={0: bad, 1: good}'",
        ["text"],
    ),
    "choice": (
        _table("text,a,b,label", lambda i: f"film {i},a dull cast,a warm one {i},{i % 2}"),
        "'task.prompt={text} had' task.options=[a,b]",
        ["text", "a", "b"],
    ),
    "generation": (
        _table(
            "text,answer", lambda i: f"film {i} was {WORDS[i % 2][i % 3]},{WORDS[i % 2][i % 3]}"
        ),
        "'task.prompt={text}. It was' task.max_new_tokens=4",
        ["text"],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished run of a kind, its data two folders above; the working folder."""
    cwd, here = tmp_path_factory.mktemp(request.param), Path.cwd()
    table, words, _ = KINDS[request.param]
    os.chdir(cwd)
    try:
        Path("my.csv").write_text(table)
        line = f"train task={request.param} task.data=my.csv {words} {COUNTS} {TRAIN}"
        assert main(shlex.split(line)) == 0
        (folder,) = Path("runs/default").iterdir()
        (folder / "predictions-test.jsonl").rename("trained.jsonl")
        yield folder
    finally:
        os.chdir(here)


def smezo(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def lines(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def result_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return loaded


def kind_of(folder: Path) -> str:
    return str(OmegaConf.load(folder / "config.yaml").task.kind)


def log_probabilities(folder: Path, scores: torch.Tensor) -> list[list[float]]:
    """What a line of predictions says of the scores of a split."""
    found = scores.double()
    return (found.log_softmax(1) if kind_of(folder) == "classification" else found).tolist()


@pytest.mark.parametrize("method", ["adamw steps=2 eval_every=1", "zero_shot", "linear_probe"])
def test_one_class_alone_is_said_and_nothing_is_calibrated_by_it(
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the console and in result.json; any threshold is right for dev rows of one class."""
    monkeypatch.chdir(tmp_path)
    table, words, _ = KINDS["classification"]
    Path("my.csv").write_text(table)
    Path("one.csv").write_text("text,label\n" + "".join(f"film {i},1\n" for i in range(6)))
    line = f"train task=classification task.data=my.csv {words} model=tiny-llama device=cpu "
    line += f"method={method} task.num_dev=1 task.test_data=one.csv name="
    smezo(*shlex.split(line + "alone"))
    out = capsys.readouterr().out
    note = next(at for at in out.splitlines() if "one class alone" in at)
    assert "dev (1 of 1 rows: label " in note
    assert "test (6 of 6 rows: label 1)" in note
    assert "calibrated" not in out
    assert "AUC" not in out
    (folder,) = Path("runs/alone").iterdir()
    result = result_of(folder)
    assert result["data_notes"] == [note.removeprefix("  note    ")]
    assert result["zero_shot_calibrated"] is None
    assert result["test"]["auc"] is None
    assert not {"calibrated_accuracy", "over_zero_shot_calibrated"} & result["test"].keys()
    smezo("eval", folder)
    out = capsys.readouterr().out
    assert "one class alone in dev" in out
    assert "auc" not in out
    smezo("runs", "--mean")
    smezo(*shlex.split(line.replace("num_dev=1", "num_dev=12") + "both"))
    (folder,) = Path("runs/both").iterdir()
    assert result_of(folder)["test"]["calibrated_accuracy"] is not None
    assert len(result_of(folder)["data_notes"]) == 1  # of the test rows


def test_training_rows_of_one_class_by_their_length_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{'so very ' * 9 * (i % 2)}dull {i},{i % 2}\n" for i in range(20))
    Path("my.csv").write_text(f"text,label\n{rows}")
    words = "'task.prompt={text}' 'task.labels={0: bad, 1: good}' task.max_train_tokens=16"
    line = f"train task=classification task.data=my.csv {words} model=tiny-llama device=cpu"
    smezo(*shlex.split(f"{line} task.num_dev=6 method=adamw steps=1 batch_size=2"))
    (folder,) = Path("runs/default").iterdir()
    (note,) = result_of(folder)["data_notes"]
    assert note.startswith("one class alone in train (the ")
    assert f"  note    {note}\n" in capsys.readouterr().out


def test_a_run_whose_rows_were_numbered_by_line_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped by an earlier version it goes on, and is evaluated and replayed, on its own rows."""
    from smezo_cli.run import evaluate
    from smezo_cli.tasks import own

    monkeypatch.chdir(tmp_path)
    table, words, _ = KINDS["classification"]
    Path("my.csv").write_text(table)
    line = f"train task=classification task.data=my.csv {words} {COUNTS} model=tiny-llama"
    line += " method=mezo steps=4 eval_every=2 batch_size=4 device=cpu"
    with monkeypatch.context() as before:
        read = own.read
        before.setattr(own, "read", lambda cfg, **more: read(cfg, **more | {"by_line": True}))
        smezo(*shlex.split(line))
        whole = result_of(next(Path("runs/default").iterdir()))
        shutil.rmtree("runs")
        real, looked = evaluate.evaluate, []

        def stopping(*given: Any) -> Any:
            looked.append(given)
            if len(looked) > 3:  # dev and test zero-shot, dev at step 2
                raise KeyboardInterrupt
            return real(*given)

        before.setattr(evaluate, "evaluate", stopping)
        assert main(shlex.split(line)) == 130
    (folder,) = Path("runs/default").iterdir()
    capsys.readouterr()
    smezo(*shlex.split(line))
    assert "numbered by line" in capsys.readouterr().out
    done = result_of(folder)
    for key in ("test", "train_rows", "test_rows", "weights"):
        assert done[key] == whole[key]
    smezo("eval", folder)
    assert f"test accuracy {done['test']['accuracy']:.4f}" in capsys.readouterr().out
    smezo("replay", folder)
    assert "the same as the run's\n" in capsys.readouterr().out
    smezo(*shlex.split(line), "if_exists=fresh")
    assert result_of(folder)["test_rows"] != done["test_rows"]


def test_eval_repeats_the_test_of_the_training_bit_for_bit(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same predictions, with the texts of the rows beside them, and the same figures."""
    smezo("eval", run)
    out = capsys.readouterr().out
    found = lines(run / "predictions-test.jsonl")
    assert all("text" in line["fields"] for line in found)
    assert found == lines("trained.jsonl")
    assert len(found) == 12
    result = result_of(run)
    test, metric, step = result["test"], result["metric"], result["dev"]["best"]["step"]
    assert f"test {metric} {test[metric]:.4f} +- {test['standard_error']:.4f} (n=12, " in out
    assert f"step {step})" in out
    assert f"loss  {test['loss']:.4f}" in out


@pytest.mark.parametrize("verb", ["eval", "predict"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_between_two_batches_keeps_what_is_scored(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    verb: str,
    number: signal.Signals,
) -> None:
    """Every start is stopped at its second batch; each batch is computed once, to the same end.

    Of predictions that go to the standard output, the scores are kept in the run folder.
    """
    monkeypatch.setattr(scorer, "EVAL_TOKENS", 24)
    monkeypatch.setattr(scorer, "EVAL_ANSWERS", 3)
    batches: list[str] = []
    stop_at = [math.inf]

    def wrap(name: str) -> Callable[..., Iterator[Any]]:
        real = getattr(Scorer, name)

        def counted(*args: Any) -> Iterator[Any]:
            for found in real(*args):
                batches.append(f"{name} {found[0]}")
                if len(batches) == stop_at[0]:
                    os.kill(os.getpid(), number)
                yield found

        return counted

    for name in ("score_all", "generate_all"):
        monkeypatch.setattr(Scorer, name, wrap(name))
    columns = KINDS[kind_of(run)][2]
    records = [{name: f"{name} {'so ' * (i % 5)} {i}" for name in columns} for i in range(9)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["eval", str(run), "--out", str(tmp_path / "found.jsonl")]
    if verb == "predict":
        words = ["predict", str(run), str(rows)]

    def found() -> str:
        out = capsys.readouterr().out
        return out if verb == "predict" else (tmp_path / "found.jsonl").read_text()

    def kept() -> list[Path]:
        return [p for of in (tmp_path, run) for p in of.iterdir() if "partial" in p.name]

    assert main(words) == 0
    wanted, all_batches, stops = found(), sorted(batches), 0
    del batches[:]
    while True:
        stop_at[0] = len(batches) + 2
        code = main(words)
        if code == 0:
            break
        assert code == 130
        assert len(batches) == stop_at[0]
        assert len(kept()) == 1
        stops += 1
        said = capsys.readouterr()
        assert "the same command" in (said.err if verb == "predict" else said.out)
    assert stops >= 2
    assert sorted(batches) == all_batches
    assert found() == wanted
    assert kept() == []


def test_eval_takes_any_split(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On dev it finds what the run found there; no row is in two splits."""
    names = set()
    for split, count in (("dev", 8), ("train", 16), ("test", 12)):
        smezo("eval", run, "--split", split, "--out", f"{split}.jsonl")
        found = lines(f"{split}.jsonl")
        assert len(found) == count
        names |= {line["id"] for line in found}
    assert len(names) == 8 + 16 + 12
    best = result_of(run)["dev"]["best"]
    metric = result_of(run)["metric"]
    out = capsys.readouterr().out
    assert f"dev {metric} {best[metric]:.4f} +- " in out
    assert f"loss  {best['loss']:.4f}" in out


def test_the_base_is_the_model_before_training(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--base gives the zero-shot scores bit for bit, and not those of the trained model."""
    smezo("eval", run, "--base")
    out = capsys.readouterr().out
    found, result = lines(run / "predictions-test-base.jsonl"), result_of(run)
    scores = load_file(run / "scores.safetensors")
    assert "untrained" in out
    assert f"loss  {result['zero_shot']['loss']:.4f}" in out
    assert f"{result['metric']} {result['zero_shot'][result['metric']]:.4f} +-" in out
    if kind_of(run) == "generation":
        assert [line["f1"] for line in found] == scores["outcome.zero_shot"].tolist()
        trained = [line["prediction"] for line in lines("trained.jsonl")]
        assert [line["prediction"] for line in found] != trained
    else:
        assert [line["scores"] for line in found] == log_probabilities(run, scores["zero_shot"])
        assert [line["scores"] for line in found] != log_probabilities(run, scores["test"])


def test_the_weights_of_every_look_can_be_scored(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With keep=all, --step N on dev finds what the run wrote down at step N."""
    looks = {
        record["step"]: record["dev.loss"]
        for record in lines(run / "metrics.jsonl")
        if "dev.loss" in record
    }
    assert sorted(looks) == [2, 4, 6]
    assert len(set(looks.values())) == 3
    for step, loss in looks.items():
        smezo("eval", run, "--split", "dev", "--step", step, "--out", "step.jsonl")
        out = capsys.readouterr().out
        assert f"step {step})" in out
        assert f"loss  {loss:.4f}" in out


def test_predict_needs_no_labels(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The test rows without their labels get the predictions that the test gave them."""
    trained, (table, _, columns) = lines("trained.jsonl"), KINDS[kind_of(run)]
    rows = [line.split(",") for line in table.splitlines()]
    kept = [rows[0].index(column) for column in columns]
    # An id is the place in the file: train/ROW.
    places = [0, *(int(line["id"].split("/")[1]) for line in trained)]
    Path("new.csv").write_text(
        "".join(",".join(rows[place][i] for i in kept) + "\n" for place in places)
    )
    smezo("predict", run, "new.csv", "--out", "new.jsonl")
    assert "12 predictions" in capsys.readouterr().out
    found = lines("new.jsonl")
    assert [line["prediction"] for line in found] == [line["prediction"] for line in trained]
    assert all(not {"label", "correct", "f1"} & line.keys() for line in found)
    if kind_of(run) != "generation":
        assert [line["scores"] for line in found] == [line["scores"] for line in trained]
        assert [line["word"] for line in found] == [line["word"] for line in trained]


def test_predict_answers_one_row_on_standard_output(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line of JSON and nothing else, fit for a pipe."""
    fields = {"text": "the film was warm", "a": "one", "b": "two"}
    columns = KINDS[kind_of(run)][2]
    words = [word for name in columns for word in ("--field", f"{name}={fields[name]}")]
    smezo("predict", run, *words)
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["fields"] == {"text": "the film was warm"}
    assert "prediction" in found


def test_transformers_loads_what_was_exported_and_a_run_can_begin_there(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal logits to the last bit; as model.path it scores zero-shot what the run did trained."""
    smezo("export", run, "exported")
    best = result_of(run)["dev"]["best"]["step"]
    assert f"tiny-llama after {best} steps" in capsys.readouterr().out
    cfg: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"), resolve=True)
    ours, ours_tokenizer = load_model(
        cfg["model"], dtype=torch.float32, device=torch.device("cpu"), cache=Path("/nowhere")
    )
    weights = load_file(run / f"checkpoint/weights-{best}.safetensors")
    ours.load_state_dict(weights, strict=False)  # a tied weight is saved once
    theirs = AutoModelForCausalLM.from_pretrained("exported", dtype=torch.float32)
    theirs.eval()
    text = "the plot was warm and 3 It was good"
    ids = AutoTokenizer.from_pretrained("exported")(text, return_tensors="pt")["input_ids"]
    assert ids.tolist() == [ours_tokenizer(text)["input_ids"]]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert OmegaConf.load("exported/smezo.yaml") == OmegaConf.load(run / "config.yaml")
    (measured,) = ModelCard.load("exported/README.md").data.eval_results
    assert measured.metric_value == result_of(run)["test"][measured.metric_type]

    kind = kind_of(run)
    words = shlex.split(f"task={kind} task.data=my.csv {KINDS[kind][1]} {COUNTS} {TRAIN}")
    words += ["model=own", "model.path=exported", "model.max_length=256", "steps=1", "name=again"]
    smezo("train", *words)
    (again,) = Path("runs/again").iterdir()
    zero, test = result_of(again)["zero_shot"], result_of(run)["test"]
    assert zero == {key: test[key] for key in zero}


def test_an_export_of_a_step_has_its_weights(run: Path) -> None:
    """--step N of a run with keep=all, not the best."""
    best = result_of(run)["dev"]["best"]["step"]
    other = 2 if best != 2 else 4
    smezo("export", run, f"step-{other}", "--step", other)
    saved = load_file(f"step-{other}/model.safetensors")
    kept = load_file(run / f"checkpoint/weights-{other}.safetensors")
    shared = saved.keys() & kept.keys()
    assert len(shared) >= len(saved) - 1
    assert all(torch.equal(saved[name], kept[name]) for name in shared)


# ----------------------------------------------------- trajectories: replay, deltas, any step

SPARSE = (
    "train task=toy task.num_train=16 task.num_dev=8 task.num_test=12 model=tiny-llama device=cpu "
    "method=sparse_mezo lr=1e-3 sparsity=0.5 steps=7 eval_every=3 batch_size=4 full_save_every=2 "
    "method.executor=sequential method.mask_refresh_every=2 compile=false"
)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished zeroth-order run; the working folder is two above."""
    cwd, here = tmp_path_factory.mktemp("sparse"), Path.cwd()
    os.chdir(cwd)
    try:
        assert main(shlex.split(SPARSE)) == 0
        (folder,) = Path("runs/default").iterdir()
        yield folder
    finally:
        os.chdir(here)


def refused(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that refuses a command."""
    assert main(shlex.split(words)) == 2
    said = capsys.readouterr().err
    assert said.startswith("smezo: ")
    assert said.count("\n") == 1
    return said


def test_replay_gives_the_weights_and_the_figures_of_the_run(
    sparse: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the base model and trajectory.bin alone, in two threads too, by compiled passes too."""
    smezo("replay", sparse, "--out", "replayed")
    out = capsys.readouterr().out
    result = result_of(sparse)
    best = result["weights"]["best"]
    assert f"weights sha256 {best['sha256']}: the same as the run's" in out
    assert f"test accuracy {result['test']['accuracy']:.4f}" in out
    assert out.count("the same as the run's") == 2
    saved = load_file(sparse / f"checkpoint/weights-{best['step']}.safetensors")
    replayed = load_file("replayed/model.safetensors")
    assert all(torch.equal(replayed[name], saved[name]) for name in saved.keys() & replayed)
    torch.set_num_threads(2)
    for compiled in ("auto", "true", "false"):
        smezo("replay", sparse, f"compile={compiled}", "--split", "none", "--step", 7)
        assert f"{result['weights']['last']['sha256']}: the same" in capsys.readouterr().out
    torch.set_num_threads(1)


def test_a_run_of_before_a_setting_came_is_read_as_one_that_has_it(
    sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smezo("eval", sparse)
    expected = capsys.readouterr().out
    old = Path(shutil.copytree(sparse, tmp_path / sparse.name))
    config = OmegaConf.load(old / "config.yaml")
    for key in ("batch_order", "zero_shot", "query_ranks", "rank_backend", "micro_batch_size"):
        del config[key]
    (old / "config.yaml").write_text(OmegaConf.to_yaml(config))
    smezo("eval", old)
    assert capsys.readouterr().out.replace(str(old), str(sparse)) == expected


def test_what_was_ignored_when_a_run_was_made_does_not_refuse_it_now() -> None:
    cfg = compose(["task=toy", "model=tiny-llama", "method=adamw"])
    cfg.full_save_every = 100
    with pytest.raises(UserError, match="full_save_every=100: the steps of adamw"):
        check(cfg)
    with_later_keys(cfg)
    assert check(cfg).full_save_every == 500


def test_a_delta_alone_gives_the_model_again(
    sparse: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """No run folder is needed; its size is said; a step of its own has a digest, too."""
    result = result_of(sparse)
    smezo("export", sparse, tmp_path / "a.delta", "--delta")
    assert f"{(tmp_path / 'a.delta').stat().st_size} bytes" in capsys.readouterr().out
    smezo("export", sparse, tmp_path / "b.delta", "--delta", "--step", 5)
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        capsys.readouterr()
        smezo("replay", "a.delta")
        out = capsys.readouterr().out
        assert out.count("the same as the run's") == 2
        assert result["weights"]["best"]["sha256"] in out
        smezo("replay", "b.delta", "--split", "none")
        assert "5 steps applied" in (out := capsys.readouterr().out)
        assert "the same as the run's" in out
    finally:
        os.chdir(here)


def test_weights_that_are_others_are_said_and_fail(
    sparse: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit code 1 where the digest does not agree with what was recorded."""
    from smezo_cli.store import delta

    smezo("export", sparse, tmp_path / "a.delta", "--delta")
    about, records = delta.read_delta(tmp_path / "a.delta")
    about["weights"]["sha256"] = "0" * 64
    content = delta.delta(records, about.pop("step"), about)
    (tmp_path / "b.delta").write_bytes(content)
    assert main(["replay", str(tmp_path / "b.delta"), "--split", "none"]) == 1
    assert "NOT the same" in capsys.readouterr().out


def test_another_model_or_method_is_refused(
    sparse: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One sentence each, before a step is applied."""
    from smezo_cli.store import delta, trajectory

    smezo("export", sparse, tmp_path / "a.delta", "--delta")
    about, records = delta.read_delta(tmp_path / "a.delta")
    step = about.pop("step")
    for key, value, says in (
        ("model", "0" * 12, "another model"),
        ("identity", records.header["identity"] | {"numerics": 0}, "another numerics"),
    ):
        other = dict(about)
        header = records.header | {key: value}
        changed = trajectory.Trajectory(header, records._records, None)
        other.pop("header")
        (tmp_path / "b.delta").write_bytes(delta.delta(changed, step, other))
        assert says in refused(f"replay {tmp_path / 'b.delta'}", capsys)
    assert "has no config.yaml" in refused("replay .", capsys)
    assert "holds" in refused(f"replay {sparse} --step 99", capsys)


def test_any_step_can_be_scored_and_exported(
    sparse: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By replay from the nearest save; damaged saves are said and replayed over."""
    looks = {r["step"]: r["dev.loss"] for r in lines(sparse / "metrics.jsonl") if "dev.loss" in r}
    assert sorted(looks) == [3, 6, 7]
    for step, loss in looks.items():
        smezo("eval", sparse, "--split", "dev", "--step", step, "--out", "step.jsonl")
        assert f"loss  {loss:.4f}" in capsys.readouterr().out
    assert "has made 7 steps" in refused(f"eval {sparse} --step 8", capsys)
    best = result_of(sparse)["dev"]["best"]
    path = sparse / f"checkpoint/weights-{best['step']}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        smezo("eval", sparse, "--split", "dev", "--out", "step.jsonl")
        out = capsys.readouterr().out
        assert f"{path.name} is damaged" in out
        assert f"loss  {best['loss']:.4f}" in out
    finally:
        path.write_bytes(content)


def test_a_folder_that_is_read_only_can_be_read(
    sparse: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """eval asks for --out before the work; predict and replay need none; the lock stays."""
    lock = (sparse / ".lock").stat().st_mtime_ns
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "--out FILE" in refused(f"eval {sparse}", capsys)
    smezo("eval", sparse, "--out", "elsewhere.jsonl")
    smezo("predict", sparse, "--field", "text=the film was warm")
    smezo("replay", sparse, "--split", "none")
    assert (sparse / ".lock").stat().st_mtime_ns == lock


def test_show_prints_the_settings_of_a_run_and_what_came_of_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = result_of(run)
    smezo("show", "run", run)
    said = capsys.readouterr().out
    assert OmegaConf.create(said) == OmegaConf.load(run / "config.yaml")  # the rest are comments
    metric = result["metric"]
    assert f"# test: {metric} {result['test'][metric]:.4f} +- " in said
    assert "# status: done at step 6 of 6\n" in said
    assert f"# command: {result['command']}\n" in said
    smezo("show", "run", run.name)
    assert capsys.readouterr().out.partition("\n")[2] == said.partition("\n")[2]
    assert main(["show", "run", "rte-opt"]) == 2
    assert "there is no run rte-opt" in capsys.readouterr().err
