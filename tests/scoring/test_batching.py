"""A row's scores and answers do not depend on the rows beside it, whatever the architecture."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from smezo_cli import train
from smezo_cli.cli.verbs import main
from smezo_cli.config.compose import compose
from smezo_cli.methods.mezo import MeZO
from smezo_cli.models.adapter import attach
from smezo_cli.models.tiny import byte_tokenizer
from smezo_cli.run.follower import Follower
from smezo_cli.scoring import measured_batching, prefix_cache
from smezo_cli.scoring.batching import ALONE, Batching, Found
from smezo_cli.scoring.candidates import Candidates, encode
from smezo_cli.scoring.measured_batching import measure, pick
from smezo_cli.scoring.prefix_cache import Held
from smezo_cli.scoring.scorer import Scorer
from smezo_cli.store.schema import is_sound_result
from smezo_cli.tasks import Prompt, Row

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = byte_tokenizer(add_bos=False)
V = len(TOKENIZER)
LLAMA = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GEMMA = LLAMA | {"head_dim": 4, "sliding_window": 8, "query_pre_attn_scalar": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": 8},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {
        "vocab_size": V,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "max_position_embeddings": 256,
    },
    "mpt": {"vocab_size": V, "d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "bloom": {"vocab_size": V, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": V, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    "rwkv": {
        "vocab_size": V,
        "hidden_size": 16,
        "attention_hidden_size": 16,
        "num_hidden_layers": 2,
        "context_length": 256,
    },
    # A model that looks both ways, and is asked without a mask: padding is read like text.
    "bert": {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "is_decoder": False,
    },
}
WORDS = ["the", "film", "was", "dull", "and", "clumsy", "but", "lovely", "warm", "pace"]
TEXTS = [
    " ".join(WORDS[(i * 3 + j) % 10] for j in range(n))
    for i, n in enumerate([2, 12, 3, 30, 7, 2, 19, 5])
]
SAME, NO_CACHE = Batching(), Batching(caches=False)
ONE_LENGTH = Batching(pads=False)


def scorer_of(name: str, prefix: bool = False) -> Scorer:
    """A random model whose attention is not all but uniform, as small first weights leave it."""
    config = CONFIG_MAPPING[name](pad_token_id=0, bos_token_id=1, eos_token_id=2, **MODELS[name])
    config.is_decoder = getattr(config, "is_decoder", False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=2 * p.shape[-1] ** -0.5, generator=generator)
    places = attach(model, {"kind": "prefix", "num_tokens": 3}, 0).num_places if prefix else 0
    return Scorer(model, TOKENIZER, places_before=places)


def rows_of(kind: str) -> list[Candidates]:
    options = [(" a" + " warm" * (i % 4), " dull") for i in range(len(TEXTS))]
    answers = ("dull",) if kind == "generation" else ()
    rows = [
        Row({"text": text}, i % 2, str(i), options=of if kind == "choice" else (), answers=answers)
        for i, (text, of) in enumerate(zip(TEXTS, options, strict=True))
    ]
    labels = (" dull", " warm pace") if kind == "classification" else ()
    return encode(rows, Prompt("{text}", labels=labels), TOKENIZER, 200, kind, 6)


def far(found: Tensor, wanted: Tensor) -> bool:
    both = found.isfinite() & wanted.isfinite()
    return not torch.allclose(found[both], wanted[both], rtol=0, atol=1e-4)


def alone(scorer: Scorer, rows: Sequence[Candidates]) -> Tensor:
    """Scores by a forward a candidate, of a model that is called as its users call it."""
    lines = []
    for row in rows:
        means = []
        for ids, n in zip(row.full, row.num_option, strict=True):
            # Of the last token nothing is asked: a model that looks both ways does not see it.
            logits = scorer.model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
            log_p = logits[-n:].log_softmax(-1)
            means.append(log_p.gather(1, torch.tensor(ids[-n:])[:, None]).mean())
        lines.append(torch.stack(means))
    return torch.stack(lines)


def answered(scorer: Scorer, row: Candidates) -> str:
    """A plain greedy loop over the whole sequence, without a cache."""
    answer: list[int] = []
    for _ in range(row.max_new_tokens):
        ids = torch.tensor([[*row.context, *answer]])
        token = int(scorer.model(ids, use_cache=False).logits[0, -1].argmax())
        if token == TOKENIZER.eos_token_id:
            break
        answer.append(token)
    text: str = TOKENIZER.decode(answer, skip_special_tokens=True)
    return text.partition("\n")[0].strip()


@pytest.mark.parametrize(
    ("name", "prefix", "expected"),
    [
        ("llama", False, SAME),
        ("llama", True, SAME),
        ("bloom", False, SAME),
        ("mamba", False, SAME),
        ("rwkv", False, SAME),
        ("gpt_neo", False, NO_CACHE),
        ("gpt_neo", True, NO_CACHE),
        ("bert", False, Batching(pads=False, caches=False)),
    ],
)
@pytest.mark.parametrize("kind", ["classification", "choice"])
@torch.no_grad()
def test_rows_score_in_a_batch_as_alone(
    name: str, prefix: bool, expected: Batching, kind: str
) -> None:
    """As measured, and no stricter; where something is kept apart, it differed without."""
    scorer, rows = scorer_of(name, prefix), rows_of(kind)
    wanted = alone(scorer, rows)
    if kind == "classification":
        wanted = wanted.log_softmax(1)
    found = measure(scorer, pick(rows, 2000))
    assert found.scores == expected
    assert scorer.batching == SAME  # as it was: only `to` changes it
    for apart in (False, True):
        if apart:
            found.to(scorer)
        scorer.always_caches = True
        scores = scorer.scores(rows)
        if kind == "classification":
            scores = scores.log_softmax(1)
        assert far(scores, wanted) == (expected != SAME and not apart)


@pytest.mark.parametrize(
    ("name", "prefix", "expected"),
    [
        ("llama", False, SAME),
        ("llama", True, SAME),
        ("mistral", False, SAME),
        ("gemma3_text", False, SAME),
        ("mpt", False, SAME),
        ("mamba", False, SAME),
        ("gpt_neo", False, SAME),
        ("gpt_neo", True, ONE_LENGTH),
        ("mistral", True, ONE_LENGTH),
        ("gemma2", True, ONE_LENGTH),
        ("gemma3_text", True, ONE_LENGTH),
        ("mpt", True, ONE_LENGTH),
        ("rwkv", False, ONE_LENGTH),
        ("bert", False, ALONE),
    ],
)
@torch.no_grad()
def test_answers_are_those_of_a_plain_loop(name: str, prefix: bool, expected: Batching) -> None:
    scorer, rows = scorer_of(name, prefix), rows_of("generation")
    found = measure(scorer, pick(rows, 2000))
    assert found.answers == expected
    wanted = [answered(scorer, row) for row in rows]
    assert len(set(wanted)) > 2
    assert (found.difference > 1e-3) == (expected != SAME or name == "gpt_neo")
    found.to(scorer)
    assert scorer.generate(rows) == wanted


@pytest.mark.parametrize("kind", ["classification", "choice"])
def test_a_batch_has_the_loss_the_gradient_and_the_steps_of_its_rows(kind: str) -> None:
    """Where padding is read like text: of one batch, of first-order and of zeroth-order methods."""
    scorer, rows = scorer_of("bert"), rows_of(kind)
    measure(scorer, pick(rows, 2000)).to(scorer)

    def grads(loss: Callable[[], Tensor]) -> tuple[float, Tensor]:
        scorer.model.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        parts = [p.grad.flatten() for p in scorer.model.parameters() if p.grad is not None]
        return value.item(), torch.cat(parts)

    def by_row() -> Tensor:
        sums = [scorer.objective_sum([row]) for row in rows]
        weight = len(rows) if kind == "classification" else sum(r.num_option[r.label] for r in rows)
        return torch.stack(sums).sum() / weight

    (loss, gradient), (wanted, of_rows) = grads(lambda: scorer.loss(rows)), grads(by_row)
    assert loss == pytest.approx(wanted, abs=1e-5)
    assert not far(gradient, of_rows)
    method = MeZO(scorer.model, lr=1e-4, eps=1e-3)
    with torch.no_grad():
        query = method.losses_at(lambda: scorer.loss(rows), 0)
        assert query == pytest.approx(method.losses_at(by_row, 0), abs=1e-5)
    scorer.batching = SAME
    assert scorer.loss(rows).item() != pytest.approx(wanted, abs=1e-3)


def test_sequences_that_share_a_forward() -> None:
    lengths = [3, 5, 3, 4]
    assert Batching().groups(lengths) == [[0, 1, 2, 3]]
    assert ONE_LENGTH.groups(lengths) == [[0, 2], [1], [3]]
    assert ALONE.groups(lengths) == [[0], [1], [2], [3]]


def test_the_rows_that_are_measured_are_of_unlike_length_and_few() -> None:
    rows = rows_of("choice")
    widths = [row.width for row in pick(rows, 2000)]
    assert {min(r.width for r in rows), max(r.width for r in rows)} < set(widths)
    assert len(widths) == measured_batching.MOST_ROWS
    longest = max(row.width * len(row.full) for row in rows)
    assert len(pick(rows, 2 * longest)) == 2
    assert len(pick(rows[:1], 2000)) == 1


def test_a_row_of_many_options_is_measured_by_two_of_them() -> None:
    """They run whole: 77 of them would take more memory than any forward of the run."""
    (row,) = rows_of("choice")[3:4]
    many = replace(
        row,
        full=tuple((*row.full[0], *[7] * k) for k in range(77)),
        num_option=tuple(row.num_option[0] + k for k in range(77)),
    )
    (chosen,) = pick([many], 2000)
    assert chosen.num_option == (row.num_option[0], row.num_option[0] + 76)
    assert chosen.full == (many.full[0], many.full[76])


@torch.no_grad()
def test_what_all_rows_begin_with_is_held_while_it_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of demonstrations: behind keys that are wrong, rows score otherwise, and are not let to."""
    for kind in ("classification", "generation", "generation without answers"):
        scorer, rows = scorer_of("llama"), rows_of(kind.split()[0])
        if "without" in kind:  # as of rows to predict: nothing is scored
            rows = [replace(row, full=(), num_option=(), answers=()) for row in rows]
        head = tuple(range(60, 90))
        rows = [
            replace(
                row,
                full=tuple(head + ids for ids in row.full),
                context=head + row.context if row.context else (),
            )
            for row in rows
        ]
        scorer.holds_common = True
        assert measure(scorer, rows).scores.caches
        hold = prefix_cache.hold

        def wrong(forward: Any, ids: Any, cache: Any, hold: Any = hold) -> Held:
            return replace(hold(forward, ids[::-1], cache), ids=ids)

        with monkeypatch.context() as patch:
            patch.setattr(prefix_cache, "hold", wrong)
            assert not measure(scorer, rows).scores.caches


