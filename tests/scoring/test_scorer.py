"""Scores and losses against MeZO's own way of computing them, written out here a second time."""

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
    RobertaForMaskedLM,
)

from smezo_cli.errors import UserError
from smezo_cli.files import fetch
from smezo_cli.machine.out_of_memory import Halving
from smezo_cli.methods.mezo import MeZO
from smezo_cli.models.load import load_model
from smezo_cli.models.tiny import byte_tokenizer
from smezo_cli.scoring import candidates, prefix_cache
from smezo_cli.scoring import scorer as scoring
from smezo_cli.scoring.candidates import Candidates, PromptLike, RowLike, encode
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.tasks import Prompt, Row, load_task
from smezo_cli.tasks.base import BasePrompt
from smezo_cli.tasks.templates import fields_of
from smezo_cli.zo.probe import FunctionalProbe
from tests import CONF

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["tiny-llama", "tiny-opt"]  # without and with a BOS, rotary and learned positions
ONE_TOKEN = Prompt("Review: {text}\nSentiment:", ("negative", "positive"))
# Two tokens against one: only a mean over the label's tokens treats them alike.
MULTI_TOKEN = Prompt("{text}. It was", ("terrible bad", "great"))
AFTER_NEWLINE = Prompt("{text}\nIs the film good?\n", ("Yes", "No", "Maybe"))  # no blank between
PROMPTS = [ONE_TOKEN, MULTI_TOKEN, AFTER_NEWLINE]
# fp32 numbers of size 4 are 5e-7 apart; left and right padding only change the order of sums.
FP32 = 3e-6
# bf16 keeps 8 bits, a logit of size 4 is known to 1.6e-2; the orders of sums differ as above.
BF16 = 0.03


def node(group: str, name: str, **changes: Any) -> dict[str, Any]:
    """The node of a YAML file with some keys changed."""
    cfg = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"), resolve=True)
    assert isinstance(cfg, dict)
    return {str(key): value for key, value in cfg.items()} | changes


