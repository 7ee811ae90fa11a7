"""What `smezo export --lm-eval` writes: lm-evaluation-harness scores the same tokens of each row.

The harness itself is asked where it is installed (`pip install -e '.[lm-eval]'`); its way of
parting a text into tokens, written down here once more, everywhere.
"""

import dataclasses
import json
import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smezo_cli.cli.verbs import main
from smezo_cli.errors import UserError
from smezo_cli.integrations import lm_eval_task
from smezo_cli.integrations.lm_eval import check_prompts, task_files
from smezo_cli.models.peft_layers import quiet_peft
from smezo_cli.models.tiny import byte_tokenizer
from smezo_cli.scoring import squad
from smezo_cli.scoring.candidates import encode
from smezo_cli.tasks import Prompt, Row

TRAIN = "model=tiny-llama lr=1e-2 eval_every=3 batch_size=4 device=cpu zero_shot=false"
COUNTS = "task.num_train=8 task.num_dev=4 task.num_test=8"
PARTS = ("rte", "boolq", "sst2", "own")
#: Float32 on both sides, in batches of other shapes, and a merged LoRA: 1e-5 was seen at most.
NEAR = {"rel": 1e-4, "abs": 1e-5}


def write_rows() -> None:
    """Write few rows of RTE, BoolQ and SST-2 in the benchmarks' own forms, and a table of ours."""
    for task in PARTS[:2]:
        Path(task).mkdir()
        for name, count in (("train", 12), ("val", 8)):
            with Path(task, f"{name}.jsonl").open("w") as file:
                for i in range(count):
                    file.write(json.dumps(ROWS[task](i)) + "\n")
    Path("sst2").mkdir()
    for name, count in (("train", 12), ("dev", 8)):
        lines = [
            f"a {('dull', 'warm')[i % 2]} film {i} , though {{ odd }} \t{i % 2}"
            for i in range(count)
        ]
        Path("sst2", f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    with Path("own.jsonl").open("w") as file:
        for i in range(24):
            options = {"a": "no", "b": f"a film of {i} hours", "c": "great  "}
            row = {"text": f"Wie war's, Nr. {i}?", **options, "label": i % 3}
            file.write(json.dumps(row | {"word": ("not great", "great")[i % 2]}) + "\n")


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "rte": lambda i: {
        "premise": f"Ann won the {i}th race; {'Bob' * (i % 4)} came last.",
        "hypothesis": f"Ann won {i} times",
        "label": ("entailment", "not_entailment")[i % 2],
    },
    "boolq": lambda i: {
        # U+2028 ends a line for Python, and none of a JSONL file.
        "passage": f"Caf\u00e9\u2028{i} -- it opened {'long ' * i}ago.",
        "question": f"is caf\u00e9 {i} new",
        "label": i % 3 == 0,
    },
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("lm_eval"))
    write_rows()
    yield
    os.chdir(here)


def trained(words: str, out: str) -> Path:
    """Train a run and export it with its task; return the folder of the run."""
    assert main(["train", *shlex.split(f"{words} {TRAIN} name={out}")]) == 0
    (run,) = Path("runs", out).iterdir()
    assert main(["export", str(run), out, "--lm-eval"]) == 0
    return run


@pytest.fixture(scope="module")
def mixture(_folder: None) -> Path:
    """A run on all parts with LoRA, which its export merges into the weights."""
    own = "{task: choice, data: own.jsonl, name: own, prompt: '{text}\\n', options: [a,b,c]}"
    files = ",".join(f"{{task: {task}, data_dir: {task}}}" for task in PARTS[:3])
    return trained(
        f'task=mixture "task.parts=[{files},{own}]" {COUNTS} method=lora steps=3', "mixed"
    )


@pytest.fixture(scope="module")
def answers(_folder: None) -> Path:
    words = "task=generation task.data=own.jsonl 'task.prompt={text}' task.answer=word"
    return trained(f"{words} {COUNTS} task.max_new_tokens=6 method=adamw steps=30", "answered")


