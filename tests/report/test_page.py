"""`smezo report`: the page says what the run folders say, is valid, and lets nothing through."""

import itertools
import json
import re
import shlex
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from smezo_cli.cli.verbs import main
from smezo_cli.config.fixed import CONF_DIR
from smezo_cli.report import table as table_module
from tests.cli.test_verbs import imports
from tests.report.test_runs import make

TABLE = """\
title: tiny
source: no paper
command: >-
  task=toy model=tiny-llama device=cpu batch_size=4 steps=4 eval_every=2 task.prompt=0
  task.num_train=16 task.num_dev=8 task.num_test=12 method.executor=sequential lr=3e-2
seeds: [0, 1]
columns:
  toy: { command: "" }
rows:
  Ours: { command: method=mezo, paper: ["40.0 (1.5)"] }
  Sparse: { command: method=sparse_mezo }
  Later: { command: null, awaits: method=later }
"""
VOID = {"meta", "br", "img", "input"}  # of HTML; what is empty in SVG ends in />


class Tree(HTMLParser):
    """Read a page; fail where tags do not fit each other."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open = list[str]()
        self.tags = list[tuple[str, dict[str, str | None]]]()
        self.words = list[tuple[str, str]]()  # the innermost tag, and a text in it
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append((self.open[-1] if self.open else "", data))

    def named(self, *names: str) -> list[tuple[str, dict[str, str | None]]]:
        return [(tag, attrs) for tag, attrs in self.tags if tag in names]

    def values(self, of: str) -> list[float]:
        """The numbers of a kind, as they were before they were rounded for the eye."""
        return [float(a["value"] or "") for _, a in self.named("data") if a["class"] == of]

    @property
    def text(self) -> str:
        return "\n".join(data for tag, data in self.words if tag not in ("style", "script"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the runs of a tiny table: two methods, two seeds."""
    cwd = tmp_path_factory.mktemp("report")
    (cwd / "conf" / "table").mkdir(parents=True)
    (cwd / "conf" / "table" / "tiny.yaml").write_text(TABLE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_module, "CONF_DIR", cwd / "conf")
        patch.chdir(cwd)
        assert main(["table", "tiny", "--run"]) == 0
        yield cwd
    torch.set_num_threads(threads)


def written(*words: object, out: str = "report.html") -> Tree:
    assert main(["report", *map(str, words), "--out", out]) == 0
    return Tree(Path(out).read_text(encoding="utf-8"))