def tiny(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    cfg = node("model", name)
    return load_model(cfg, dtype=dtype, device=torch.device("cpu"), cache=Path("/nowhere"))


def rows_of(lengths: Sequence[int]) -> list[Row]:
    """One row for each length in words."""
    words = ["the", "film", "was", "dull", "and", "clumsy", "but", "lovely", "warm", "pace"]
    return [
        Row({"text": " ".join(words[(i * 3 + j) % 10] for j in range(n))}, i % 2, str(i))
        for i, n in enumerate(lengths)
    ]


MIXED = rows_of([1, 12, 3, 30, 7, 2, 19])
BATCHES = {"mixed": MIXED, "equal": rows_of([5] * 4), "one": rows_of([9])}


@pytest.mark.parametrize(
    ("protocol", "made"),
    [(RowLike, Row({}, 0, "")), (PromptLike, Prompt("")), (PromptLike, BasePrompt(""))],
)
def test_rows_and_prompts_of_tasks_are_what_scoring_asks_for(protocol: type, made: object) -> None:
    """mypy says so of their types; here that no name is missing, and what methods take."""
    asked = {name: value for name, value in vars(protocol).items() if name[0] != "_"}
    assert len(asked) > 5
    for name, value in asked.items():
        assert hasattr(made, name)
        if not isinstance(value, property):
            of_task = inspect.signature(getattr(type(made), name))
            assert of_task.parameters.keys() == inspect.signature(value).parameters.keys()


def mezo_log_p(
    model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], max_length: int
) -> list[Tensor]:
    """Log-probability of every option token, an option a tensor: MeZO's inference, literally.

    Args:
        model: read only.
        tokenizer: its own.
        texts: (context, context with option).
        max_length: longer ones lose tokens on the left behind the BOS.

    One prompt a candidate, padded on the left to a multiple of 8, with attention mask and
    positions; softmax over the whole vocabulary.
    """
    adds_bos = tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    sequences, option_lengths = [], []
    for context, full in texts:
        ids = tokenizer(full)["input_ids"]
        option_lengths.append(len(ids) - len(tokenizer(context)["input_ids"]))
        if len(ids) > max_length:
            ids = ids[:1] + ids[1 - max_length :] if adds_bos else ids[-max_length:]
        sequences.append(ids)
    width = -(-max(map(len, sequences)) // 8) * 8
    padding = [width - len(ids) for ids in sequences]
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * n + s for n, s in zip(padding, sequences, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
    logits = model(
        input_ids=input_ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).logits
    log_p = logits[:, :-1].float().log_softmax(-1)  # of the tokens from the second on
    of_tokens = log_p.gather(2, input_ids[:, 1:, None]).squeeze(2)
    return [p[-n:] for p, n in zip(of_tokens, option_lengths, strict=True)]


def mezo_texts(row: Row, prompt: Prompt, words: Sequence[str]) -> list[tuple[str, str]]:
    """Context, and context with each word behind it, stripped of blanks (not of newlines)."""
    context = prompt.template.format(**row.fields).strip(" ")
    blank = "" if context.endswith("\n") else " "
    return [(context, (context + blank + word).strip(" ")) for word in words]


def mezo_scores(
    model: Any, tokenizer: Any, rows: Sequence[Row], prompt: Prompt, max_length: int
) -> Tensor:
    """Mean log-probability of every label, (rows, labels)."""
    texts = [pair for row in rows for pair in mezo_texts(row, prompt, prompt.labels)]
    found = mezo_log_p(model, tokenizer, texts, max_length)
    return torch.stack([p.mean() for p in found]).view(len(rows), len(prompt.labels))


def mezo_loss(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """Mean over rows of -log(exp(score of the label) / sum of exp(scores))."""
    of_label = scores[torch.arange(len(rows)), [row.label for row in rows]]
    return (scores.exp().sum(1).log() - of_label).mean()


def centred(scores: Tensor) -> Tensor:
    """Scores less their row's mean: what losses and predictions depend on."""
    return scores.double() - scores.double().mean(1, keepdim=True)


def scorer_of(model: Any, tokenizer: Any) -> Scorer:
    return Scorer(model, tokenizer)


# ----------------------------------------------------------------------- the same as MeZO's scoring


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("prompt", PROMPTS, ids=["one-token", "multi-token", "after-newline"])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_losses_and_predictions_are_those_of_mezo(name: str, prompt: Prompt, batch: str) -> None:
    """Right padding, one forward a row and label rows alone give the numbers of the textbook."""
    model, tokenizer = tiny(name)
    rows = BATCHES[batch]
    encoded = encode(rows, prompt, tokenizer, 256)
    assert encoded[0].shares_prefix == (prompt is not MULTI_TOKEN)
    scorer = scorer_of(model, tokenizer)
    expected = mezo_scores(model, tokenizer, rows, prompt, 256)
    scores = scorer.scores(encoded)
    torch.testing.assert_close(centred(scores), centred(expected), rtol=0, atol=FP32)
    assert scores.dtype == torch.float32
    assert scores.argmax(1).tolist() == expected.argmax(1).tolist()
    loss = mezo_loss(expected, rows)
    torch.testing.assert_close(scorer.loss(encoded), loss, rtol=0, atol=FP32)
    assert centred(expected).abs().max() > 0.1  # there is something to get wrong


@pytest.mark.parametrize("prompt", PROMPTS, ids=["one-token", "multi-token", "after-newline"])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_losses_are_those_of_mezo_in_bfloat16(name: str, prompt: Prompt) -> None:
    """Scores below fp32 are taken from the same logits, softmax and means in fp32."""
    model, tokenizer = tiny(name, torch.bfloat16)
    encoded = encode(MIXED, prompt, tokenizer, 256)
    scorer = scorer_of(model, tokenizer)
    expected = mezo_scores(model, tokenizer, MIXED, prompt, 256)
    scores = scorer.scores(encoded)
    assert scores.dtype == scorer.loss(encoded).dtype == torch.float32
    torch.testing.assert_close(centred(scores), centred(expected), rtol=0, atol=BF16)
    torch.testing.assert_close(scorer.loss(encoded), mezo_loss(expected, MIXED), rtol=0, atol=BF16)


@pytest.mark.parametrize("prompt", [ONE_TOKEN, MULTI_TOKEN], ids=["one-token", "multi-token"])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_long_prompts_lose_tokens_on_the_left_but_keep_the_bos(name: str, prompt: Prompt) -> None:
    """Of a prompt that is too long the end is kept, behind the BOS where the tokenizer adds one."""
    model, tokenizer = tiny(name)
    encoded = encode(MIXED, prompt, tokenizer, 24)
    whole = encode(MIXED, prompt, tokenizer, 256)
    assert [c.truncated for c in encoded] == [max(map(len, c.full)) > 24 for c in whole]
    assert 0 < sum(c.truncated for c in encoded) < len(encoded)
    for cut, full in zip(encoded, whole, strict=True):
        for ids, all_ids in zip(cut.full, full.full, strict=True):
            assert len(ids) == min(24, len(all_ids))
            assert ids[-20:] == all_ids[-20:]
            assert (ids[0] == tokenizer.bos_token_id) == (name == "tiny-opt")
    expected = mezo_scores(model, tokenizer, MIXED, prompt, 24)
    scores = scorer_of(model, tokenizer).scores(encoded)
    torch.testing.assert_close(centred(scores), centred(expected), rtol=0, atol=FP32)
    # ... and the cut is felt: the whole prompts score differently.
    uncut = mezo_scores(model, tokenizer, MIXED, prompt, 256)
    assert (centred(uncut) - centred(expected)).abs().max() > 1e-2


@pytest.mark.parametrize("prompt", [ONE_TOKEN, MULTI_TOKEN], ids=["one-token", "multi-token"])
@pytest.mark.parametrize("name", TINY)
def test_gradients_are_those_of_mezos_loss(name: str, prompt: Prompt) -> None:
    """Backpropagation through the label rows alone reaches every parameter, the tied head too."""
    model, tokenizer = tiny(name)
    scorer_of(model, tokenizer).loss(encode(MIXED, prompt, tokenizer, 256)).backward()
    ours = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    mezo_loss(mezo_scores(model, tokenizer, MIXED, prompt, 256), MIXED).backward()
    for key, parameter in model.named_parameters():
        # Gradients of size 1e-3 to 1, sums of 100 terms in another order.
        torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-4, atol=1e-5)
    assert all(grad.abs().max() > 1e-4 for key, grad in ours.items() if "k_proj.bias" not in key)


@torch.no_grad()
def test_single_token_labels_after_different_prefixes_are_scored_one_by_one() -> None:
    """One token each is not enough for one forward: the tokens before must be the same."""
    model, tokenizer = tiny("tiny-llama")
    row = Candidates(((40, 41, 290), (50, 51, 291)), (1, 1), label=0, truncated=False)
    assert not row.shares_prefix
    expected = [
        model(torch.tensor([ids[:-1]])).logits[0, -1].log_softmax(-1)[ids[-1]] for ids in row.full
    ]
    scores = scorer_of(model, tokenizer).scores([row])[0]
    torch.testing.assert_close(scores, torch.stack(expected), rtol=0, atol=FP32)


@torch.no_grad()
def test_labels_that_differ_between_rows_are_scored_one_by_one() -> None:
    """A batch whose rows end in other label tokens is no batch for one set of label rows."""
    model, tokenizer = tiny("tiny-opt")
    rows = rows_of([4, 6])
    flipped = Prompt(ONE_TOKEN.template, ("positive", "negative"))
    both = [
        *encode(rows[:1], ONE_TOKEN, tokenizer, 256),
        *encode(rows[1:], flipped, tokenizer, 256),
    ]
    expected = torch.cat(
        [
            mezo_scores(model, tokenizer, rows[:1], ONE_TOKEN, 256),
            mezo_scores(model, tokenizer, rows[1:], flipped, 256),
        ]
    )
    scores = scorer_of(model, tokenizer).scores(both)
    torch.testing.assert_close(centred(scores), centred(expected), rtol=0, atol=FP32)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any, list[Row], Prompt]:
    """The embedded model, 8 short rows of the embedded task and its first prompt."""
    cache = fetch.cache_dir()
    try:
        task = load_task(node("task", "rotten_tomatoes"), data_seed=0, cache=cache)
        cfg = node("model", "smollm2-135m")
        loaded = load_model(cfg, dtype=torch.float32, device=torch.device("cpu"), cache=cache)
    except UserError as error:
        pytest.skip(f"the embedded model or its sentences cannot be had here: {error}")
    short = sorted(task.train[:100], key=lambda row: len(row.fields["text"]))
    return *loaded, short[4:12], task.prompts[0]


@pytest.mark.parametrize("labels", [None, ("not good", "splendid")], ids=["one-token", "multi"])
@torch.no_grad()
def test_losses_of_the_embedded_model_are_those_of_mezo(
    smollm2: tuple[Any, Any, list[Row], Prompt], labels: tuple[str, str] | None
) -> None:
    """Thirty real layers on eight real sentences, one-token labels and longer ones."""
    model, tokenizer, rows, prompt = smollm2
    if labels is not None:
        rows, prompt = rows[:3], Prompt(prompt.template, labels)
    encoded = encode(rows, prompt, tokenizer, 2048)
    assert all(c.shares_prefix == (labels is None) for c in encoded)
    scorer = scorer_of(model, tokenizer)
    expected = mezo_scores(model, tokenizer, rows, prompt, 2048)
    scores = scorer.scores(encoded)
    # Logits of size 20 are 2e-6 apart; thirty layers of sums in another order, some 5e-6.
    torch.testing.assert_close(centred(scores), centred(expected), rtol=0, atol=5e-5)
    assert scores.argmax(1).tolist() == expected.argmax(1).tolist()
    loss = mezo_loss(expected, rows)
    torch.testing.assert_close(scorer.loss(encoded), loss, rtol=0, atol=5e-5)


# --------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("prompt", [ONE_TOKEN, MULTI_TOKEN], ids=["one-token", "multi-token"])
@torch.no_grad()
def test_a_loss_in_two_parts_is_the_loss_of_the_whole(
    prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splitting a batch by length on a CPU changes its cost and not its loss."""
    model, tokenizer = tiny("tiny-llama")
    encoded = encode(MIXED, prompt, tokenizer, 256)
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    scorer = scorer_of(model, tokenizer)
    monkeypatch.setattr(prefix_cache, "SECOND_PASS_TOKENS", 10**6)  # no prefix runs first
    split = scorer.loss(encoded)
    assert len(widths) == 2
    assert widths[0] > widths[1]
    monkeypatch.setattr(scoring, "split_by_length", lambda batch: [batch])
    whole = scorer.loss(encoded)
    assert len(widths) == 3
    # Sums of 7 losses of size 1 in another order.
    torch.testing.assert_close(split, whole, rtol=0, atol=2e-6)


def test_a_split_keeps_every_row_and_saves_what_it_promises() -> None:
    """Parts hold each row once and together a sixth fewer padded tokens than the whole, or none."""
    tokenizer = tiny("tiny-llama")[1]
    for lengths in ([1, 12, 3, 30, 7, 2, 19], [40, 1, 1, 1], [5, 5, 5, 6], [9], [30, 28, 25, 20]):
        encoded = encode(rows_of(lengths), ONE_TOKEN, tokenizer, 256)
        width = [len(c.full[0]) for c in encoded]
        parts = candidates.split_by_length(encoded)
        assert sorted(map(id, encoded)) == sorted(id(c) for part in parts for c in part)
        cost = sum(len(part) * max(len(c.full[0]) for c in part) for part in parts)
        best = min(
            k * max(width) + (len(width) - k) * sorted(width, reverse=True)[k]
            for k in range(len(width))
        )
        whole = len(width) * max(width)
        assert cost == (best if best <= whole * 5 / 6 else whole)


@pytest.mark.parametrize("prompt", [ONE_TOKEN, MULTI_TOKEN], ids=["one-token", "multi-token"])
def test_scores_of_many_rows_come_back_in_their_order(
    prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of like length are told apart by the row numbers beside them; none has gradients."""
    monkeypatch.setattr(scoring, "EVAL_TOKENS", 100)
    monkeypatch.setattr(prefix_cache, "SECOND_PASS_TOKENS", 10**6)  # no prefix runs first
    model, tokenizer = tiny("tiny-llama")
    encoded = encode(MIXED, prompt, tokenizer, 256)
    calls: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    scorer = scorer_of(model, tokenizer)
    found: dict[int, Tensor] = {}
    for chosen, batch in scorer.score_all(encoded):
        assert len(chosen) == len(batch)
        assert not batch.requires_grad
        found |= dict(zip(chosen, batch, strict=True))
    assert sorted(found) == list(range(len(MIXED)))
    assert 1 < len(calls) < len(MIXED)
    assert scorer.num_forwards == len(calls)
    of_one_row = 1 if prompt is ONE_TOKEN else len(prompt.labels)
    # Rows are counted as if their candidates shared the prefix.
    assert all(n * width <= 100 * of_one_row or n == of_one_row for n, width in calls)
    monkeypatch.undo()
    with torch.no_grad():
        for i, one in enumerate(encoded):
            alone = scorer.scores([one])[0]
            torch.testing.assert_close(found[i], alone, rtol=0, atol=FP32)


# ------------------------------------------------------------------------- memory that is too small


def with_memory_for(
    rows: int, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], list[str]]:
    """How many rows are tried at once, in a scorer that halves; and what it says."""
    tried, said = list[int](), list[str]()

    def limited(real: Callable[..., Any]) -> Callable[..., Any]:
        def computed(batch: Sequence[Candidates]) -> Any:
            tried.append(len(batch))
            if len(batch) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return real(batch)

        return computed

    for name in ("scores", "features", "generate"):
        monkeypatch.setattr(scorer, name, limited(getattr(scorer, name)))
    scorer.halving = {name: Halving(said.append) for name in ("scores", "answers")}
    return tried, said


@pytest.mark.parametrize("what", ["score_all", "features_all", "generate_all", "options"])
def test_a_batch_that_is_too_large_is_halved_and_comes_back_as_one(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the batches of ample memory; what was too large once is not tried again."""
    model, tokenizer = tiny("tiny-llama")
    kinds: dict[str, tuple[Sequence[Row], Prompt, str]] = {
        "options": (CHOICE_ROWS, CHOICE, "choice"),
        "generate_all": (ANSWER_ROWS * 3, ANSWER, "generation"),
    }
    rows, prompt, kind = kinds.get(what, (MIXED, ONE_TOKEN, "classification"))
    encoded = encode(rows, prompt, tokenizer, 256, kind, 8)
    monkeypatch.setattr(scoring, "EVAL_TOKENS", 4000)
    name = "score_all" if what == "options" else what
    scorer = scorer_of(model, tokenizer)
    ample = list(getattr(scorer, name)(encoded))
    tried, said = with_memory_for(2, scorer, monkeypatch)
    for again in (False, True):
        found = list(getattr(scorer, name)(encoded))
        assert [chosen for chosen, _ in found] == [chosen for chosen, _ in ample]
        for (_, mine), (_, theirs) in zip(found, ample, strict=True):
            if name == "generate_all":
                assert mine == theirs
            else:
                torch.testing.assert_close(mine, theirs, rtol=0, atol=FP32)
        assert (max(tried) > 2) != again
        assert len(said) == 1
        tried.clear()
    (most,) = scorer.most_at_once.values()
    sizes = [len(row.context) + 8 if name == "generate_all" else row.num_tokens for row in encoded]
    assert most <= 3 * max(sizes)
    first = len(ample[0][0])
    assert f"out of memory with {first} rows at once: " in said[0]
    assert f"at most {most} tokens in a forward" in said[0]


def test_a_row_that_does_not_fit_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny("tiny-llama")
    scorer = scorer_of(model, tokenizer)
    with_memory_for(0, scorer, monkeypatch)
    encoded = encode(MIXED, ONE_TOKEN, tokenizer, 256)
    with pytest.raises(
        UserError, match=r"^the memory is too small for a forward over one row .*\.$"
    ):
        list(scorer.score_all(encoded))


def test_a_step_is_told_that_the_memory_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which halves its own rows, as those of every loss."""
    model, tokenizer = tiny("tiny-llama")
    scorer = scorer_of(model, tokenizer)
    with_memory_for(2, scorer, monkeypatch)
    encoded = encode(ANSWER_ROWS, ANSWER, tokenizer, 256, "generation", 8)
    with pytest.raises(torch.OutOfMemoryError):
        scorer.objective(encoded, "f1")


# ------------------------------------------------------------------------------- counting, refusing


@pytest.mark.parametrize("num_queries", [1, 3])
def test_forwards_counted_are_forwards_made(num_queries: int) -> None:
    """A loss is one pass over its batch; a step of MeZO makes, and records, two a query.

    Those of the self-check and of the choice of an executor, once a run, are apart.
    """
    model, tokenizer = tiny("tiny-llama")
    encoded = encode(rows_of([5, 5, 5]), ONE_TOKEN, tokenizer, 256)  # equal lengths: no split
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    scorer = scorer_of(model, tokenizer)
    method = MeZO(model, lr=1e-6, eps=1e-3, num_queries=num_queries, backend="eager")
    method.self_check(lambda: scorer.loss(encoded))
    method.choose_executor(lambda: scorer.loss(encoded))
    scorer.num_forwards = 0
    calls.clear()
    record = method.step(lambda: scorer.loss(encoded))
    assert len(calls) == scorer.num_forwards == record.num_forwards == 2 * num_queries
    with torch.no_grad():
        scorer.loss(encode(MIXED, ONE_TOKEN, tokenizer, 256))  # in two parts
    assert scorer.num_forwards == 2 * num_queries + 1


@pytest.mark.parametrize(
    ("labels", "max_length", "says"),
    [
        (("", "great"), 256, r"'' takes 0 tokens"),
        (("terrible", "  "), 256, r"'' takes 0 tokens"),
        (("terrible", "great great great great"), 4, r"' great great great great' takes 4 tokens"),
    ],
    ids=["empty", "blank", "too-long"],
)
def test_label_words_that_cannot_be_scored_are_refused(
    labels: tuple[str, str], max_length: int, says: str
) -> None:
    """A label that adds no token, or leaves no room for one before it, is named in one sentence."""
    tokenizer = tiny("tiny-opt")[1]
    with pytest.raises(UserError, match=says) as caught:
        encode(rows_of([3]), Prompt("{text}. It was", labels), tokenizer, max_length)
    assert "task.labels" in str(caught.value)


def test_a_label_is_told_from_its_context_by_the_tokens_it_adds() -> None:
    """Option lengths are tokens(full) - tokens(context), as in MeZO, BOS or not."""
    for name in TINY:
        tokenizer = tiny(name)[1]
        (row,) = encode(rows_of([3]), MULTI_TOKEN, tokenizer, 256)
        assert row.num_option == (2, 1)
        decode: Callable[[Sequence[int]], str] = tokenizer.decode
        ends = [decode(ids[-n:]) for ids, n in zip(row.full, row.num_option, strict=True)]
        assert ends == [" terrible bad", " great"]


# ---------------------------------------------------------------------------- choice and generation

CHOICE = Prompt("Story: {text}\nThen")
# As many options as a row likes, of one to many tokens; several may be right.
OPTIONS = [
    ("the hero was bright", "it was stale and dull and clumsy", "Yes"),
    ("No", "Maybe"),
    ("great plot", "bad pace", "good score", "awful joke"),
    ("It was the end.",),
    ("a b", "terrible"),
]
CHOICE_ROWS = [
    Row({"text": text.fields["text"]}, len(options) - 1, str(i), options, frozenset({0}))
    for i, (text, options) in enumerate(zip(rows_of([9, 30, 4, 12, 17]), OPTIONS, strict=True))
]
ANSWER = Prompt("Context: {text}\nAnswer:")
ANSWER_ROWS = [
    Row(text.fields, 0, str(i), answers=answers)
    for i, (text, answers) in enumerate(
        zip(
            rows_of([3, 14, 8]),
            [("lovely warm pace", "x"), ("dull",), ("the cast, in 1999",)],
            strict=True,
        )
    )
]


def mezo_choice(model: Any, tokenizer: Any, max_length: int = 256) -> list[Tensor]:
    """Log-probabilities of the tokens of every option of `CHOICE_ROWS`, row after row."""
    texts = [pair for row in CHOICE_ROWS for pair in mezo_texts(row, CHOICE, row.options)]
    return mezo_log_p(model, tokenizer, texts, max_length)


def of_rows(values: Sequence[Any]) -> list[list[Any]]:
    """The values of `CHOICE_ROWS`' options, a list a row."""
    rest = iter(values)
    return [[next(rest) for _ in options] for options in OPTIONS]


@pytest.fixture(params=["shared", "apart"])
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Common prefixes run first wherever that saves a token, or never."""
    shared: bool = request.param == "shared"
    monkeypatch.setattr(prefix_cache, "SECOND_PASS_TOKENS", 0 if shared else 10**6)
    return shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_scores_of_choices_are_those_of_mezo(name: str, dtype: torch.dtype, sharing: bool) -> None:
    """Mean log-probabilities as such, not up to a constant, of as many options as a row has."""
    model, tokenizer = tiny(name, dtype)
    calls = tokens_of(model)
    scores = scorer_of(model, tokenizer).scores(
        encode(CHOICE_ROWS, CHOICE, tokenizer, 256, "choice")
    )
    assert len(calls) == (2 if sharing else 1)
    expected = of_rows([p.mean() for p in mezo_choice(model, tokenizer)])
    assert scores.dtype == torch.float32
    for row, row_expected in zip(scores, expected, strict=True):
        found, beyond = row[: len(row_expected)], row[len(row_expected) :]
        atol = FP32 if dtype == torch.float32 else BF16
        torch.testing.assert_close(found, torch.stack(row_expected), rtol=0, atol=atol)
        assert beyond.tolist() == [-math.inf] * (4 - len(row_expected))
        if dtype == torch.float32:
            assert row.argmax() == torch.stack(row_expected).argmax()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_multi_token_labels_behind_a_shared_prefix(
    name: str, dtype: torch.dtype, sharing: bool
) -> None:
    """Classification by longer labels is MeZO's too where the prompt runs once for all labels."""
    model, tokenizer = tiny(name, dtype)
    calls = tokens_of(model)
    scores = scorer_of(model, tokenizer).scores(encode(MIXED, MULTI_TOKEN, tokenizer, 256))
    assert len(calls) == (2 if sharing else 1)
    expected = mezo_scores(model, tokenizer, MIXED, MULTI_TOKEN, 256)
    atol = FP32 if dtype == torch.float32 else BF16
    torch.testing.assert_close(scores, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_cut_prompts_of_choices_are_those_of_mezo(name: str, sharing: bool) -> None:
    """Options of different lengths cut their prompt at different places: nothing is shared then."""
    model, tokenizer = tiny(name)
    # The longest option has 20 tokens.
    encoded = encode(CHOICE_ROWS, CHOICE, tokenizer, 40, "choice")
    assert {c.truncated for c in encoded} == {True, False}
    scores = scorer_of(model, tokenizer).scores(encoded)
    expected = torch.stack([p.mean() for p in mezo_choice(model, tokenizer, 40)])
    torch.testing.assert_close(scores[scores.isfinite()], expected, rtol=0, atol=FP32)


def tokens_of(model: Any) -> list[int]:
    """Filled with the padded tokens of every forward."""
    tokens: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return tokens


@pytest.mark.parametrize("kind", ["choice", "generation"])
@pytest.mark.parametrize("name", TINY)
def test_lm_losses_and_gradients_are_those_of_mezo(name: str, kind: str) -> None:
    """-log p over the gold candidates' tokens, mean of the tokens and not of the rows."""
    model, tokenizer = tiny(name)
    if kind == "choice":
        rows, prompt = CHOICE_ROWS, CHOICE
        texts = [mezo_texts(row, prompt, row.options)[row.label] for row in rows]
    else:
        rows, prompt = ANSWER_ROWS, ANSWER
        contexts = [prompt.template.format(**row.fields) for row in rows]
        texts = [(c, f"{c} {r.answers[0]}\n") for c, r in zip(contexts, rows, strict=True)]
    encoded = encode(rows, prompt, tokenizer, 250, kind)
    scorer = scorer_of(model, tokenizer)
    loss = scorer.loss(encoded)
    loss.backward()
    ours = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    expected = -torch.cat(mezo_log_p(model, tokenizer, texts, 250)).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=FP32)
    for key, parameter in model.named_parameters():
        # Gradients of size 1e-3 to 1, sums of 100 terms in another order.
        torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(scorer.loss(encoded), expected, rtol=0, atol=FP32)
        by_row = [scorer.loss([c]) for c in encoded]
    counts = torch.tensor([float(c.num_option[c.gold]) for c in encoded])
    assert len(set(counts.tolist())) > 1
    weighted = (torch.stack(by_row) * counts).sum() / counts.sum()
    torch.testing.assert_close(loss, weighted, rtol=0, atol=FP32)
    assert (torch.stack(by_row).mean() - loss).abs() > 1e-2  # the mean of the rows is another


@torch.no_grad()
def test_an_lm_loss_in_bfloat16_is_that_of_mezo() -> None:
    """Of the same bf16 logits, softmax and mean in fp32."""
    model, tokenizer = tiny("tiny-llama", torch.bfloat16)
    log_p = of_rows(mezo_choice(model, tokenizer))
    expected = -torch.cat([p[row.label] for p, row in zip(log_p, CHOICE_ROWS, strict=True)]).mean()
    scorer = scorer_of(model, tokenizer)
    loss = scorer.loss(encode(CHOICE_ROWS, CHOICE, tokenizer, 256, "choice"))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=BF16)


@torch.no_grad()
def test_the_output_layer_sees_only_the_positions_that_are_read() -> None:
    """As many rows go into the head as option tokens come out, whatever the padding."""
    model, tokenizer = tiny("tiny-llama")
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape)))
    encoded = encode(CHOICE_ROWS, CHOICE, tokenizer, 256, "choice")
    scorer = scorer_of(model, tokenizer)
    scorer.loss(encoded)
    assert sum(n for _, n, _ in shapes) == sum(c.num_option[c.gold] for c in encoded)
    assert {(one, vocabulary) for one, _, vocabulary in shapes} == {(1, len(tokenizer))}


