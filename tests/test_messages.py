"""The catalogue of mistakes that show only once a run starts, or in a verb on a finished run.

Those of the command line itself (groups, keys, types, ranges, sweeps, flags) are the MISTAKES of
test_config.py, those of filters and comparisons stand in test_results.py. Every one is one
sentence on stderr and exit code 2; it names what was got and the way out.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_cli.cli.verbs import main
from smezo_cli.files import fetch
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.measure import Measure
from smezo_cli.store.folder import RunFolder
from smezo_cli.tasks import hub
from tests import ROOT

SPEED = "device=cpu batch_size=2 eval_every=1"
TINY = f"model=tiny-llama {SPEED} steps=2"
COUNTS = "task.num_train=8 task.num_dev=4 task.num_test=4"
TOY = f"train task=toy {COUNTS} {TINY}"
# Of every kind; each table has twenty rows, so that counts need not be given.
WORDS = f"train task=classification task.data=my.csv 'task.prompt={{text}} It was' {TINY}"
OWN = f"{WORDS} 'task.labels={{0: bad, 1: good}}'"
CHOICE = f"train task=choice task.data=my.csv 'task.prompt={{text}}' task.options=[a,b] {TINY}"
ANSWER = f"train task=generation task.data=my.csv 'task.prompt={{text}}' {TINY}"
RTE = f"train task=rte task.data_dir=rte {COUNTS} {TINY}"


def table(header: str, line: str, *more: str) -> str:
    """A CSV of twenty rows; `#` stands for the number of the row, `%` for its class."""
    lines = [line.replace("#", str(i)).replace("%", str(i % 2)) for i in range(20)]
    return "\n".join([header, *more, *lines]) + "\n"


GOOD = table("text,label", "a film of # hours,%")
OPTIONS = table("text,a,b,label", "which # is it,this,that,%")
ANSWERS = table("text,answer", "what is # and 1,it is #")
PAIR = '{"premise": "a", "hypothesis": "b", "label": "entailment"}\n'

Make = Callable[[pytest.MonkeyPatch], object]


def files(**contents: str | bytes) -> Make:
    """Write files; two underscores in a name stand for a dot, three for a slash."""

    def make(_: pytest.MonkeyPatch) -> None:
        for name, content in contents.items():
            path = Path(name.replace("___", "/").replace("__", "."))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def folder(name: str) -> Make:
    return lambda _: Path(name).mkdir(parents=True)


def both(*makes: Make) -> Make:
    return lambda patch: [make(patch) for make in makes]


def environment(name: str, value: str) -> Make:
    return lambda patch: patch.setenv(name, value)


def no_network(patch: pytest.MonkeyPatch) -> None:
    """Nothing answers: not the model hub, not the registry behind pip."""
    for module in (fetch, hub):
        patch.setattr(module, "hub_answers", lambda: False)

    def failed(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution\n")

    patch.setattr(fetch.subprocess, "run", failed)
    patch.setattr(fetch, "say", lambda line: None)  # what is being fetched is said first


def full_disk(patch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))


def disk_that_fills_up(patch: pytest.MonkeyPatch) -> None:
    """Room enough when the run starts, none for its checkpoint."""
    usage, asked = shutil.disk_usage("."), []

    def of(path: object) -> Any:
        asked.append(path)
        return usage._replace(free=2**40 if len(asked) == 1 else 2**20)

    patch.setattr(shutil, "disk_usage", of)


def no_cuda(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)


def saved_model(patch: pytest.MonkeyPatch) -> None:
    """A folder `saved` with a tiny model, as transformers saves it."""
    (run,) = Path("runs/default").iterdir()
    export = f"export {run} saved"
    assert main(shlex.split(export)) == 0


def pickled(_: pytest.MonkeyPatch) -> None:
    saved_model(_)
    Path("saved/model.safetensors").rename("saved/pytorch_model.bin")


def damaged_model(_: pytest.MonkeyPatch) -> None:
    saved_model(_)
    Path("saved/model.safetensors").write_bytes(b"x" * 100)


def no_tokenizer(_: pytest.MonkeyPatch) -> None:
    saved_model(_)
    for file in Path("saved").glob("tokenizer*"):
        file.unlink()


RUN = "runs/default/RUN"  # a copy of the finished run; RUN is replaced by its name


def on_run(change: Callable[[Path], object]) -> Make:
    """Do something to the copy of the finished run."""

    def make(_: pytest.MonkeyPatch) -> None:
        (found,) = Path("runs/default").iterdir()
        change(found)

    return make


def unfinished(run: Path) -> None:
    """As if it had been stopped before the first look at dev."""
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoint")


def half_done(run: Path) -> None:
    """As if it had been stopped behind the last look."""
    (run / "result.json").unlink()


def other_trajectory(run: Path) -> None:
    """The steps of a run with another seed, its checksums right."""
    half_done(run)
    path = run / "trajectory.bin"
    content = path.read_bytes()
    length = int.from_bytes(content[12:16], "little")
    header = json.loads(content[16 : 16 + length])
    header["identity"]["seed"] = 77
    text = json.dumps(header).encode()
    start = content[:12] + len(text).to_bytes(4, "little") + text
    path.write_bytes(start + zlib.crc32(start).to_bytes(4, "little"))


def no_config(run: Path) -> None:
    (run / "config.yaml").unlink()


def bad_config(run: Path) -> None:
    (run / "config.yaml").write_text("task: [")


def list_config(run: Path) -> None:
    (run / "config.yaml").write_text("- 1\n- 2\n")


def old_config(run: Path) -> None:
    """Of a version that knew other settings."""
    with (run / "config.yaml").open("a") as file:
        file.write("momentum: 1\n")


Mistake = tuple[str, Make | None, str, list[str]]

DATA: list[Mistake] = [
    # name, how to make it, words of the command line, what the one sentence must say
    ("no such file", files(mi__csv=GOOD), OWN, ["task.data=my.csv", "did you mean mi.csv"]),
    ("a folder", folder("my.csv"), OWN, ["task.data=my.csv is a folder", ".parquet"]),
    (
        "unknown suffix",
        files(my__xlsx=GOOD),
        OWN.replace("my.csv", "my.xlsx"),
        ["my.xlsx", "not read", ".jsonl"],
    ),
    ("no rows", files(my__csv="text,label\n"), OWN, ["my.csv has no rows"]),
    ("an empty file", files(my__csv=""), OWN, ["my.csv has no rows"]),
    ("not UTF-8", files(my__csv=b"text,label\n\xff\xfe,1\n"), OWN, ["line 2", "0xff", "UTF-8"]),
    (
        "no such column",
        files(my__csv=GOOD.replace("text", "texts")),
        OWN,
        ["task.prompt=", "no column 'text'", "did you mean texts", "task.columns={text: COLUMN}"],
    ),
    (
        "no label column",
        files(my__csv=GOOD.replace("label", "lable")),
        OWN,
        ["task.label=label", "did you mean lable", "task.columns={label: COLUMN}"],
    ),
    (
        "a mapped column that is not there",
        files(my__csv=GOOD),
        f"{OWN} 'task.columns={{text: sentence}}'",
        ["no column 'sentence' (of text)", "label, text"],
    ),
    (
        "task.columns that nothing uses",
        files(my__csv=GOOD),
        f"{OWN} 'task.columns={{txt: text}}'",
        ["task.columns names txt", "did you mean text"],
    ),
    (
        "an empty cell",
        files(my__csv=table("text,label", "film #,%", "  ,1")),
        OWN,
        ["my.csv, line 2, column 'text'", "empty", "take the row out"],
    ),
    (
        "an empty label",
        files(my__csv=table("text,label", "film #,%", "a,1", "b,")),
        OWN,
        ["my.csv, line 3, column 'label'", "the label is empty"],
    ),
    (
        "a ragged row",
        files(my__csv=table("text,label", "film #,%", "one, two,1")),
        OWN,
        ["my.csv, line 2: 3 cells", "2 columns (text, label)", "needs quotes"],
    ),
    (
        "a quote that is not closed",
        files(my__csv=GOOD + '"open,1\n'),
        OWN,
        ["my.csv, line 22", "ends with a quote"],
    ),
    (
        "two columns of one name",
        files(my__csv=table("text,text", "a,%")),
        OWN,
        ["line 1", "'text' stands there twice"],
    ),
    (
        "a line that is not JSON",
        files(my__jsonl='{"text": "a", "label": 1}\n{"text": \n'),
        OWN.replace("my.csv", "my.jsonl"),
        ["my.jsonl, line 2: not JSON"],
    ),
    (
        "JSON lines in a .json",
        files(my__json='{"text": "a", "label": 1}\n' * 2),
        OWN.replace("my.csv", "my.json"),
        ["line 2", "name the file .jsonl"],
    ),
    (
        "a record that is none",
        files(my__jsonl='{"text": "a", "label": 1}\n[1]\n'),
        OWN.replace("my.csv", "my.jsonl"),
        ["my.jsonl, line 2: a record of columns is needed, not a list"],
    ),
    (
        "a cell that is no text",
        files(my__jsonl='{"text": {"en": "a"}, "label": 1}\n'),
        OWN.replace("my.csv", "my.jsonl"),
        ["line 1, column 'text'", "a text is needed"],
    ),
    (
        "no Parquet",
        files(my__parquet=b"PAR2" * 9),
        OWN.replace("my.csv", "my.parquet"),
        ["my.parquet is no Parquet file"],
    ),
    (
        "a label without a word",
        files(my__csv=GOOD + "another,2\n"),
        OWN,
        ["line 22, column 'label'", "the label is '2'", "words for 0, 1", "0, 1, 2"],
    ),
    (
        "labels for other values",
        files(my__csv=table("text,label", "film #,pos")),
        OWN,
        ["the label is 'pos'", "task.labels", "{pos: bad"],
    ),
    (
        "labels that are no list",
        files(my__csv=GOOD),
        f"{WORDS} task.labels=good",
        ["task.labels=good", "{0: terrible, 1: great}"],
    ),
    (
        "a label that is a boolean",
        files(my__csv=GOOD),
        f"{WORDS} 'task.labels={{0: no, 1: true}}'",
        ["task.labels=", "with quotes around yes, no"],
    ),
    (
        "too few rows for the counts",
        files(my__csv=GOOD),
        f"{OWN} task.num_train=15 task.num_dev=30 task.num_test=5",
        ["task.num_dev=30", "20 rows for the three together"],
    ),
    (
        "too few rows at all",
        files(my__csv="text,label\na,0\nb,1\n"),
        OWN,
        ["2 rows for the three together", "at least 1 for each"],
    ),
    (
        "the test file is the train file",
        files(my__csv=GOOD),
        f"{OWN} task.test_data=my.csv",
        ["task.test_data=my.csv is the file of task.data too", "leave it out"],
    ),
    (
        "a test file without the column",
        files(my__csv=GOOD, my2__csv=GOOD.replace("label", "y")),
        f"{OWN} task.test_data=my2.csv",
        ["my2.csv has no column 'label'", "text, y"],
    ),
    (
        "splits of a file",
        files(my__csv=GOOD),
        f"{OWN} 'task.splits={{train: train}}'",
        ["task.splits is for a data set of the hub", "leave task.splits out"],
    ),
    (
        "one option",
        files(my__csv=OPTIONS),
        CHOICE.replace("[a,b]", "a"),
        ["line 2, column 'a'", "a list of texts"],
    ),
    (
        "equal options",
        files(my__csv=OPTIONS.replace("that", "this")),
        CHOICE,
        ["line 2: two or more different options", "'this', 'this'"],
    ),
    (
        "a label that is no option",
        files(my__csv=OPTIONS.replace(",0\n", ",neither\n")),
        CHOICE,
        ["'neither'", "my.csv, line 2", "column 'label'"],
    ),
    (
        "an answer that is missing",
        files(my__csv=ANSWERS + "what,\n"),
        ANSWER,
        ["line 22, column 'answer'", "empty"],
    ),
    (
        "the benchmark's folder",
        None,
        RTE,
        ["task.data_dir=", "rte: there is no such folder", "train.jsonl"],
    ),
    (
        "a file of the benchmark",
        files(rte___train__jsonl=PAIR),
        RTE,
        ["task.data_dir=", "there is no val.jsonl in it", "task.test_from=train"],
    ),
    (
        "a bad line of the benchmark",
        files(rte___train__jsonl=PAIR + PAIR.replace("entailment", "maybe"), rte___val__jsonl=PAIR),
        RTE,
        ["train.jsonl, line 2", "'label' is 'maybe'", "'not_entailment'"],
    ),
    (
        "a field that the benchmark's file lacks",
        files(rte___train__jsonl=PAIR.replace("premise", "premiss"), rte___val__jsonl=PAIR),
        RTE,
        ["train.jsonl, line 1", "premise", "premiss"],
    ),
]

PROMPTS: list[Mistake] = [
    (
        "an unknown field",
        None,
        f"{TOY} 'task.prompt={{txt}} is' task.labels=[bad,good]",
        ["{txt}", "did you mean {text}"],
    ),
    (
        "an unknown filter",
        None,
        f"{TOY} 'task.prompt={{text|uper}} is' task.labels=[bad,good]",
        ["task.prompt=", "no filter uper", "lower"],
    ),
    (
        "a brace that is not closed",
        None,
        f"{TOY} 'task.prompt={{text is' task.labels=[bad,good]",
        ["task.prompt='{text is'", "other brace twice"],
    ),
    (
        "no field",
        None,
        f"{TOY} 'task.prompt=It was' task.labels=[bad,good]",
        ["shows nothing of a row", "{text}"],
    ),
    ("a prompt's number", None, f"{TOY} task.prompt=2", ["task.prompt=2", "0 to 1"]),
    (
        "a prompt without its words",
        None,
        f"{TOY} 'task.prompt={{text}} is'",
        ["without label words", "task.labels"],
    ),
    (
        "words without a prompt",
        None,
        f"{TOY} task.labels=[bad,good]",
        ["task.labels is for one prompt", "give task.prompt too"],
    ),
    (
        "too few words",
        None,
        f"{TOY} task.prompt=0 task.labels=[bad]",
        ["task.labels=['bad']", "2 classes"],
    ),
    (
        "a word without tokens",
        None,
        f"{TOY} task.prompt=0 'task.labels=[\" \",good]'",
        ["task.labels", "no word for each class"],
    ),
    (
        "the same words",
        None,
        f"{TOY} task.prompt=0 task.labels=[good,good]",
        ["task.labels=['good', 'good']", "all different"],
    ),
    (
        "words of the same tokens",
        None,
        f"{TOY} task.prompt=0 'task.labels=[good,\"good \"]'",
        ["'good', 'good '", "the same tokens", "other task.labels"],
    ),
    (
        "a word longer than the context",
        None,
        f"{TOY} task.prompt=0 task.labels=[abcdefghijkl,good] model.max_length=8",
        ["' abcdefghijkl' takes 13 tokens", "other task.labels"],
    ),
    (
        "an option that is not shown",
        files(my__csv=OPTIONS),
        f"{CHOICE} task.option_template=x",
        ["task.option_template='x'", "{option}"],
    ),
    (
        "nothing short enough to train on",
        None,
        f"{TOY} task.max_train_tokens=1",
        ["task.max_train_tokens=1 leaves out all 8 rows", "raise it"],
    ),
    (
        "answers longer than the context",
        files(my__csv=ANSWERS),
        f"{ANSWER} task.max_new_tokens=300",
        ["task.max_new_tokens=300", "model.max_length=256", "lower it"],
    ),
    (
        "a mask for a causal model",
        None,
        f"{TOY} 'task.prompt={{text}} is {{mask}}' task.labels=[bad,good]",
        ["tiny-llama is causal", "task.prompt without a {mask}"],
    ),
    (
        "no mask for a masked model",
        None,
        f"{TOY.replace('tiny-llama', 'tiny-roberta')} task.prompt=0",
        ["tiny-roberta is masked", "task.prompt with a {mask} place"],
    ),
    (
        "a mask for choice",
        files(my__csv=OPTIONS),
        CHOICE.replace("{text}", "{text} {mask}").replace("llama", "roberta"),
        ["{mask} is no field", "{text}"],
    ),
]

MODELS: list[Mistake] = [
    ("a context", None, f"{TOY} model.max_length=999", ["model.max_length=999", "at most 256"]),
    ("no such folder", None, f"{TOY} +model.path=./nowhere", ["model.path", "model.tiny"]),
    (
        "no such path",
        None,
        f"train task=toy model=own model.path=./nowhere {SPEED}",
        ["model.path=./nowhere", "no such folder or file"],
    ),
    (
        "no config.json",
        folder("empty"),
        f"train task=toy model=own model.path=./empty {SPEED}",
        ["model.path=./empty", "no config.json"],
    ),
    (
        "a GGUF file's folder",
        files(some___model__gguf="GGUF"),
        f"train task=toy model=own model.path=./some {SPEED}",
        ["model.path=./some", "some/model.gguf"],
    ),
    (
        "a file that is no GGUF",
        files(model__bin="x"),
        f"train task=toy model=own model.path=./model.bin {SPEED}",
        ["model.path=./model.bin is a file and no GGUF", "safetensors"],
    ),
    (
        "a GGUF file that is none",
        files(model__gguf="no model"),
        f"train task=toy model=own model.path=./model.gguf {SPEED}",
        ["model.path=", "model.gguf", "check"],
    ),
    (
        "a config.json that is none",
        files(bad___config__json="{"),
        f"train task=toy model=own model.path=./bad {SPEED}",
        ["model.path=bad", "config"],
    ),
    (
        "a pickle",
        pickled,
        f"train task=toy model=own model.path=./saved {SPEED}",
        ["model.path=./saved", "pickle", "save_pretrained"],
    ),
    (
        "damaged weights",
        damaged_model,
        f"train task=toy model=own model.path=./saved {SPEED}",
        ["model.path=saved", "could not be loaded"],
    ),
    (
        "another model than the one chosen",
        saved_model,
        f"train task=toy model=opt-125m model.path=./saved {SPEED}",
        ["model=opt-125m", "model=own model.path=PATH"],
    ),
    (
        "frozen all",
        None,
        f"{TOY} 'method.freeze=[\"*\"]'",
        ["method: no parameter is left to train", "freeze fewer"],
    ),
    (
        "nothing of the name to freeze",
        None,
        f"{TOY} 'method.freeze=[\"*wte*\"]'",
        ["method: freeze '*wte*'", "model.embed_tokens.weight"],
    ),
    (
        "an attention that is not installed",
        None,
        f"{TOY} model.attention=flash_attention_2",
        ["model.attention=flash_attention_2", "model.attention=sdpa"],
    ),
    ("CUDA", no_cuda, f"{TOY} device=cuda", ["device=cuda", "no CUDA", "device=cpu"]),
]

MACHINE: list[Mistake] = [
    (
        "no hub for a task",
        no_network,
        f"train task=rte {TINY}",
        ["task rte", "hub cannot be reached", "task.data_dir=PATH"],
    ),
    (
        "no hub for one's own data",
        no_network,
        OWN.replace("my.csv", "someone/reviews"),
        ["hub cannot be reached for someone/reviews", "task.data=someone/reviews"],
    ),
    (
        "no hub for a model",
        both(no_network, environment("HF_HUB_CACHE", "no-cache")),
        f"train task=toy model=llama-7b {SPEED}",
        ["model.path=huggyllama/llama-7b", "connect to the network", "model.path=FOLDER"],
    ),
    (
        "no registry for the default model",
        both(no_network, environment("SMEZO_CACHE", "cache")),
        f"train task=toy model=smollm2-135m {SPEED}",
        ["could not fetch it (No matching distribution)", "network", "SMEZO_CACHE"],
    ),
    (
        "no registry for the default data",
        both(no_network, environment("SMEZO_CACHE", "cache")),
        f"train task=rotten_tomatoes {TINY}",
        ["could not fetch it", "SMEZO_CACHE"],
    ),
    (
        "the cache is a file",
        both(files(cache="x"), environment("SMEZO_CACHE", "cache")),
        f"train task=rotten_tomatoes {TINY}",
        ["cannot be written", "set SMEZO_CACHE to a folder"],
    ),
    ("runs_dir is a file", files(there="x"), f"{TOY} runs_dir=there", ["there", "runs_dir=PATH"]),
    (
        "a full disk",
        full_disk,
        TOY,
        ["1 MB free", "make room", "runs_dir=PATH"],
    ),
    (
        "a disk that fills up",
        disk_that_fills_up,
        f"{TOY} seed=9",
        ["1 MB free", "make room", "runs_dir=PATH"],
    ),
]

AGAIN: list[Mistake] = [
    ("refused if it exists", None, f"{TOY} if_exists=error", ["exists already", "if_exists=fresh"]),
    ("fewer steps", None, f"{TOY} steps=1", ["steps=1", "has done 2 steps already", "name=NAME"]),
    (
        "a trajectory of another run",
        on_run(other_trajectory),
        f"{TOY} seed=0",
        ["trajectory.bin", "another seed", "if_exists=fresh"],
    ),
    ("diverged", None, f"{TOY} lr=1e38 seed=3", ["loss", "at step", "lr=1e+38", "lower it"]),
]

VERBS: list[Mistake] = [
    ("eval nothing", None, "eval", ["required: run", "smezo eval --help"]),
    ("eval no run", None, "eval nowhere", ["nowhere is not there", "smezo runs"]),
    ("eval a folder", folder("some"), "eval some", ["some has no config.yaml", "smezo runs"]),
    ("eval without settings", on_run(no_config), f"eval {RUN}", ["has no config.yaml"]),
    ("eval damaged settings", on_run(bad_config), f"eval {RUN}", ["config.yaml cannot be read"]),
    ("eval a list", on_run(list_config), f"eval {RUN}", ["config.yaml cannot be read"]),
    ("eval old settings", on_run(old_config), f"eval {RUN}", ["no setting momentum"]),
    ("eval untrained", on_run(unfinished), f"eval {RUN}", ["no trained weights", "smezo train"]),
    ("eval a split", None, f"eval {RUN} --split validation", ["validation", "test", "dev"]),
    ("eval an unknown flag", None, f"eval {RUN} --spilt dev", ["--spilt", "smezo eval --help"]),
    ("eval base and step", None, f"eval {RUN} --base --step 1", ["--base and --step exclude"]),
    ("eval a step", None, f"eval {RUN} --step 77", ["--step 77", "has made 2 steps"]),
    ("eval a step that is none", None, f"eval {RUN} --step last", ["--step", "last", "--help"]),
    ("eval a word", None, f"eval {RUN} cpu", ["cpu is not of the form KEY=VALUE", "device=cpu"]),
    ("eval another lr", None, f"eval {RUN} lr=1", ["lr: a trained run keeps", "task.num_test"]),
    ("eval another seed", None, f"eval {RUN} seed=1", ["seed: a trained run keeps"]),
    ("eval no such key", None, f"eval {RUN} task.num_tset=1", ["did you mean num_test"]),
    ("eval a bad value", None, f"eval {RUN} task.num_test=0", ["task.num_test=0", "at least 1"]),
    ("eval what is no value", None, f"eval {RUN} 'task.num_test=[1'", ["cannot read", "[1"]),
    ("eval another task", None, f"eval {RUN} task=rte", ["task: a trained run keeps"]),
    ("eval another kind", None, f"eval {RUN} task.kind=choice", ["task.kind", "keeps"]),
    ("eval another prompt", None, f"eval {RUN} task.prompt=0", ["task.prompt", "keeps"]),
    ("eval device", no_cuda, f"eval {RUN} device=cuda", ["device=cuda", "device=cpu"]),
    ("eval out", None, f"eval {RUN} --out no/such/file", ["--out no/such/file", "make it first"]),
    ("eval out a device", None, f"eval {RUN} --out /dev/null", ["/dev/null is no ordinary file"]),
    ("predict out", None, f"predict {RUN} a.csv --out /dev/stdout", ["/dev/stdout is no ordinary"]),
    ("eval out a folder", folder("out"), f"eval {RUN} --out out", ["--out out is a folder"]),
    ("predict nothing", None, f"predict {RUN}", ["one FILE or by --field NAME=TEXT"]),
    ("predict both", None, f"predict {RUN} a.csv --field text=a", ["either", "FILE", "--field"]),
    ("predict a field", None, f"predict {RUN} --field great", ["--field great", "NAME=TEXT"]),
    (
        "predict another field",
        None,
        f"predict {RUN} --field txt=a",
        ["shows 'text', which is not given, did you mean txt", "add --field text=TEXT"],
    ),
    (
        "predict no file",
        files(mi__csv=GOOD),
        f"predict {RUN} my.csv",
        ["FILE=my.csv", "did you mean mi.csv"],
    ),
    ("predict no rows", files(my__csv="text\n"), f"predict {RUN} my.csv", ["my.csv has no rows"]),
    (
        "predict an empty cell",
        files(my__csv='text,n\n"",1\n'),
        f"predict {RUN} my.csv",
        ["my.csv, line 2, column 'text'", "empty"],
    ),
    ("predict no run", None, "predict nowhere my.csv", ["nowhere is not there"]),
    (
        "predict to nowhere",
        files(my__csv="text\na\n"),
        f"predict {RUN} my.csv --out no/such/file",
        ["--out no/such/file", "make it first"],
    ),
    ("export no folder", None, f"export {RUN}", ["required: folder", "smezo export --help"]),
    ("export to what is there", folder("out"), f"export {RUN} out", ["out is there already"]),
    ("export into a file", files(out="x"), f"export {RUN} out/model", ["cannot write out/model"]),
    ("export untrained", on_run(unfinished), f"export {RUN} out", ["no trained weights"]),
    ("export a step", None, f"export {RUN} out --step 9", ["--step 9", "has made 2 steps"]),
    ("export a full disk", full_disk, f"export {RUN} out", ["1 MB free", "make room"]),
    ("runs nowhere", None, "runs --runs-dir nowhere", ["--runs-dir nowhere", "no such folder"]),
    ("runs a flag", None, "runs --maen", ["--maen", "smezo runs --help"]),
]

ALL = {"data": DATA, "prompt": PROMPTS, "model": MODELS, "machine": MACHINE, "again": AGAIN} | {
    "verb": VERBS
}


@pytest.fixture(autouse=True)
def _quick(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of TOY."""
    cwd, here = tmp_path_factory.mktemp("finished"), Path.cwd()
    os.chdir(cwd)
    try:
        assert main(shlex.split(TOY)) == 0
    finally:
        os.chdir(here)
    (found,) = (cwd / "runs/default").iterdir()
    return found