def means(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["runs", "--mean", "--json", *words]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


# --- what it says ----------------------------------------------------------------------------


def test_numbers_are_those_of_the_list_of_means(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = means(capsys)
    assert [record["seeds"] for record in found] == [2, 2]
    tree = written()
    for of, key in (
        *(("score", "score"), ("sd", "sd"), ("auc", "auc"), ("over_zero_shot", "over_zero_shot")),
        *(("over_calibrated", "over_calibrated"), ("peak", "peak_GiB")),
        ("seconds", "train_seconds"),
    ):
        assert tree.values(of) == [record[key] for record in found], of
    (over_first,) = tree.values("over_first")
    assert over_first == found[1]["over_first"]
    assert tree.values("pair") == [-over_first, over_first]
    assert f"{100 * found[0]['score']:.2f}" in tree.text


def test_everything_about_a_run_is_there(trained: Path) -> None:
    tree = written("method=mezo")
    results = [
        json.loads(f.read_text()) for f in sorted(Path("runs").glob("*/*-mezo-*/result.json"))
    ]
    for result in results:
        assert result["command"] in tree.text
        for key in ("torch", "transformers", "commit", "python"):
            assert str(result["versions"][key]) in tree.text
    for key, value in (("task.num_test", "12"), ("eval_every", "2"), ("model.name", "tiny-llama")):
        assert f"\n{key}\n{value}\n" in tree.text
    lines = len(tree.named("polyline"))
    assert lines == 4 + 1  # loss and accuracy against steps and seconds, and the legend
    assert len([1 for _, a in tree.named("polygon") if a["class"] == "band"]) == 4
    assert sum("(n = 2): " in words for tag, words in tree.words if tag == "desc") == 4


def test_samples_are_the_rows_that_training_changed(trained: Path) -> None:
    folder = next(Path("runs").glob("*/*-mezo-s0-*"))
    scores = load_file(folder / "scores.safetensors")
    better = int((scores["outcome.test"] > scores["outcome.zero_shot"]).sum())
    worse = int((scores["outcome.test"] < scores["outcome.zero_shot"]).sum())
    tree = written("method=mezo")
    assert better + worse > 0, "choose a larger lr for this test"
    kinds = [words for tag, words in tree.words if tag == "h5"]
    assert kinds[0].startswith(f"Better after training: {better} row")
    assert kinds[1].startswith(f"Worse after training: {worse} row")
    lines = (folder / "predictions-test.jsonl").read_text().splitlines()
    changed = (scores["outcome.test"] != scores["outcome.zero_shot"]).nonzero()[0][0]
    assert json.loads(lines[changed])["fields"]["text"] in tree.text


def test_a_table_stands_above_its_runs(trained: Path) -> None:
    tree = written("tiny")
    assert "method=later is not in smezo yet" in tree.text
    assert "40.0 (1.5)" in tree.text
    heads = [words for tag, words in tree.words if tag == "th"]
    assert heads.count("Ours") >= 3  # in the table, and wherever its runs are
    shown = [words for tag, words in tree.words if tag == "text"]
    assert shown.count("Sparse") == 3  # above its dots and both bars


def test_the_same_runs_give_the_same_bytes(trained: Path) -> None:
    written(out="one.html")
    written(out="two.html")
    assert Path("one.html").read_bytes() == Path("two.html").read_bytes()


def heads(tree: Tree) -> list[str]:
    return [words for tag, words in tree.words if tag == "th"]


def legend(tree: Tree) -> list[str]:
    """The names of a legend, less how many seeds they have."""
    lines = [words.strip() for tag, words in tree.words if tag == "li" and " (n = " in words]
    return [words.partition(" (n")[0] for words in lines]


def evaluated(folder: Path, steps: int = 1) -> None:
    """Give a run evaluations on dev at so many steps."""
    lines = [{"step": k, "seconds": 0.1, "loss": 1.0} for k in range(1, steps + 1)]
    lines += [{"step": k, "dev.accuracy": 0.5, "dev.loss": 1.0} for k in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_runs_of_one_method_have_names_that_tell_what_differs(tmp_path: Path) -> None:
    """Not only between runs of one sparsity; and the names stand in one order everywhere."""
    for k, (sparsity, lr, eps) in enumerate(
        ((0.75, 1e-3, 0.1), (0.5, 1e-4, 0.1), (0.5, 1e-4, 0.2))
    ):
        method = {"name": "sparse_mezo", "mask": "small", "sparsity": sparsity}
        own = {"lr": lr, "eps": eps, "sparsity": sparsity, "batch_size": 8 + k}
        folder = make(tmp_path, f"r{k}", [1, 0], method=method, **own)
        file = folder / "result.json"
        result = json.loads(file.read_text()) | {"method": "sparse_mezo"}
        file.write_text(json.dumps(result | {"sparsity": {"requested": sparsity}}))
        evaluated(folder)
    names = [
        "S-MeZO 0.75 eps=0.1 lr=0.001 batch_size=8",
        "S-MeZO 0.5 eps=0.1 lr=0.0001 batch_size=9",
        "S-MeZO 0.5 eps=0.2 lr=0.0001 batch_size=10",
    ]
    tree = written("--runs-dir", tmp_path, out=str(tmp_path / "a.html"))
    assert legend(tree) == names  # the papers have S-MeZO 0.5 before S-MeZO 0.75
    rows = [words for words in heads(tree) if words.startswith("S-MeZO")]
    assert set(rows) == set(names)
    assert rows[:3] == names
    assert [a["class"] for _, a in tree.named("svg") if "key" in str(a.get("class"))] == [
        f"key s{k} series" for k in range(3)
    ]


def test_a_column_that_is_empty_for_all_rows_is_left_out(tmp_path: Path) -> None:
    make(tmp_path, "a", [1, 0])
    tree = written("--runs-dir", tmp_path, out=str(tmp_path / "a.html"))
    for head in ("lowers", "eps", "sparsity", "tested step", "sd", "forwards", "executor"):
        assert head not in heads(tree)
    for head in ("lr", "accuracy", "zero-shot", "AUC", "peak GiB", "seconds a step"):
        assert head in heads(tree)
    make(tmp_path, "b", [1, 0], seed=1)  # of two seeds there is a spread
    tree = written("--runs-dir", tmp_path, out=str(tmp_path / "a.html"))
    assert "sd" in heads(tree)


def test_a_line_of_one_point_is_said_once(tmp_path: Path) -> None:
    evaluated(make(tmp_path, "a", [1, 0]))
    evaluated(make(tmp_path, "b", [1, 0], method="mezo_adam"), steps=2)
    tree = written("--runs-dir", tmp_path, out=str(tmp_path / "a.html"))
    said = [
        words for tag, words in tree.words if tag == "desc" and "dev loss against steps" in words
    ]
    assert "MeZO (n = 1): 1 at 1; MeZO-Adam (n = 1): 1 at 1, 1 at 2." in said[0]


# --- what it is ------------------------------------------------------------------------------


def test_the_page_is_sound_html(trained: Path) -> None:
    tree = written()
    ids = [a["id"] for _, a in tree.tags if "id" in a]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in tree.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(a.get("scope") in ("row", "col") for _, a in tree.named("th"))
    for _, attrs in tree.named("a"):
        assert (attrs["href"] or "")[1:] in ids
    drawings = [a for _, a in tree.named("svg") if a.get("aria-hidden") != "true"]
    assert drawings
    for attrs in drawings:
        assert attrs["role"] == "img"
        assert set((attrs["aria-labelledby"] or "").split()) <= set(ids)
    scrolled = [a for _, a in tree.named("div") if a.get("class") == "scroll"]
    assert len(scrolled) == len(tree.named("table"))
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in scrolled)


def test_nothing_is_loaded(trained: Path) -> None:
    tree = written()
    for tag, attrs in tree.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "use", "image")
        assert not {"src", "srcset", "xlink:href", "background", "style"} & attrs.keys()
    text = Path("report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import|@font-face", text)
    assert "default-src 'none'" in text


def _luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_can_be_read_in_light_dark_and_print(trained: Path) -> None:
    """Text by WCAG's 4.5:1 on either ground, lines of a chart by its 3:1."""
    written()
    text = Path("report.html").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"--(\w+): (#\w{6});", of))
        for of in re.findall(":root {(.*?)}", text, re.S)
    ]
    assert len(themes) == 3
    for of in themes:
        for ground in (of["page"], of["raised"]):
            for name, colour in of.items():
                least = 4.5 if name in ("text", "muted", "link", "good", "bad") else 3
                least = 1 if name in ("page", "raised", "rule") else least
                dark, light = sorted((_luminance(colour), _luminance(ground)))
                assert (light + 0.05) / (dark + 0.05) >= least, (name, colour, ground)