def predictions(run: Path) -> list[dict[str, Any]]:
    lines = (run / "predictions-test.jsonl").read_text().rstrip("\n").split("\n")
    return [json.loads(line) for line in lines]


def samples(
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    tasks: Sequence[Any],
    tasks_in: str = "",
    **model: str,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What lm-eval says of tasks, and of each row by its id; its model on the CPU, no hub."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")
    at = tasks_in or folder
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # of what lm-eval imports
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        found = simple_evaluate(
            model="hf",
            model_args={"pretrained": folder, **model},
            tasks=list(tasks),
            task_manager=TaskManager(include_path=f"{at}/lm_eval", include_defaults=False),
            device="cpu",
            batch_size=3,
            bootstrap_iters=0,
        )
    rows = [row for of_task in found["samples"].values() for row in of_task]
    return found["results"], {row["doc"]["id"]: row for row in rows}


# ------------------------------------------------------------------------------ by lm-eval itself


def test_lm_eval_scores_and_decides_each_row_as_the_run_did(
    mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RTE and BoolQ end in a newline, SST-2 in a word; the options of a choice differ in length."""
    results, found = samples(monkeypatch, "mixed", [f"smezo_{part}" for part in PARTS])
    lines = predictions(mixture)
    assert len(lines) == len(found) == 32
    seen = set()
    for line in lines:
        row = found[line["id"]]
        scores = lm_eval_task.scores(row["doc"], [log_p for ((log_p, _),) in row["resps"]])
        if not line["id"].startswith("own/"):
            scores = torch.tensor(scores).double().log_softmax(0).tolist()
        assert scores == pytest.approx(line["scores"], **NEAR), line["id"]
        assert scores.index(max(scores)) == line["prediction"]
        assert row["acc"] == line["correct"]
        seen.add((line["id"].split("/")[0], line["correct"]))
    assert len(seen) > len(PARTS)  # right and wrong ones
    tested = json.loads((mixture / "result.json").read_text())["test"]["parts"]
    for part in PARTS:
        assert results[f"smezo_{part}"]["acc,none"] == tested[part]["accuracy"]


def test_lm_eval_generates_the_answers_of_the_run(
    answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, found = samples(monkeypatch, "answered", ["smezo_own"])
    lines = predictions(answers)
    assert len(lines) == len(found) == 8
    for line in lines:
        row = found[line["id"]]
        assert row["resps"][0][0].strip() == line["prediction"]
        assert (row["f1"], row["exact_match"]) == (line["f1"], line["exact_match"])
    assert max(line["f1"] for line in lines) > 0
    tested = json.loads((answers / "result.json").read_text())["test"]
    assert results["smezo_own"]["f1,none"] == pytest.approx(tested["f1"], abs=1e-15)


@pytest.mark.parametrize(("method", "flags"), [("prefix", []), ("lora", ["--adapter"])])
@pytest.mark.usefixtures("mixture")
def test_lm_eval_takes_an_adapter_of_peft(
    method: str,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Beside its base model, which is the export of the other run here."""
    base = "model=own model.path=mixed model.max_length=200"
    words = f"task=sst2 task.data_dir=sst2 {COUNTS} method={method} steps=3 {base}"
    line = f"{words} {TRAIN.removeprefix('model=tiny-llama ')} name={method}"
    assert main(["train", *shlex.split(line)]) == 0
    (run,) = Path("runs", method).iterdir()
    capsys.readouterr()
    assert main(["export", str(run), method, "--lm-eval", *flags]) == 0
    tokens = {"prefix": 195, "lora": 200}[method]  # a prefix takes five of them
    said = f"pretrained=mixed,peft={method},tokenizer={method},max_length={tokens} "
    out = capsys.readouterr().out
    assert said in out
    assert ("  BASE is mixed\n" in out) is (method == "lora")
    with quiet_peft():
        AutoPeftModelForCausalLM.from_pretrained(method)  # as its adapter_config.json says
    asked = {"peft": method, "tokenizer": method, "tasks_in": method}
    _, found = samples(monkeypatch, "mixed", ["smezo_sst2"], **asked)
    for prediction in predictions(run):
        row = found[prediction["id"]]
        scores = torch.tensor([log_p for ((log_p, _),) in row["resps"]]).double().log_softmax(0)
        assert scores.tolist() == pytest.approx(prediction["scores"], **NEAR)


#: lm-eval's own tasks, and what smezo is told so that it asks and answers in the same words.
ITS_OWN = {
    "rte": (
        "super_glue/rte/default.yaml",
        "{premise}\\nQuestion: {hypothesis} True or False?",
        "True,False",
    ),
    "boolq": ("super_glue/boolq/default.yaml", "{passage}\\nQuestion: {question}?", "no,yes"),
    "sst2": (
        *(
            "glue/sst2/default.yaml",
            "{sentence}\\nQuestion: Is this sentence positive or negative?",
        ),
        "negative,positive",
    ),
}


@pytest.mark.usefixtures("_folder")
def test_under_the_prompt_of_its_own_task_lm_eval_finds_what_smezo_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its files decide what is asked; only the rows are ours, for it would fetch its own."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[lm-eval]'")
    parts = ",".join(
        f"{{task: {task}, data_dir: {task}, prompt: '{prompt}\\nAnswer:', "
        f"labels: [{','.join(repr(word) for word in labels.split(','))}]}}"
        for task, (_, prompt, labels) in ITS_OWN.items()
    )
    run = trained(f'task=mixture "task.parts=[{parts}]" {COUNTS} method=adamw steps=3', "own")
    lines = {line["id"]: line for line in predictions(run)}
    rows = {
        row["id"]: row
        for task in ITS_OWN
        for row in map(
            json.loads, Path(f"own/lm_eval/smezo_{task}.jsonl").read_text().split("\n")[:-1]
        )
    }
    docs = {task: [its_row(task, id) for id in rows if id.startswith(task)] for task in ITS_OWN}
    made = [its_task(path, docs[task]) for task, (path, *_) in ITS_OWN.items()]
    _, found = samples(monkeypatch, "own", made)
    assert found.keys() == lines.keys()
    for name, line in lines.items():
        lengths, log_p = rows[name]["num_tokens"], [value for ((value, _),) in found[name]["resps"]]
        means = torch.tensor([a / n for a, n in zip(log_p, lengths, strict=True)]).double()
        assert means.log_softmax(0).tolist() == pytest.approx(line["scores"], **NEAR)
        assert found[name]["target"] == line["label"]
        if len(set(lengths)) == 1:  # it decides by the sum of the tokens, smezo by the mean
            assert found[name]["acc"] == line["correct"]