# ------------------------------------------------------------------------------- shared prefixes


class Moved:
    """Moves every parameter by noise of its own, the same each time; see zo.Direction."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(3)
        self.shift = {
            id(p): 0.05 * torch.randn(p.shape, generator=generator) for p in model.parameters()
        }

    def whole(self, parameter: Tensor, out: Tensor) -> None:
        out.copy_((parameter.detach() + self.shift[id(parameter)]).view(-1))

    def rows(self, parameter: Tensor, rows: Tensor) -> Tensor:
        return (parameter.detach() + self.shift[id(parameter)])[rows]


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_probe_moves_prefix_and_options_alike(name: str, sharing: bool) -> None:
    """Scores under a functional probe are those of the weights moved in place."""
    model, tokenizer = tiny(name)
    scorer = scorer_of(model, tokenizer)
    encoded = encode(CHOICE_ROWS, CHOICE, tokenizer, 256, "choice")
    plain = scorer.scores(encoded)
    mover = Moved(model)
    with FunctionalProbe(model, list(model.parameters())).at(mover):
        probed, probed_loss = scorer.scores(encoded), scorer.loss(encoded)
    for parameter in model.parameters():
        parameter.add_(mover.shift[id(parameter)])
    expected, loss = scorer.scores(encoded), scorer.loss(encoded)
    torch.testing.assert_close(probed, expected, rtol=0, atol=FP32)
    torch.testing.assert_close(probed_loss, loss, rtol=0, atol=FP32)
    assert (probed - plain)[plain.isfinite()].abs().min() > 1e-3


def test_a_prefix_runs_first_only_without_gradients_and_where_it_saves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long prompts with many options: fewer tokens by half; else one pass over all."""
    model, tokenizer = tiny("tiny-llama")
    scorer = scorer_of(model, tokenizer)
    tokens = tokens_of(model)
    long = [Row({"text": "film " * 40}, 0, "0", tuple("abcdefgh"))]
    (encoded,) = encode(long, CHOICE, tokenizer, 256, "choice")
    scorer.scores([encoded])
    with torch.no_grad():
        scorer.scores([encoded])
        width = encoded.width - 1  # the last token is never read
        assert tokens == [8 * width, encoded.prefix, 8 * (width - encoded.prefix)]
        assert sum(tokens[1:]) < tokens[0] / 2
        # The second pass must save more than it costs.
        saved = tokens[0] - sum(tokens[1:])
        for cost, calls in ((saved - 1, 2), (saved, 1)):
            monkeypatch.setattr(prefix_cache, "SECOND_PASS_TOKENS", cost)
            tokens.clear()
            scorer.scores([encoded])
            assert len(tokens) == calls
        # A loss of one candidate a row has nothing to share.
        monkeypatch.setattr(prefix_cache, "SECOND_PASS_TOKENS", 0)
        tokens.clear()
        scorer.loss([encoded])
        assert len(tokens) == 1


