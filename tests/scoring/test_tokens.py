"""Token ids without what a tokenizer appends, and padding with any token that has a row."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from smezo_cli.cli.verbs import main
from smezo_cli.errors import UserError
from smezo_cli.files import fetch
from smezo_cli.models.load import load_model
from smezo_cli.models.tiny import byte_tokenizer
from smezo_cli.scoring.candidates import Candidates, encode
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.scoring.tokens import appended, check_rows, num_rows, padding_id, token_ids
from smezo_cli.tasks import Prompt, Row
from tests import CONF

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SPECIALS = {"<s>": 1, "</s>": 2, "<unk>": 3}
TEXTS = ["a fine film", "dull", "the plot was bad and the cast was great", "", "ends in </s>", "a"]
ROWS = [
    Row({"text": text}, k % 2, str(k), options=("dull", "so lovely"))
    for k, text in enumerate([*TEXTS[:3], "no"])
]
PROMPTS = {
    "classification": Prompt("{text}. It was", ("terrible", "great")),
    "choice": Prompt("{text}. It was"),
    "generation": Prompt("Say: {text}\nAnswer:"),
}


def tiny(name: str = "tiny-llama", **changes: Any) -> tuple[Any, Any]:
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    return load_model(node | changes, dtype=torch.float32, device=CPU, cache=Path("/nowhere"))


def template(single: str, pair: str = "$A $B") -> Any:
    tokens = list(SPECIALS.items())
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def encoded(kind: str, tokenizer: Any) -> list[Candidates]:
    rows = [row._replace(answers=("good",)) if kind == "generation" else row for row in ROWS]
    return encode(rows, PROMPTS[kind], tokenizer, 64, kind, 6)


# --------------------------------------------------------------------- what a tokenizer appends


@pytest.mark.parametrize(
    ("processor", "begins", "ends"),
    [
        (template("$A </s>"), False, [2]),
        (template("<s> $A </s>"), True, [2]),
        (template("<s> $A </s>", "<s> $A </s> $B </s>"), True, [2]),
        (template("<s> $A </s> <unk>"), True, [2, 3]),
        (template("<s> $A <s>"), True, [1]),
        (template("<s> $A", "<s> $A $B </s>"), True, []),
        (processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), True, [2]),
        (processors.BertProcessing(("</s>", 2), ("<s>", 1)), True, [2]),
        (template("$A"), False, []),
    ],
)
def test_what_is_appended_is_left_out_where_the_model_goes_on(
    processor: Any, begins: bool, ends: list[int]
) -> None:
    """EOS, SEP, several of them: a causal prompt is that of a tokenizer that appends nothing.

    A masked one stays whole, and what a text itself holds is the text's.
    """
    plain, tokenizer = byte_tokenizer(add_bos=begins), byte_tokenizer(add_bos=False)
    tokenizer.backend_tokenizer.post_processor = processor
    assert appended(tokenizer) == ends
    expected = plain(TEXTS)["input_ids"]
    assert token_ids(tokenizer, TEXTS) == expected
    assert token_ids(tokenizer, TEXTS, goes_on=False) == [[*ids, *ends] for ids in expected]
    for kind in PROMPTS:
        assert encoded(kind, tokenizer) == encoded(kind, plain)
        assert not any(row.num_merged for row in encoded(kind, tokenizer))


def test_the_embedded_tokenizer_gives_the_same_prompts_where_it_is_told_to_add_eos() -> None:
    """`add_eos_token`, when it is loaded and set later."""
    folders = list(fetch.cache_dir().glob("models/smollm2-135m-*/tokenizer.json"))
    if not folders:
        pytest.skip("the embedded model is not in the cache")
    where = folders[0].parent
    plain = AutoTokenizer.from_pretrained(where)
    given = AutoTokenizer.from_pretrained(where, add_eos_token=True)
    later = AutoTokenizer.from_pretrained(where)
    later.add_eos_token = True
    for tokenizer in (given, later):
        assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
        for kind in PROMPTS:
            assert encoded(kind, tokenizer) == encoded(kind, plain)


def test_a_run_is_the_same_whether_its_tokenizer_appends_eos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Demonstrations, scores, the note on them and predictions; and it is said."""
    words = ["train", "model=tiny-llama", "task=toy", "method=icl", "task.prompt=0", "device=cpu"]
    words += ["task.num_train=12", "task.num_dev=4", "task.num_test=6", f"runs_dir={tmp_path}/r"]
    results, predictions = [], []
    for more in ([], ["+model.tiny.add_eos=true"]):
        assert main([*words, *more]) == 0
        said = capsys.readouterr().out
        assert ("puts </s> behind a text: left out" in said) == bool(more)
        assert "merges" not in said
        name = "true" if more else "false"
        (file,) = (tmp_path / "r").glob("*/*/result.json")
        results.append(json.loads(file.read_text()))
        assert main(["predict", str(file.parent), "--field", "text=a dull plot"]) == 0
        predictions.append(capsys.readouterr().out)
        file.parent.rename(tmp_path / name)
    keys = ("test", "dev", "demonstrations")
    assert [results[0][key] for key in keys] == [results[1][key] for key in keys]
    assert predictions[0] == predictions[1]


# ------------------------------------------------------------------------------------- padding


def bare(tokenizer: Any) -> Any:
    """The tokenizer without special tokens: what were some are tokens like others."""
    raw = json.loads(tokenizer.backend_tokenizer.to_str()) | {"added_tokens": []}
    fast: Any = PreTrainedTokenizerFast  # its constructor has no types
    return fast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)))


def padded_beyond(tokenizer: Any, rows: int) -> Any:
    """The tokenizer with a padding token of the number `rows`, the first without a row."""
    loose: Any = tokenizer
    loose.add_tokens([f"<more {k}>" for k in range(rows - len(tokenizer))])
    loose.add_special_tokens({"pad_token": "<far>"})
    assert loose.pad_token_id == rows
    return loose