def its_row(task: str, id: str) -> dict[str, Any]:
    """A row as its data set on the hub has it; the end of the id counts the rows of the file."""
    number = int(id.rpartition("/")[2]) - 1
    if task == "sst2":
        text, _, label = Path("sst2/dev.tsv").read_text().splitlines()[number + 1].partition("\t")
        return {"id": id, "sentence": text, "label": int(label)}
    row = ROWS[task](number)
    label = row["label"] == "not_entailment" if task == "rte" else row["label"]
    return {"id": id, **row, "label": int(label)}


def its_task(path: str, docs: list[dict[str, Any]]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what lm-eval imports
        import lm_eval.tasks
        import yaml
        from datasets import Dataset
        from lm_eval.api.task import ConfigurableTask

    config = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / path).read_text())
    rows = {config["validation_split"]: Dataset.from_list(docs)}
    return ConfigurableTask(
        config=config | {"training_split": None, "custom_dataset": lambda **_: rows}
    )


# -------------------------------------------------------------------- by its rules, written down


def joining() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that joins a question mark with the newline behind it, as Qwen's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<eos>", *alphabet, "?\u010a", "Ye", "Yes"])}
    merges = [("?", "\u010a"), ("Y", "e"), ("Ye", "s")]
    tokenizer = Tokenizer(models.BPE(vocab, merges=merges))
    pattern = r" ?[A-Za-z]+|[^A-Za-z]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    made: Any = PreTrainedTokenizerFast  # its constructor has no types
    wrapped: PreTrainedTokenizerFast = made(tokenizer_object=tokenizer, eos_token="<eos>")
    return wrapped