# --- what it does not let through ------------------------------------------------------------

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"'&{{ 7*7 }}</dd></pre>"


def hostile(root: Path, name: str = "a", **settings: Any) -> Path:
    """A run whose every text is an attack, with rows that hold what HTML or a reader trips over."""
    folder = make(root, name, [1, 0, 0], zero=[0, 1, 0], prompt_of_mine=HOSTILE, **settings)
    result = json.loads((folder / "result.json").read_text())
    prompt = {"template": f"{HOSTILE} {{text}}", "labels": [HOSTILE, "b"], "option": None}
    result |= {"prompt": prompt, "command": f"smezo train {HOSTILE}", "data_notes": [HOSTILE]}
    result |= {"versions": {"smezo": HOSTILE}, "device": HOSTILE, "executor": HOSTILE}
    (folder / "result.json").write_text(json.dumps(result))
    rows = [
        {"id": HOSTILE, "fields": {HOSTILE: HOSTILE}, "prediction": 0, "word": HOSTILE, "label": 0},
        {"id": "b", "fields": {"text": "a\u2028b\x00c\x1b[31m\u202e"}, "prediction": 0, "label": 1},
        {"id": "c", "fields": {"text": "x" * 5000}, "prediction": 1, "label": 0},
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "predictions-test.jsonl").write_text(text, encoding="utf-8")
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "seconds": 0.1, "loss": 1.0, "projected_grad": [1.0]}\n'
        '{"step": 1, "dev.accuracy": 0.5, "dev.loss": 1.0}\n'
    )
    return folder


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile(tmp_path, "<script>alert(3)<")
    hostile(tmp_path, "b", lr=1e-3)
    make(tmp_path, "c", status="failed")
    file = tmp_path / "default" / "c" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"error": HOSTILE}))
    tree = written("--runs-dir", tmp_path, out=str(tmp_path / "a.html"))
    assert len(tree.named("script")) == 1
    assert len(tree.named("img")) == 0
    assert not [a for _, a in tree.tags if any(key.startswith("on") for key in a)]
    for tag in ("dd", "dt", "code", "td", "li", "th"):
        assert HOSTILE in [words for of, words in tree.words if of == tag or HOSTILE in words], tag
    assert "<script>alert(3)<" in tree.text
    assert "a\u2028b\ufffdc\ufffd[31m" in tree.text
    assert "… (4400 more characters)" in tree.text