def test_rounding_of_low_precision_keeps_nothing_apart() -> None:
    """bfloat16 products of other shapes differ, and that is not the batch's fault."""
    for name, expected in (("llama", SAME), ("gpt_neo", NO_CACHE)):
        scorer = scorer_of(name)
        scorer.model.bfloat16()
        assert measure(scorer, pick(rows_of("choice"), 2000)).scores == expected


def test_what_was_measured_is_written_and_read_as_json() -> None:
    for difference in (0.25, math.inf):
        found = Found(NO_CACHE, ONE_LENGTH, difference)
        text = json.dumps(found.plain(), allow_nan=False)
        assert Found.of(json.loads(text)) == found
    assert Found(NO_CACHE).stricter(Found(answers=ALONE, difference=2.0)) == Found(
        NO_CACHE, ALONE, 2.0
    )


def test_other_ranks_go_by_what_rank_0_tells() -> None:
    rank: Any = SimpleNamespace(loaded=SimpleNamespace(scorer=scorer_of("llama")))
    Follower.do(rank, {"do": "batching", "found": Found(NO_CACHE, ONE_LENGTH).plain()}, b"")
    assert rank.loaded.scorer.batching == NO_CACHE
    assert rank.loaded.scorer.batching_of_answers == ONE_LENGTH