def parted(tokenizer: Any, context: str, choice: str) -> tuple[list[int], list[int]]:
    """What lm-eval asks a model of: the tokens before, and those that it adds up."""
    end = len(context.rstrip())
    before = tokenizer.encode(context[:end])
    return before, tokenizer.encode(context + choice)[len(before) :]


ROW = Row({"text": "Is it so", "mark": "?"}, 1, "row 1", options=("no", "a long one "))
CHOICES = {
    "newline": Prompt("{text}? Really?\n", ("Yes", "No")),
    "two newlines": Prompt("{text}{mark}\n\n", ("Yes", "Not so")),
    "word": Prompt("{text}. It was", ("Yes", "No")),
    "options": Prompt("{text}?\n", option="- {option}"),
}


@pytest.mark.parametrize("prompt", CHOICES)
@pytest.mark.parametrize("kind", ["plain", "bos", "joining"])
def test_what_lm_eval_adds_up_less_the_end_of_the_prompt_is_the_candidate(
    kind: str, prompt: str
) -> None:
    """Token for token, in the place of the text where smezo has it."""
    tokenizer: Any = joining() if kind == "joining" else byte_tokenizer(add_bos=kind == "bos")
    asked = CHOICES[prompt]
    of = "choice" if prompt == "options" else "classification"
    (tokens,) = encode([ROW], asked, tokenizer, 200, of)
    files = task_files({"name": "Mine, ü", "kind": of}, [ROW], [tokens], asked, tokenizer)
    assert {"smezo_Mine_ü.yaml", "smezo_Mine_ü.jsonl", "smezo_task.py"} == files.keys()
    doc = json.loads(files["smezo_Mine_ü.jsonl"])
    assert len(doc["choices"]) == 2 + (prompt != "word")
    found = [parted(tokenizer, doc["context"], choice) for choice in doc["choices"]]
    less = found[2][1] if len(found) > 2 else []
    for k, (before, added) in enumerate(found[:2]):
        assert (*before, *added) == tokens.full[k]
        assert added[: len(less)] == less
        assert len(added) - len(less) == tokens.num_option[k] == doc["num_tokens"][k]
    if kind == "joining" and prompt == "newline":
        assert doc["context"].endswith("Really")  # for "?\n" is one token


def test_a_choice_is_decided_by_the_mean_of_its_own_tokens() -> None:
    doc = {"num_tokens": [1, 4], "right": [1]}
    assert lm_eval_task.scores(doc, [-3.0, -8.0]) == [-3.0, -2.0]
    assert lm_eval_task.decide(doc, [(-3.0, True), (-8.0, False)]) == {"acc": 1.0}
    assert lm_eval_task.scores(doc, [-4.0, -9.0, -3.5]) == [-0.5, -1.375]
    assert lm_eval_task.decide(doc, [(-4.0, True), (-9.0, False), (-3.5, False)]) == {"acc": 0.0}
    several = doc | {"right": [0, 1]}
    assert lm_eval_task.decide(several, [(-3.0, True), (-8.0, False)]) == {"acc": 1.0}


def test_an_answer_is_compared_as_squad_does() -> None:
    doc = {"answers": ["a great film", "no"]}
    assert squad.compare(doc, [" Great!\nand"]) == {"f1": pytest.approx(2 / 3), "exact_match": 0}
    assert squad.compare(doc, ["No."]) == {"f1": 1, "exact_match": 1}