def architecture(config: PretrainedConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto: Any = AutoModelForCausalLM
        return auto.from_config(config).eval()


SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        (MistralConfig(**SIZES, num_key_value_heads=2, intermediate_size=64), True),
        (
            MistralConfig(**SIZES, num_key_value_heads=4, intermediate_size=64, sliding_window=8),
            False,
        ),
        (Gemma3TextConfig(**SIZES, head_dim=8, intermediate_size=64, sliding_window=8), False),
        (Gemma3TextConfig(**SIZES, head_dim=8, intermediate_size=64), True),
        (Qwen2Config(**SIZES, num_key_value_heads=2, intermediate_size=64), True),
        (BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0), False),
    ],
    ids=["mistral", "mistral-window", "gemma3-window", "gemma3", "qwen2", "bloom"],
)
@torch.no_grad()
def test_models_whose_cache_would_not_be_exact_run_every_candidate_apart(
    config: PretrainedConfig, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window shorter than the prompt, or no positions to name: no sharing, the same numbers."""
    model, tokenizer = architecture(config), tiny("tiny-llama")[1]
    scorer = scorer_of(model, tokenizer)
    encoded = encode(CHOICE_ROWS, CHOICE, tokenizer, 256, "choice")
    tokens = tokens_of(model)
    monkeypatch.setattr(prefix_cache, "SECOND_PASS_TOKENS", 0)
    scores = scorer.scores(encoded)
    assert len(tokens) == (2 if shares else 1)
    alone = [
        model(input_ids=torch.tensor([ids]))
        .logits[0]
        .log_softmax(-1)[range(len(ids) - 1), ids[1:]][-n:]
        for c in encoded
        for ids, n in zip(c.full, c.num_option, strict=True)
    ]
    expected = torch.stack([p.mean() for p in alone])
    torch.testing.assert_close(scores[scores.isfinite()], expected, rtol=0, atol=FP32)


# ----------------------------------------------------------------------------------- masked models


@pytest.fixture(scope="module")
def roberta() -> tuple[Any, Any]:
    """Two random layers that look both ways, and the built-in tokenizer with <s>, </s>, <mask>."""
    tokenizer: Any = byte_tokenizer(add_bos=True)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    config = RobertaConfig(
        **{**SIZES, "vocab_size": len(tokenizer)},
        intermediate_size=64,
        max_position_embeddings=200,
        type_vocab_size=1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RobertaForMaskedLM(config).eval(), tokenizer


MASKED = Prompt("{text} It was {mask} .", ("bad", "good", "Maybe"))


def masked_scores(model: Any, tokenizer: Any, rows: Sequence[Row]) -> Tensor:
    """Log-probability of each label word at the mask, row by row, over the whole vocabulary."""
    words = [tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in MASKED.labels]
    found = []
    for row in rows:
        ids = tokenizer(f"{row.fields['text']} It was <mask> .")["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        logits = model(torch.tensor([ids])).logits[0, ids.index(tokenizer.mask_token_id)]
        found.append(logits.log_softmax(-1)[words])
    return torch.stack(found)


def test_masked_models_are_scored_at_the_mask(roberta: tuple[Any, Any]) -> None:
    """One sequence a row, padding hidden, label rows alone: losses and gradients of it all."""
    model, tokenizer = roberta
    encoded = encode(MIXED, MASKED, tokenizer, 180)
    scorer = scorer_of(model, tokenizer)
    expected = masked_scores(model, tokenizer, MIXED)
    shapes: list[tuple[int, ...]] = []
    head = model.lm_head.decoder.register_forward_hook(
        lambda _, args, out: shapes.append(tuple(out.shape))
    )
    scores = scorer.scores(encoded)
    assert shapes == [(1, len(MIXED), 3)]
    head.remove()
    torch.testing.assert_close(centred(scores), centred(expected), rtol=0, atol=FP32)
    assert centred(expected).abs().max() > 0.1
    model.zero_grad()
    loss = scorer.loss(encoded)
    loss.backward()
    ours = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    mezo_loss(expected, MIXED).backward()
    torch.testing.assert_close(loss, mezo_loss(expected, MIXED), rtol=0, atol=FP32)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-4, atol=1e-5)
    model.zero_grad()


@torch.no_grad()
def test_masked_models_under_a_probe(roberta: tuple[Any, Any]) -> None:
    """The tied decoder's label rows are moved as the whole would be."""
    model, tokenizer = copy.deepcopy(roberta[0]), roberta[1]
    scorer = scorer_of(model, tokenizer)
    encoded = encode(MIXED, MASKED, tokenizer, 180)
    mover = Moved(model)
    with FunctionalProbe(model, list(model.parameters())).at(mover):
        probed = scorer.scores(encoded)
    for parameter in model.parameters():
        parameter.add_(mover.shift[id(parameter)])
    torch.testing.assert_close(probed, scorer.scores(encoded), rtol=0, atol=FP32)


@pytest.mark.parametrize("template", ["{text} It was {mask} .", "{mask} : {text}", "{mask} {text}"])
def test_a_cut_masked_prompt_keeps_its_ends_and_its_mask(
    roberta: tuple[Any, Any], template: str
) -> None:
    """Words go from the left; where the mask stands there, from the right."""
    tokenizer = roberta[1]
    prompt = Prompt(template, MASKED.labels)
    for row, whole, cut in zip(
        MIXED,
        encode(MIXED, prompt, tokenizer, 180),
        encode(MIXED, prompt, tokenizer, 20),
        strict=True,
    ):
        assert whole.mask is not None
        assert cut.mask is not None
        assert cut.truncated == (len(whole.context) > 20)
        assert len(cut.context) == min(20, len(whole.context))
        assert cut.context[0] == tokenizer.bos_token_id
        assert cut.context[-1] == tokenizer.eos_token_id
        assert cut.context[cut.mask] == tokenizer.mask_token_id
        assert [ids[cut.mask] for ids in cut.full] == [ids[whole.mask] for ids in whole.full]
        text = tokenizer.decode(cut.context, skip_special_tokens=True).split(" : ")[-1]
        assert text.strip() in template.format(**row.fields, mask="").replace("  ", " ") or (
            "It was" in text
        )


def test_masked_prompts_that_do_not_fit_are_refused(roberta: tuple[Any, Any]) -> None:
    """Each in one sentence that names what to change."""
    masked, causal = roberta[1], tiny("tiny-llama")[1]

    def says(message: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            encode(
                changes.get("rows", MIXED),
                Prompt(changes.get("template", MASKED.template), changes.get("labels", ("bad",))),
                changes.get("tokenizer", masked),
                changes.get("max_length", 180),
                changes.get("kind", "classification"),
            )
        assert "\n" not in str(caught.value)

    says(r"task\.prompt=.*tokenizer has none", tokenizer=causal)
    says(r"'splendid' takes 9 tokens.*task\.labels", labels=("bad", "splendid"))
    says(r"'bad ' takes \d tokens.*task\.labels", labels=("bad", "bad "))
    says(r"task\.prompt=.*task\.kind=classification", kind="choice")
    says(r"must have one \{mask\}, not 2", template="{mask} {text} {mask}")
    says(r"row x: field 'text' holds '<mask>'", rows=[Row({"text": "a <mask>"}, 0, "x")])
    says(r"model\.max_length=2", max_length=2)


@torch.no_grad()
def test_a_prompt_for_the_other_family_of_models_is_refused(roberta: tuple[Any, Any]) -> None:
    """A masked model would take a prompt without a mask, and a causal one its mask's tokens."""
    model, tokenizer = roberta
    masked = encode(MIXED, MASKED, tokenizer, 180)
    plain = encode(MIXED, ONE_TOKEN, tokenizer, 180)
    asked = encode(ANSWER_ROWS, ANSWER, tokenizer, 180, "generation", 8)
    causal = scorer_of(tiny("tiny-llama")[0], tokenizer)
    filling = scorer_of(model, tokenizer)
    for call in (causal.loss, causal.scores):
        with pytest.raises(UserError, match=r"task\.prompt has a \{mask\}.*model="):
            call(masked)
    for call, batch in ((filling.loss, plain), (filling.scores, plain), (filling.generate, asked)):
        with pytest.raises(UserError, match=r"task\.prompt has no \{mask\}.*task\.prompt="):
            call(batch)  # type: ignore[operator]


# --------------------------------------------------------------------------------------- encoding


class Merges:
    """A tokenizer of characters that takes two newlines in a row as one token."""

    bos_token_id = None

    def __call__(self, texts: list[str], verbose: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in t.replace("\n\n", "\0")] for t in texts]}