class Named:
    """A tokenizer of which only the padding token is known."""

    def __init__(self, pad_token_id: Any) -> None:
        self.pad_token_id = pad_token_id


@pytest.mark.parametrize(
    ("pad", "expected"), [(7, 7), (0, 0), (None, 0), (-1, 0), (8, 0), (9000, 0), ("<pad>", 0)]
)
def test_the_token_to_pad_with_has_a_row(pad: Any, expected: int) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(8, 2)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embedding

    assert num_rows(Model()) == 8
    assert padding_id(Named(pad), Model()) == expected
    assert num_rows(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
@pytest.mark.parametrize("kind", PROMPTS)
@torch.no_grad()
def test_scores_losses_and_answers_do_not_depend_on_the_padding(name: str, kind: str) -> None:
    """To the last bit: whatever stands behind (or before) a text is hidden from it."""
    model, tokenizer = tiny(name)
    rows = encoded(kind, tokenizer)
    assert len({row.width for row in rows}) > 1
    found = []
    for pad in (tokenizer.pad_token_id, 0, 17, num_rows(model), None, -1):
        scorer = Scorer(model, Padded(tokenizer, pad))
        answers = scorer.generate(rows) if kind == "generation" else []
        found.append((scorer.scores(rows).tolist(), float(scorer.loss(rows)), answers))
    assert found[1:] == found[:1] * 5


class Padded:
    """A tokenizer with another padding token."""

    def __init__(self, tokenizer: Any, pad_token_id: Any) -> None:
        self.inner, self.pad_token_id = tokenizer, pad_token_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("make", ["bare", "beyond"])
@torch.no_grad()
def test_a_saved_tokenizer_without_a_padding_token_of_the_model_serves(
    make: str, tmp_path: Path
) -> None:
    """One without any special token, and one whose padding token came without a row for it."""
    model, plain = tiny()
    odd = bare(plain) if make == "bare" else padded_beyond(tiny()[1], num_rows(model) or 0)
    model.save_pretrained(tmp_path)
    odd.save_pretrained(tmp_path)
    cfg = {"name": "odd", "path": str(tmp_path), "attention": "sdpa", "max_length": 64}
    loaded, tokenizer = load_model(cfg, dtype=torch.float32, device=CPU, cache=Path("/nowhere"))
    assert (tokenizer.pad_token_id is None) == (make == "bare")
    for kind in PROMPTS:
        ours = encoded(kind, tokenizer)
        assert ours == encoded(kind, plain)
        scorer, expected = Scorer(loaded, tokenizer), Scorer(model, plain)
        assert torch.equal(scorer.scores(ours), expected.scores(ours))
        if kind == "generation":
            assert [len(text) > 0 for text in scorer.generate(ours)] == [True] * len(ours)


@torch.no_grad()
def test_a_masked_model_pads_with_any_token() -> None:
    model, tokenizer = tiny("tiny-roberta")
    prompt = Prompt("{text} It was {mask} .", ("terrible", "great"))
    rows = encode(ROWS, prompt, tokenizer, 64)
    expected = Scorer(model, tokenizer).scores(rows)
    for pad in (None, num_rows(model), 9):
        found = Scorer(model, Padded(tokenizer, pad)).scores(rows)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_model_whose_settings_name_a_padding_token_without_a_row_is_loaded(
    tmp_path: Path,
) -> None:
    """Its embedding would not be built with it; the copy that is saved does not name it."""
    model, tokenizer = tiny()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"pad_token_id": settings["vocab_size"]}))
    cfg = {"name": "odd", "path": str(tmp_path), "attention": "sdpa", "max_length": 64}
    loaded, _ = load_model(cfg, dtype=torch.float32, device=CPU, cache=Path("/nowhere"))
    assert loaded.config.pad_token_id is None
    for (_, ours), (_, theirs) in zip(
        loaded.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("where", ["text", "label"])
def test_a_token_that_the_model_has_no_row_for_is_named(where: str, tmp_path: Path) -> None:
    """In a row, in a label word: one sentence that says what the tokenizer and the model have."""
    model, plain = tiny()
    tokenizer = padded_beyond(plain, num_rows(model) or 0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["dull", "a <far> cry"] if where == "text" else ["dull", "fine"]
    lines = [f"{texts[k % 2]} {k},{k % 2}\n" for k in range(20)]
    (tmp_path / "own.csv").write_text("text,label\n" + "".join(lines))
    words = ["train", "task=classification", f"task.data={tmp_path}/own.csv", "device=cpu"]
    words += ["model=own", f"model.path={tmp_path}/model", "model.name=odd", "method=zero_shot"]
    words += ["model.max_length=64", 'task.prompt="{text} It was"', f"runs_dir={tmp_path}/runs"]
    words += ["task.labels={0: bad, 1: '<far>'}" if where == "label" else "task.labels=[bad,good]"]
    assert message_of(words).startswith("row ")


def message_of(words: Sequence[str]) -> str:
    import contextlib
    import io

    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        assert main(list(words)) == 2
    (line,) = told.getvalue().strip().splitlines()
    assert "its token '<far>' has the number 334" in line
    assert "has 334 rows" in line
    return line.removeprefix("smezo: ")


def test_rows_within_the_embedding_pass() -> None:
    model, tokenizer = tiny()
    rows = num_rows(model)
    assert rows is not None
    check_rows(tokenizer, model, "1", [0, rows - 1])
    check_rows(tokenizer, model, "1", [])
    with pytest.raises(UserError, match="row 7: its token"):
        check_rows(tokenizer, model, "7", [rows])