def test_the_files_hold_no_path_and_run_without_smezo(mixture: Path) -> None:
    """So that the folder can be moved, and sent to somebody who has lm-eval alone."""
    files = [file for file in Path("mixed/lm_eval").iterdir() if file.is_file()]
    assert len(files) == 2 * len(PARTS) + 1
    for file in files:
        text = file.read_text()
        assert str(Path.cwd()) not in text
        assert "import smezo" not in text
        assert "from smezo" not in text


@pytest.mark.usefixtures("_folder")
def test_the_command_says_how_precision_and_long_rows_are_treated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "method=adamw steps=1 task=toy task.prompt=0 compute_dtype=bfloat16 name=cut"
    words += " model.max_length=8"
    assert main(["train", *shlex.split(f"{TRAIN} {COUNTS} {words}")]) == 0
    (run,) = Path("runs/cut").iterdir()
    capsys.readouterr()
    assert main(["export", str(run), "cut", "--lm-eval"]) == 0
    out = capsys.readouterr().out
    assert (
        "pretrained=cut,max_length=8,mixed_precision_dtype=bfloat16,softmax_dtype=float32 " in out
    )
    assert "of these rows are longer than model.max_length=8: lm-eval cuts them elsewhere" in out


# ---------------------------------------------------------------------------------------- refused


MASKED = Prompt("{text} It was {mask} .", ("bad", "good"))
SFC = Prompt("{text} It was", ("bad", "good"), sfc="It was")


@pytest.mark.parametrize(("prompt", "word"), [(MASKED, "{mask}"), (SFC, "task.sfc=true")])
def test_scores_that_lm_eval_has_no_form_for_are_refused(prompt: Prompt, word: str) -> None:
    with pytest.raises(UserError, match="--lm-eval") as caught:
        check_prompts([CHOICES["word"], prompt])
    assert word in str(caught.value)
    assert "smezo eval" in str(caught.value)


def test_tokens_that_lm_eval_would_part_elsewhere_are_refused() -> None:
    """An EOS behind a prompt; a prompt of one token with white space; tokens across the border."""
    row, asked = Row({"text": "Is it"}, 0, "row 7"), CHOICES["word"]
    node = {"name": "mine", "kind": "classification"}
    for tokenizer, ids, said in (
        (byte_tokenizer(add_bos=False, add_eos=True), {}, "puts </s> behind a text"),
        (joining(), {"num_merged": 1}, "row 7: its prompt shares a token"),
    ):
        tokens = [dataclasses.replace(c, **ids) for c in encode([row], asked, tokenizer, 200)]
        with pytest.raises(UserError, match=said):
            task_files(node, [row], tokens, asked, tokenizer)
    short, bare = Prompt("?\n{text}", ("Yes", "No")), row._replace(fields={"text": ""})
    with pytest.raises(UserError, match="row 7: its prompt shares a token"):
        task_files(node, [bare], encode([bare], short, joining(), 200), short, joining())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("method=adazeta", "smezo's own"),
        ("model=tiny-roberta 'task.prompt={text} was {mask} .' 'task.labels=[bad,good]'", "masks"),
        ("task.sfc=true 'task.sfc_prompt=It was' task.prompt=0", "calibrated"),
    ],
)
@pytest.mark.usefixtures("_folder")
def test_a_run_that_lm_eval_cannot_score_is_refused_before_anything_is_written(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"no-{said[:5]}".replace(" ", "")
    line = f"{TRAIN} steps=1 {COUNTS} task=toy method=adamw name={name} {words}"
    assert main(["train", *shlex.split(line)]) == 0
    (run,) = Path("runs", name).iterdir()
    capsys.readouterr()
    assert main(["export", str(run), "nothing", "--lm-eval"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not Path("nothing").exists()
    assert main(["export", str(run), "nothing", "--lm-eval", "--delta"]) == 2
    assert "exclude each other" in capsys.readouterr().err