def test_damaged_folders_are_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "good", [1, 0, 0])
    for name, file, content in (
        ("cut", "result.json", "{"),
        ("listed", "config.yaml", "- 1"),
        ("scores", "scores.safetensors", "x"),
        ("short", None, None),
        ("lines", "metrics.jsonl", '[]\n{"step": "1"}\n'),
        ("answers", "predictions-test.jsonl", "[]\n{"),
        ("endless", "result.json", '{"status": "done", "task": "toy"}'),
    ):
        folder = make(tmp_path, name, [1, 0, 0] if file else [1, 0], lr=len(name) / 100)
        if file is not None:
            (folder / file).write_text(content or "")
    lone = tmp_path / "default" / "lone"
    lone.mkdir()
    (lone / "config.yaml").write_text("seed: 0")
    tree = written("--runs-dir", tmp_path, out=str(tmp_path / "a.html"))
    lines = [words for tag, words in tree.words if tag == "li"]
    for name in ("cut", "listed", "scores", "short", "endless", "lone"):
        assert sum(f"default/{name}" in line for line in lines) == 1, name
    assert "6 not in its numbers" in capsys.readouterr().out
    assert sorted(tree.values("score")) == [1 / 3] * 3  # good, lines, answers
    assert "default/answers/predictions-test.jsonl cannot be read" in tree.text
    assert "default/lines: 2 lines of metrics.jsonl cannot be read" in tree.text


def test_numbers_that_no_run_writes_are_no_traceback(tmp_path: Path) -> None:
    for k, (score, loss) in enumerate(((float("nan"), 1.0), (0.5, float("inf")), (0.5, 1e308))):
        folder = make(tmp_path, f"r{k}", [1, 0], lr=10.0**-k)
        file = folder / "result.json"
        result = json.loads(file.read_text())
        result["test"]["accuracy"] = score
        file.write_text(json.dumps(result | {"num_forwards": "many", "versions": {"torch": [{}]}}))
        lines = [
            {"step": s, "dev.accuracy": 0.5, "dev.loss": sign * loss}
            for s, sign in ((1, 1), (2, -1))
        ]
        text = '{"step": 1, "seconds": 1}\n{"step": 2, "seconds": 1}\n'
        (folder / "metrics.jsonl").write_text(text + "".join(json.dumps(x) + "\n" for x in lines))
    tree = written("--runs-dir", tmp_path, out=str(tmp_path / "a.html"))
    assert tree.values("score") == [0.5, 0.5]
    assert "nan" not in " ".join(
        str(v) for t, a in tree.named("path", "polyline") for v in a.values()
    )


