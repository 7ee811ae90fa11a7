"""Every command that README.md and the pages of docs/start show runs, on tiny models.

A command line is taken as a reader types it, changed by INSTEAD and SMALL, and run by the entry of
`smezo` in this process. What cannot run here is named in NOT_HERE, with the reason.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import smezo_cli.methods
from smezo_cli.cli import main
from tests import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs" / "start").glob("*.md"))]

# What stands in a line, and what is taken in its place.
INSTEAD = {
    "model=llama-7b": "model=tiny-llama",  # 13 GB of the hub
    "model=opt-13b": "model=tiny-opt",  # 26 GB; to plan it takes 5 s
    "task=rte": "task=toy",  # of the hub
    "seed=0,1,2": "seed=0",
    "lr=1e-6,1e-5": "lr=1e-6",
    "300": "64",  # tokens
    "steps=100": "steps=2",
    "steps=30": "steps=2",
    "steps=20": "steps=2",
    "eval_every=10": "eval_every=1",
    "task.num_dev=40": "task.num_dev=4",
}
# What a verb is given where the line does not say it, so that a run takes a second.
SMALL = {
    "train": [
        *("task=toy", "model=tiny-llama", "task.num_dev=4", "task.num_test=4", "steps=2"),
        *("task.max_train_tokens=64", "batch_size=2", "device=cpu"),
    ],
    "plan": ["task=toy", "model=tiny-llama"],
}
_ENVIRONMENT = "makes an environment; the sentences of scripts/setup.sh are in test_scripts.py"
_LARGE = "trains LLaMA-7b on a GPU; tests/report/test_table.py fills a small table"
NOT_HERE = {
    "scripts/train.sh": _ENVIRONMENT,
    "scripts/setup.sh": _ENVIRONMENT,
    "scripts/setup.sh --dev": _ENVIRONMENT,
    "source .venv/bin/activate": "there is an environment",
    "scripts/test.sh": "is what runs this test",
    "python scripts/gpu_check.py --json gpu.json": "tests/test_gpu_check.py runs its twin",
    "smezo table sparse-mezo/1 --run --row MeZO --row S-MeZO --column RTE": _LARGE,
    "smezo table sparse-mezo/1 --collect table-1": "there is no run of it; as above",
    "torchrun --standalone --nproc-per-node 2 -m smezo_cli.train task=rte model=llama-7b "
    "method=sparse_mezo lr=3e-6": "starts processes; tests/run/test_ranks.py does so",
}
# Files that a reader has, by the names that the pages give them.
YOURS = {
    "reviews.csv": "text,label\n" + "".join(f"a film of {i} hours,{i % 2}\n" for i in range(20)),
    "quiz.jsonl": "".join(
        f'{{"question": "{i} and 1", "a": "{i}", "b": "one", "c": "no", "label": 1}}\n'
        for i in range(20)
    ),
    "faq.csv": "question,reply\n" + "".join(f"what is {i},it is {i}\n" for i in range(20)),
    "new.csv": "question\nwhat is this\n",
}


class Block(NamedTuple):
    """A fenced block: its language, its text, and the file that the line before it names."""

    file: str
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"(?:`([\w./-]+)`:\n\n)?^```(\w+)\n(.*?)^```", text, re.S | re.M)
    return [Block(*parts) for parts in found]


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a block of bash, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        reader.whitespace_split = True
        words: list[str] = []
        for word in [*reader, ";"]:
            if word not in (";", "&&"):
                words.append(word)
            elif words:
                yield words
                words = []


def as_run_here(words: list[str]) -> list[str]:
    """Return the words behind `smezo` with what is taken in their place; RUN is the last run."""
    words = [INSTEAD.get(word, word) for word in words]
    if "RUN" in words:
        runs = sorted(Path("runs").glob("*/*/result.json"), key=lambda file: file.stat().st_mtime)
        words[words.index("RUN")] = str(runs[-1].parent)
    keys = {word.partition("=")[0] for word in words}
    words += [word for word in SMALL.get(words[0], ()) if word.partition("=")[0] not in keys]
    if Path("conf").is_dir() and words[0] in ("train", "plan", "show"):
        words += ["--config-dir", "conf"]
    return words


def run_block(block: Block) -> None:
    """Write the file that the page shows, or run its code or commands."""
    if block.file:
        file = Path(block.file)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text)
    elif block.language == "python":
        exec(compile(block.text, "a page", "exec"), {"__name__": "page"})
    elif block.language == "bash":
        for words in commands_of(block.text):
            line = " ".join(words)
            if line not in NOT_HERE:
                assert words[0] == "smezo", f"neither run nor in NOT_HERE: {line}"
                assert main(as_run_here(words[1:])) == 0, line


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[Path]:
    """A working folder with a reader's files; a method in its smezo_cli/methods is found."""
    monkeypatch.chdir(tmp_path)
    for name, text in YOURS.items():
        Path(name).write_text(text)
    theirs = tmp_path / "smezo_cli" / "methods"
    monkeypatch.setattr(smezo_cli.methods, "__path__", [*smezo_cli.methods.__path__, str(theirs)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("smezo_cli.methods."):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page: Path, desk: Path) -> None:
    for block in blocks_of(page):
        if page != README or block.language != "python":  # tests/test_readme.py runs those
            run_block(block)


def test_what_is_named_here_is_shown_somewhere() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page) if block.language == "bash"]
    lines = [words for block in blocks for words in commands_of(block.text)]
    assert set(NOT_HERE) <= {" ".join(words) for words in lines}
    assert set(INSTEAD) | set(YOURS) <= {
        part
        for words in lines
        for word in words
        for part in (word, word.removeprefix("task.data="))
    }


def test_a_command_that_is_neither_run_nor_named_is_noticed(desk: Path) -> None:
    for line in ("rm -r runs", "smezo train sparsity=2"):
        with pytest.raises(AssertionError):
            run_block(Block("", "bash", line + "\n"))