def test_a_candidate_merged_with_its_context_begins_where_the_tokens_differ() -> None:
    """Counted, so that it can be said; a candidate that only extends its context is none."""
    prompt = Prompt("{text}\n", option="{option}")
    rows = [Row({"text": "ab"}, 0, "0", ("\nc", "cd"))]
    (row,) = encode(rows, prompt, Merges(), 99, "choice")
    assert row.num_merged == 1
    assert row.num_option == (2, 2)
    assert [bytes(ids[-n:]) for ids, n in zip(row.full, row.num_option, strict=True)] == [
        b"\0c",
        b"cd",
    ]
    assert row.prefix == 1  # "a": the "b" before the first option token runs with the options


@pytest.mark.parametrize(
    ("kind", "row", "changes", "says"),
    [
        ("choice", Row({"text": "a"}, 0, "r7", ("x" * 90,)), {}, r"row r7: ' x+' takes \d+ tokens"),
        ("choice", Row({"text": "a"}, 0, "r7", ("", "b")), {}, "row r7: '' takes 0 tokens"),
        ("choice", Row({"text": ""}, 0, "r7", ("a",)), {"template": "{text}"}, "row r7: no token"),
        ("generation", Row({"text": "a"}, 0, "r7", answers=("x" * 90,)), {}, r"row r7: ' x+\\n'"),
        (
            "generation",
            Row({"text": "a"}, 0, "r7", answers=("b",)),
            {"max_new_tokens": 63},
            r"task\.max_new_tokens=63 .* model\.max_length=64",
        ),
        ("classification", Row({"text": "a"}, 0, "r7"), {}, r"same tokens .* task\.labels"),
    ],
    ids=["too-long", "empty", "no-context", "answer", "no-room", "same"],
)
def test_candidates_that_cannot_be_scored_are_refused(
    kind: str, row: Row, changes: dict[str, Any], says: str
) -> None:
    """In one sentence with the row or the key to change."""
    template = changes.pop("template", "{text}\nA:")
    tokenizer = tiny("tiny-llama")[1]
    with pytest.raises(UserError, match=says) as caught:
        encode([row], Prompt(template, ("yes", "yes ")), tokenizer, 64, kind, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TINY)