@pytest.fixture
def gpt_neo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model and rows of unlike length, of which a run is made."""
    scorer_of("gpt_neo").model.save_pretrained(tmp_path / "gpt_neo")  # type: ignore[operator]  # transformers' own
    TOKENIZER.save_pretrained(tmp_path / "gpt_neo")
    lines = [
        {"q": text, "a": " a" + " warm" * 9, "b": " dull", "label": i % 2}
        for i, text in enumerate(TEXTS * 3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_and_its_predictions_go_by_what_was_measured(
    gpt_neo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row alone in a file is scored as among others; result.json and the console say why."""
    words = ["task=choice", "task.data=rows.jsonl", 'task.prompt="{q}"', "task.options=[a,b]"]
    words += ["model=own", "model.path=gpt_neo", "model.max_length=256", "model.attention=eager"]
    words += ["steps=2", "eval_every=1", "lr=1e-3", "device=cpu", "batch_size=4"]
    result = train.run(compose(words))
    assert result["batching"]["scores"] == {"pads": True, "caches": False, "together": True}
    assert is_sound_result(result)
    (folder,) = Path("runs/default").iterdir()
    assert "no cache of what rows have in common (scores)" in capsys.readouterr().out
    assert main(["eval", str(folder), "--split", "dev"]) == 0
    assert main(["replay", str(folder)]) == 0  # the same figures
    assert main(["predict", str(folder), "rows.jsonl", "--out", "all.jsonl"]) == 0
    together = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    lines = Path("rows.jsonl").read_text().splitlines()
    for i in (1, 3, 5):
        Path("one.jsonl").write_text(lines[i] + "\n")
        assert main(["predict", str(folder), "one.jsonl", "--out", "out.jsonl"]) == 0
        single = json.loads(Path("out.jsonl").read_text())
        assert single["scores"] == pytest.approx(together[i]["scores"], abs=1e-4)