@pytest.fixture
def copied(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the finished run in its place below an empty folder; its name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, Path("runs/default") / finished.name)
    return finished.name


def said(words: str, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one sentence of `smezo WORDS`."""
    capsys.readouterr()
    assert main(shlex.split(words)) == code
    err = capsys.readouterr().err
    assert err.startswith("smezo: "), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert len(err) < 500, err
    return err


@pytest.mark.parametrize(
    ("make", "words", "says"),
    [
        pytest.param(*mistake, id=f"{group}: {name}")
        for group, mistakes in ALL.items()
        for name, *mistake in mistakes
    ],
)
def test_a_mistake_is_one_sentence_with_the_way_out(
    make: Make | None,
    words: str,
    says: list[str],
    copied: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if make is not None:
        make(monkeypatch)
    got = said(words.replace(RUN, RUN.replace("RUN", copied)), capsys)
    for part in says:
        assert part in got


def test_a_run_that_is_under_way_is_left_alone(
    copied: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs at once: the second names the process of the first, whatever verb it is."""
    folder = RunFolder(Path("runs/default") / copied)
    try:
        for words in (TOY, f"{TOY} if_exists=fresh", f"eval runs/default/{copied}"):
            assert f"in use by process {os.getpid()}" in said(words, capsys)
    finally:
        folder.close()


def test_data_that_changed_between_two_starts_is_refused(
    copied: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second half of a run must not see other rows than the first."""
    Path("my.csv").write_text(GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(Measure, "step", interrupted)  # behind the self-check and the scores
        assert main(shlex.split(OWN)) == 130
    Path("my.csv").write_text(GOOD.replace("hours", "days"))
    got = said(OWN, capsys)
    assert "train and dev and test rows are not those" in got
    assert "if_exists=fresh" in got


def test_a_finished_run_is_not_called_done_for_other_data_or_another_model(
    copied: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name holds the path of a file, not what is in it."""
    Path("my.csv").write_text(GOOD)
    assert main(shlex.split(OWN)) == 0
    (run,) = Path("runs/default").glob("my-*")
    Path("my.csv").write_text(GOOD.replace("hours", "days"))
    got = said(OWN, capsys)
    assert "its data has changed since" in got
    assert "name=NAME" in got
    assert "the test rows are not those" in said(f"eval {run}", capsys)
    Path("my.csv").unlink()
    capsys.readouterr()
    assert main(["train", *shlex.split(OWN)[1:]]) == 0  # nothing to compare with: still done
    assert main(["export", str(run), "exported"]) == 0  # needs no data at all
    monkeypatch.setattr(Loaded, "fingerprint", lambda self: "another")
    for words in (f"export {run} again", f"predict {run} --field text=x"):
        assert "was trained on another model" in said(words, capsys)


def interrupted(*_: object) -> None:
    """Ctrl-C, in the middle of a step."""
    os.kill(os.getpid(), signal.SIGINT)
    raise KeyboardInterrupt


def test_ctrl_c_ends_a_run_with_130_and_the_command_that_goes_on(
    copied: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No traceback and nothing on stderr; test_train.py sends signals to whole processes."""
    real, count = Measure.step, []

    def step(*words: Any) -> Any:
        count.append(1)
        if len(count) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*words)

    monkeypatch.setattr(Measure, "step", step)
    words = f"{TOY} seed=5 steps=20"
    assert main(shlex.split(words)) == 130
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert "the same command goes on from here" in lines[-2]
    assert lines[-1].strip() == f"smezo {words}"


@pytest.mark.parametrize("verb", ["eval", "predict", "export"])
def test_ctrl_c_in_any_verb_is_130_without_a_word(
    verb: str,
    copied: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("smezo_cli.run.loaded.load_model", stop)
    words = {"eval": [], "predict": ["--field", "text=a"], "export": ["out"]}[verb]
    assert main([verb, f"runs/default/{copied}", *words]) == 130
    assert capsys.readouterr().err == ""
    assert not Path("out").exists()


def test_who_reads_no_further_gets_no_complaint(tmp_path: Path) -> None:
    """`smezo show task rte | true`: exit code 0, silence on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "smezo_cli", "show", "task", "rte"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=env, cwd=tmp_path)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_prompts_longer_than_the_context_are_counted_and_reported(
    copied: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line on stdout and truncated_prompts in result.json: of 8 + 4 + 4 rows those too long."""
    assert main(shlex.split(f"{TOY} task.prompt=1 model.max_length=10 name=short")) == 0
    (folder,) = Path("runs/short").iterdir()
    count = json.loads((folder / "result.json").read_text())["truncated_prompts"]
    assert 0 < count <= 16
    assert f"{count} of 16 prompts are longer than 10 tokens" in capsys.readouterr().out
    whole = json.loads((Path("runs/default") / copied / "result.json").read_text())
    assert whole["truncated_prompts"] == 0


def test_the_catalogue_has_sixty_mistakes_that_differ() -> None:
    made = [(words, name) for mistakes in ALL.values() for name, _, words, _ in mistakes]
    assert len(set(made)) == len(made) >= 60