def test_prompts_of_generation_leave_room_for_the_answer(name: str) -> None:
    """Question and gold answer are cut to the window less the new tokens, behind the BOS."""
    tokenizer = tiny(name)[1]
    whole = encode(ANSWER_ROWS, ANSWER, tokenizer, 256, "generation", 40)
    cut = encode(ANSWER_ROWS, ANSWER, tokenizer, 75, "generation", 40)
    assert [c.truncated for c in cut] == [len(c.full[0]) > 35 for c in whole]
    assert any(c.truncated for c in cut)
    for short, full in zip(cut, whole, strict=True):
        for ids, all_ids in ((short.context, full.context), (short.full[0], full.full[0])):
            assert len(ids) == min(35, len(all_ids))
            assert ids[-30:] == all_ids[-30:]
            assert (ids[0] == tokenizer.bos_token_id) == (name == "tiny-opt")
        end = tokenizer.decode(full.full[0][-full.num_option[0] :])
        assert end == f" {full.answers[0]}\n"
        assert tokenizer.decode(full.context, skip_special_tokens=True).endswith("Answer:")


@torch.no_grad()
def test_rows_without_labels_are_scored_and_not_trained_on() -> None:
    """Neither a label of -1 nor a missing answer stops a prediction."""
    model, tokenizer = tiny("tiny-llama")
    scorer = scorer_of(model, tokenizer)
    hidden = [row._replace(label=-1) for row in MIXED]
    encoded = encode(hidden, ONE_TOKEN, tokenizer, 256)
    labelled = scorer.scores(encode(MIXED, ONE_TOKEN, tokenizer, 256))
    assert torch.equal(scorer.scores(encoded), labelled)
    assert not any(c.is_labelled for c in encoded)
    questions = [row._replace(answers=()) for row in ANSWER_ROWS]
    asked = encode([questions[0], ANSWER_ROWS[1]], ANSWER, tokenizer, 256, "generation", 8)
    assert len(scorer.generate(asked)) == 2
    scores = dict(zip(*next(scorer.score_all(asked)), strict=True))
    assert scores[0].tolist() == [-math.inf]
    assert scores[1].isfinite().all()
    assert scorer.scores(asked[:1]).tolist() == [[-math.inf]]
    for rows in (encoded, asked):
        with pytest.raises(ValueError, match="without a label"):
            scorer.loss(rows)