def test_unfinished_runs_are_listed_with_why(tmp_path: Path) -> None:
    make(tmp_path, "a", status="running")
    folder = make(tmp_path, "b", status="failed")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(
        json.dumps(result | {"error": "the disk is full", "step": 3})
    )
    tree = written("--runs-dir", tmp_path, out=str(tmp_path / "a.html"))
    assert "No run is finished" in tree.text
    assert "\nfailed\n3 of 10\nthe disk is full\n" in tree.text
    assert "it still runs, or was killed" in tree.text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--out a.pdf", "--out a.pdf: a report is HTML, so give a name such as a.pdf.html."),
        ("--out no/a.html", "there is no folder no; make it first."),
        ("--out here.html", "--out here.html is a folder"),
        ("--runs-dir no", "--runs-dir no: there is no such folder."),
        ("task=nothing", "there are no runs in runs with task=nothing"),
        ("tsak=toy", "no run has a key tsak, did you mean task?"),
        ("small/1 small/2", "'small/2' is neither KEY=VALUE nor the one table"),
        ("smal/1", "there is no table smal/1, did you mean small/1?"),
        ("small/1", "no cell of the table has runs in runs; smezo table small/1 prints"),
        ("--sort score", "smezo report --help shows the flags"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(table_module, "CONF_DIR", CONF_DIR)
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs", "a")
    (tmp_path / "here.html").mkdir()
    assert main(["report", *shlex.split(words)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def retold(folder: Path, lines: list[dict[str, Any]], **result: Any) -> None:
    """Give a run other keys of its result, and predictions."""
    file = folder / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | result))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "predictions-test.jsonl").write_text(text)


def answers(tree: Tree) -> list[str]:
    """What stands beside each name of a sample, "name: words"."""
    told = [(tag, words.strip()) for tag, words in tree.words if tag in ("dt", "dd", "span")]
    found = list[str]()
    for tag, words in told:
        found = [*found, f"{words}:"] if tag == "dt" else [*found[:-1], f"{found[-1]} {words}"]
    return found


def test_samples_of_choice_name_options(tmp_path: Path) -> None:
    folder = make(tmp_path, "a", [1, 0], zero=[0, 0])
    scores = load_file(folder / "scores.safetensors")
    scores["zero_shot"] = np.array([[-2, -1, -np.inf], [-1, -2, -3]], dtype=np.float32)
    save_file(scores, folder / "scores.safetensors")
    rows = [{"id": "r1", "prediction": 0, "word": "red", "label": [0], "fields": {"q": "which?"}}]
    rows += [{"id": "r2", "prediction": 0, "word": "big", "label": [1, 2], "fields": {"q": "how?"}}]
    retold(folder, rows, prompt={"template": "{q}", "labels": [], "option": "{option}"})
    found = answers(written("--runs-dir", tmp_path, out=str(tmp_path / "a.html")))
    told = ["right answer: option 1", "before: option 2 (wrong)", "after: option 1: red (right)"]
    at = found.index("q: which?") + 1
    assert found[at : at + 3] == told
    told = ["right answer: option 2 or option 3", "before: option 1: big (wrong)"]
    at = found.index("q: how?") + 1
    assert found[at : at + 2] == told


