"""Greedy answers against a loop that knows no batch, no padding and no cache."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from smezo_cli.models.load import load_model
from smezo_cli.scoring import scorer
from smezo_cli.scoring.candidates import encode
from smezo_cli.scoring.generation import greedy
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.tasks import Prompt, Row
from tests import CONF

pytestmark = pytest.mark.usefixtures("one_thread")

# Factors on two output rows with which some rows say a newline, some end and some go on.
LIKES = {"tiny-llama": 2.0, "tiny-opt": -2.0}
WORDS = ["the", "film", "was", "dull", "and", "clumsy", "but", "lovely", "warm", "pace"]
TEXTS = [
    " ".join(WORDS[(i * 3 + j) % 10] for j in range(n))
    for i, n in enumerate([1, 12, 3, 30, 7, 2, 19, 5, 9, 15, 4, 11])
]


def tiny(name: str) -> tuple[Any, Any]:
    """A random model that likes to say a newline or to end: else no test would see it stop."""
    cfg: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    cpu = torch.device("cpu")
    model, tokenizer = load_model(cfg, dtype=torch.float32, device=cpu, cache=Path("/nowhere"))
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for token in (newline, tokenizer.eos_token_id):
            model.get_input_embeddings().weight[token] *= LIKES[name]
    return model, tokenizer


@torch.no_grad()
def reference(model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int) -> tuple[str, str]:
    """The answer, token by token over the whole sequence so far, and why it ended."""
    answer: list[int] = []
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids + answer]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(answer).strip(), "eos"
        if tokenizer.decode([token]) == "\n":
            return tokenizer.decode(answer).strip(), "newline"
        answer.append(token)
    return tokenizer.decode(answer).strip(), "length"


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_answers_are_those_of_a_plain_loop(name: str) -> None:
    """Batched, padded and cached, to a newline, the end of text or the limit: the same answers."""
    model, tokenizer = tiny(name)
    contexts = tokenizer(TEXTS)["input_ids"]
    expected, ends = zip(*(reference(model, tokenizer, c, 12) for c in contexts), strict=True)
    assert greedy(model, tokenizer, contexts, 12) == list(expected)
    assert set(ends) == {"eos", "newline", "length"}
    assert len(set(expected)) > len(TEXTS) / 2
    assert model.config.use_cache is False  # as it was
    alone = [greedy(model, tokenizer, [c], 12)[0] for c in contexts]
    assert alone == list(expected)


def test_a_model_without_a_cache_answers_alike() -> None:
    """One that returns none runs over the whole sequence each time."""
    model, tokenizer = tiny("tiny-llama")

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor,
            position_ids: Tensor,
            use_cache: bool,
            logits_to_keep: int,
        ) -> Any:
            assert position_ids.shape == input_ids.shape
            found = self.inner(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
            )
            return SimpleNamespace(logits=found.logits)

    contexts = tokenizer(TEXTS[:4])["input_ids"]
    assert greedy(Bare(), tokenizer, contexts, 6) == greedy(model, tokenizer, contexts, 6)


class Scripted(nn.Module):
    """Says a fixed sequence of tokens, whatever it is asked."""

    def __init__(self, tokens: list[int], size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.tokens, self.size, self.calls = tokens, size, 0

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        logits = torch.zeros(len(input_ids), 1, self.size)
        logits[:, :, self.tokens[self.calls]] = 1
        self.calls += 1
        return SimpleNamespace(logits=logits, past_key_values=None)


@pytest.mark.parametrize(
    ("pieces", "expected", "calls"),
    [
        ([" a", " b", "\n", "c"], "a b", 3),
        ([" a", ".\n\n", "c"], "a.", 2),
        (["\n", "c"], "", 1),
        ([" a", "</s>", "c"], "a", 2),
        ([" a", "<turn>", "c"], "a", 2),
        ([" a", "<s>", " b", "\n"], "a b", 4),
        (["  a ", " b"], "a  b", 2),
    ],
    ids=["newline", "in-a-token", "at-once", "eos", "eos-of-settings", "special", "limit"],
)
def test_where_an_answer_ends(pieces: list[str], expected: str, calls: int) -> None:
    """At the first newline, alone or inside a longer token; at each end of text; at the limit."""
    vocabulary = sorted({*pieces, "x", "</s>", "<turn>"})

    class Tokenizer:
        pad_token_id = 0
        eos_token_id = vocabulary.index("</s>")

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            assert kwargs["skip_special_tokens"]
            return "".join(vocabulary[i] for i in ids if not vocabulary[i].startswith("<"))

    model = Scripted([vocabulary.index(piece) for piece in pieces], len(vocabulary))
    model.generation_config = SimpleNamespace(
        eos_token_id=[vocabulary.index("<turn>")], repetition_penalty=9.0
    )
    assert greedy(model, Tokenizer(), [[1, 2]], len(pieces)) == [expected]
    assert model.calls == calls


def test_answers_of_many_rows_come_back_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of like length are told apart by the row numbers beside them."""
    monkeypatch.setattr(scorer, "EVAL_ANSWERS", 5)
    model, tokenizer = tiny("tiny-opt")
    rows = [Row({"text": text}, 0, str(i), answers=("x",)) for i, text in enumerate(TEXTS)]
    encoded = encode(rows, Prompt("{text}"), tokenizer, 256, "generation", 10)
    found: dict[int, str] = {}
    sizes = []
    for chosen, texts in Scorer(model, tokenizer).generate_all(encoded):
        found |= dict(zip(chosen, texts, strict=True))
        sizes.append(len(chosen))
    assert sizes == [5, 5, 2]
    expected = [reference(model, tokenizer, tokenizer(text)["input_ids"], 10)[0] for text in TEXTS]
    assert [found[i] for i in range(len(TEXTS))] == expected