TASKS = sorted(
    file.stem for file in (CONF / "task").glob("*.yaml") if "prompts:" in file.read_text()
)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_scored_as_mezo_scores_it(
    task: str, dtype: torch.dtype, tolerance: float
) -> None:
    """One prompt per candidate and the whole softmax give the same scores, whatever the task asks.

    The strings of the prompts are compared with the paper's elsewhere; here they are given.
    """
    cfg = node("task", task)
    kind = cfg["kind"]
    model, tokenizer = tiny("tiny-opt", dtype)
    for asked in cfg["prompts"]:
        prompt = Prompt(
            asked["template"], tuple(asked.get("labels", ())), asked.get("option", "{option}")
        )
        names = set(fields_of(prompt.template)) | set(fields_of(prompt.option)) - {"option"}
        rows = [
            Row(
                {name: " ".join([name, "was"] * (1 + i)) for name in names},
                i % 2,
                str(i),
                options=("dull", "lovely and warm", "I do") if kind == "choice" else (),
                answers=("a clever cast", "none") if kind == "generation" else (),
            )
            for i in range(3)
        ]
        encoded = encode(rows, prompt, tokenizer, 256, kind, 50)
        with torch.no_grad():
            ours = Scorer(model, tokenizer).scores(encoded)
            for row, found in zip(rows, ours, strict=True):
                texts = [(prompt.context(row.fields), full) for full in prompt.candidates(row)]
                theirs = torch.stack([p.mean() for p in mezo_log_p(model, tokenizer, texts, 256)])
                assert len(found) == len(theirs)
                if kind == "classification":  # up to a constant of the row
                    found, theirs = found - found.mean(), theirs - theirs.mean()
                torch.testing.assert_close(found, theirs, rtol=0, atol=tolerance)