def test_samples_of_generation_have_what_was_answered(tmp_path: Path) -> None:
    """The answers before training are those that smezo eval --base has written, if it has."""
    folder = make(tmp_path, "a", [0.8, 0.0], zero=[0.2, 0.4])
    rows = [{"id": "r1", "prediction": "a red car", "answers": ["red car", "car"], "f1": 0.8}]
    rows += [{"id": "r2", "prediction": "", "answers": ["x"], "f1": 0.0}]
    test = {"f1": 0.4, "standard_error": 0.2, "n": 2}
    retold(folder, rows, metric="f1", test=test, zero_shot={"f1": 0.3})
    page = "--runs-dir", tmp_path
    found = answers(written(*page, out=str(tmp_path / "a.html")))
    assert "after: a red car (F1 0.80)" in found
    assert f"before: (smezo eval {folder} --base writes what it was) (F1 0.20)" in found
    base = [rows[0] | {"prediction": "blue car"}, rows[1] | {"prediction": "y x"}]
    text = "".join(json.dumps(line) + "\n" for line in base)
    (folder / "predictions-test-base.jsonl").write_text(text)
    tree = written(*page, out=str(tmp_path / "a.html"))
    at = (found := answers(tree)).index("right answer: red car / car") + 1
    assert found[at : at + 2] == ["before: blue car (F1 0.20)", "after: a red car (F1 0.80)"]
    assert tree.values("score") == [0.4]


def test_a_mixture_shows_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [{"part": p, "template": f"{p} {{t}}", "labels": [f"{p}0", f"{p}1"]} for p in "uv"]
    for k in range(2):
        folder = make(tmp_path, f"a{k}", [1, 0, 1], zero=[0, 0, 1], seed=k)
        parts = {"u": {"accuracy": 0.5, "n": 2}, "v": {"accuracy": 1.0, "n": 1}}
        test = {"accuracy": 0.75, "n": 3, "parts": parts}
        rows = [{"id": str(i), "prediction": 1, "label": i % 2, "part": "uuv"[i]} for i in range(3)]
        retold(folder, rows, test=test, prompt=prompts)
    tree = written("--runs-dir", tmp_path, out=str(tmp_path / "a.html"))
    (record,) = means(capsys, "--runs-dir", str(tmp_path))
    assert tree.values("part") == list(record["parts"].values()) == [0.5, 1.0]
    assert tree.values("over_zero_shot") == [record["over_zero_shot"]]
    assert {"prompt of u: u {t}", "prompt of v: v {t}", "right answer: u0"} <= set(answers(tree))


def test_runs_on_other_rows_are_never_paired(tmp_path: Path) -> None:
    make(tmp_path, "a", [1, 0, 1], test_rows="aa")
    make(tmp_path, "b", [1, 1, 1], test_rows="bb", lr=1e-3)
    tree = written("--runs-dir", tmp_path, out=str(tmp_path / "a.html"))
    titles = [words for tag, words in tree.words if tag == "h3"]
    assert titles.count("toy, tiny-llama (test rows bb)") == titles.count(titles[0]) == 6
    assert tree.values("pair") == []


def test_runs_of_before_that_do_not_name_their_rows_are_shown_apart(tmp_path: Path) -> None:
    for name, rows in (("a", [1, 0, 1]), ("b", [1, 0]), ("c", [0, 0, 1])):
        folder = make(tmp_path, name, [float(row) for row in rows], lr=ord(name) / 1e3)
        retold(folder, [], test_rows=None)
    tree = written("--runs-dir", tmp_path, out=str(tmp_path / "a.html"))
    assert len(tree.values("score")) == 3
    titles = [words for tag, words in tree.words if tag == "h3"]
    assert titles[:2] == [f"toy, tiny-llama (test rows not recorded, {n})" for n in (2, 3)]
    assert tree.values("pair") == []


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    make(tmp_path, "a")
    out = str(tmp_path / "a.html")
    code, modules = imports("report", "--runs-dir", str(tmp_path), "--out", out, cwd=tmp_path)
    assert code == 0
    assert "jinja2" in modules
    assert not modules & {"torch", "transformers", "datasets", "matplotlib", "hydra"}
