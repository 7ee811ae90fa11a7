"""Tokenizers that make their library panic or give up: one sentence, at load and at a text."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from smezo_cli.cli.verbs import main
from smezo_cli.errors import UserError
from smezo_cli.models.load import load_model
from smezo_cli.models.tiny import byte_tokenizer
from smezo_cli.scoring.candidates import encode
from smezo_cli.scoring.tokenization import encoded, panics_as_exceptions
from smezo_cli.tasks import Prompt, Row

pytestmark = pytest.mark.usefixtures("one_thread")


def split(regex: str) -> dict[str, Any]:
    how = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    both = [how, bytes_ | {"use_regex": True}]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": both}}


def replace(**pattern: str) -> dict[str, Any]:
    return {"normalizer": {"type": "Replace", "pattern": pattern, "content": "z"}}


NEVER = {
    "a regex that cannot be": replace(Regex="(("),
    "an empty regex": replace(Regex=""),
    "an empty string": replace(String=""),
    "a character map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
}
# Backtracking beyond the limit, at a long row of x alone.
AT_A_TEXT = {"a split": split("(x+x+)+y"), "a normalizer": replace(Regex="(x+x+)+y")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"model_type": "llama", "vocab_size": 334, "hidden_size": 16} | {
        **{"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"max_position_embeddings": 256},
    }
    node = {"name": "own", "tiny": {}, "attention": "auto", "max_length": 256, "config": config}
    folder = tmp_path_factory.mktemp("model")
    net, tokenizer = load(node)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(node: dict[str, Any]) -> Any:
    cpu = torch.device("cpu")
    return load_model(node, dtype=torch.float32, device=cpu, cache=Path("/nowhere"))


def spoilt(saved: Path, folder: Path, change: dict[str, Any]) -> dict[str, Any]:
    """The node of a copy of the model with another tokenizer.json."""
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    words = json.loads((folder / "tokenizer.json").read_text()) | change
    (folder / "tokenizer.json").write_text(json.dumps(words))
    return {"name": "own", "path": str(folder), "attention": "auto", "max_length": 256}


@pytest.mark.parametrize("change", NEVER.values(), ids=NEVER)
def test_a_tokenizer_that_takes_no_text_is_refused_when_it_is_loaded(
    saved: Path, change: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    node = spoilt(saved, tmp_path / "m", change)
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        load(node)
    assert str(caught.value).startswith(f"model.path={tmp_path / 'm'}: its tokenizer cannot be lo")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # a panic writes its own lines


@pytest.mark.parametrize("change", AT_A_TEXT.values(), ids=AT_A_TEXT)
@pytest.mark.parametrize("mask", [False, True], ids=["causal", "masked"])
def test_a_text_that_the_tokenizer_cannot_take_is_named(
    change: dict[str, Any], mask: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer: Any = byte_tokenizer(add_bos=False, add_mask=mask)
    about = json.loads(tokenizer._tokenizer.to_str()) | change
    tokenizer._tokenizer = type(tokenizer._tokenizer).from_str(json.dumps(about))
    prompt = Prompt("{text} It was {mask}" if mask else "{text} It was", ("bad", "good"))
    rows = [Row({"text": text}, 0, id=text[:3]) for text in ("fine", "x" * 5000, "good")]
    with pytest.raises(UserError, match=r"tokenizer cannot take the text 'xxx") as caught:
        encode(rows, prompt, tokenizer, 128)
    assert len(str(caught.value)) < 300
    assert capfd.readouterr() == ("", "")
    assert len(encode(rows[::2], prompt, tokenizer, 128)) == 2


def test_what_is_written_while_a_tokenizer_works_is_passed_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with panics_as_exceptions():
        os.write(2, b"a word of others\n")
    assert capfd.readouterr().err == "a word of others\n"

    def fails() -> None:
        os.write(2, b"and then\n")
        raise KeyError

    with pytest.raises(KeyError), panics_as_exceptions():
        fails()
    assert capfd.readouterr().err == "and then\n"


def test_mistakes_of_ours_are_not_blamed_on_the_tokenizer() -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise TypeError("ours")

    with pytest.raises(TypeError, match="ours"):
        encoded(fails, ["a"])


@pytest.mark.parametrize("verb", ["train", "predict"])
def test_the_command_line_ends_in_one_sentence(
    verb: str,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    spoilt(saved, tmp_path / "m", AT_A_TEXT["a split"])
    texts: list[str] = ["warm", "dull"] * 12
    write(tmp_path / "good.jsonl", texts)
    write(tmp_path / "bad.jsonl", [*texts[:-1], "x" * 5000])
    words = "task=classification task.labels={0:bad,1:good} model=own model.path=m device=cpu"
    words += " model.max_length=256 task.num_train=8 task.num_dev=4 task.num_test=12 method=mezo"
    words += " steps=1 batch_size=2 compile=false lr=1e-4 eps=1e-3"
    prompt = 'task.prompt="{text} It was"'
    if verb == "train":
        asked = ["train", *words.split(), prompt, "task.data=bad.jsonl"]
    else:
        assert main(["train", *words.split(), prompt, "task.data=good.jsonl"]) == 0
        (run,) = (tmp_path / "runs" / "default").iterdir()
        asked = ["predict", str(run), "bad.jsonl"]
    capfd.readouterr()
    assert main(asked) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert "the model's tokenizer cannot take the text 'xxx" in lines[-1]
    assert not any("panicked" in line or "Traceback" in line for line in lines)


def write(file: Path, texts: list[str]) -> None:
    rows = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)]
    file.write_text("\n".join(rows) + "\n")
