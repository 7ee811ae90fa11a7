"""Architectures of transformers, tiny and random: each trains, scores, generates and is saved.

Each claim holds, or the run is refused in one sentence that says what to do instead.
"""

import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

from smezo_cli.errors import UserError
from smezo_cli.models.tiny import byte_tokenizer
from smezo_cli.run.loaded import Loaded
from smezo_cli.run.method import build_method
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.measured_batching import measure
from smezo_cli.tasks import Row
from tests.composed import settings_of

pytestmark = pytest.mark.usefixtures("one_thread")

_BASE = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "max_position_embeddings": 160},
}
_GROUPED = _BASE | {"num_key_value_heads": 1}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 160}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
# The architecture (transformers' model_type, where the key is another) and its numbers.
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "llama_tied": _GROUPED | {"model_type": "llama", "tie_word_embeddings": True},
    "mistral_window": _GROUPED | {"model_type": "mistral", "sliding_window": 8},
    "mixtral": _GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "qwen3_moe": _GROUPED | _EXPERTS | {"head_dim": 8, "decoder_sparse_step": 1},
    "qwen3_next": _GROUPED
    | _EXPERTS
    | {"head_dim": 8, "shared_expert_intermediate_size": 8, "linear_num_value_heads": 2}
    | {"linear_num_key_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    | {"num_hidden_layers": 4},
    "gemma2": _GROUPED | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": _GROUPED
    | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "openai-gpt": _GPT2,
    "ctrl": _GPT2 | {"dff": 32},
    "gptj": _GPT2 | {"rotary_dim": 4},
    "codegen": _GPT2 | {"n_ctx": 160, "rotary_dim": 4, "n_head": 4},
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 8}
    | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 160},
    "gpt_neox": _BASE,
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 160, "expansion_ratio": 2},
    "falcon": _BASE | {"new_decoder_architecture": False},
    "falcon_alibi": _BASE
    | {"model_type": "falcon", "alibi": True, "multi_query": False, "parallel_attn": False},
    "opt": {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"max_position_embeddings": 160, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    "xglm": {"d_model": 16, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2}
    | {"max_position_embeddings": 160},
    "biogpt": _BASE,
    "olmo2": _GROUPED,
    "cohere": _GROUPED,
    "granite": _GROUPED,
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED | {"sliding_window": 8},
    "smollm3": _GROUPED,
    "gpt_oss": _GROUPED
    | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
    "deepseek_v3": _BASE
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    | {"moe_intermediate_size": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
    | {"qk_nope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 1, "n_shared_experts": 1}
    | {"num_key_value_heads": 2},
    "lfm2": _GROUPED
    | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "jamba": _GROUPED
    | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"mamba_d_state": 4, "mamba_dt_rank": 2},
    "recurrent_gemma": _GROUPED
    | {"lru_width": 16, "attention_window_size": 8, "num_hidden_layers": 3, "head_dim": 8},
    "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    "mamba2": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "num_heads": 4}
    | {"head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "rwkv": {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2}
    | {"context_length": 160},
    "bert_decoder": _BASE | {"model_type": "bert", "is_decoder": True},
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "xlm": {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_langs": 1, "causal": True}
    | {"max_position_embeddings": 160},
}
_DEBERTA = _BASE | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
MASKED: dict[str, dict[str, Any]] = {
    "bert": _BASE,
    "roberta": _BASE,
    "albert": _BASE | {"embedding_size": 4, "vocab_size": 3000},  # 3000 * 16 is more than it has
    "deberta": _DEBERTA | {"max_relative_positions": 32},
    "deberta_v2": _DEBERTA | {"model_type": "deberta-v2", "position_buckets": 8, "legacy": True},
    "deberta_v2_new": _DEBERTA
    | {"model_type": "deberta-v2", "position_buckets": 8, "legacy": False},
    "electra": _BASE | {"embedding_size": 8},
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
    | {"max_position_embeddings": 160},
    "mpnet": _BASE,
    "camembert": _BASE,
    "xlm-roberta": _BASE,
    "modernbert": _BASE | {"local_attention": 8, "global_attn_every_n_layers": 2},
    "layoutlm": _BASE | {"max_2d_position_embeddings": 16},
    "esm": _BASE | {"mask_token_id": 334},
    "fnet": {k: v for k, v in _BASE.items() if k != "num_attention_heads"},
    "big_bird": _BASE | {"attention_type": "original_full"},
    "longformer": _BASE | {"attention_window": [8, 8]},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2}
    | {"d_head": 8, "d_inner": 32},
    "squeezebert": _BASE | {"embedding_size": 16, "num_attention_heads": 4},
    "mobilebert": _BASE
    | {"embedding_size": 8, "intra_bottleneck_size": 16, "true_hidden_size": 16}
    | {"num_feedforward_networks": 1},
    "convbert": _BASE | {"embedding_size": 8},
    "nystromformer": _BASE | {"num_landmarks": 8, "segment_means_seq_len": 64},
    "rembert": _BASE | {"input_embedding_size": 8, "output_embedding_size": 12},
    "roformer": _BASE | {"embedding_size": 8},
    "yoso": _BASE,
    "ernie": _BASE,
    "data2vec-text": _BASE,
}
# One sentence: cannot be run on a text of any length.
REFUSED = {"nystromformer": "cannot read a text of 4 tokens here"}
# Parameters that no functional probe reaches are named; then the in-place executor trains them.
IN_PLACE = {"lfm2", "deberta", "deberta_v2", "deberta_v2_new", "mobilebert"}


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    global _MODELS
    _MODELS = tmp_path_factory.mktemp("models")
    yield
    job_of.cache_clear()
    refusal_of.cache_clear()


_MODELS = Path()


@functools.cache
def job_of(name: str) -> Loaded:
    """The model of that name, made, saved and loaded as model=own loads it, on the toy task."""
    masked = name in MASKED
    tokenizer = byte_tokenizer(add_bos=False, add_mask=masked)
    numbers = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1}
    numbers |= {"eos_token_id": 2} | (MASKED if masked else CAUSAL)[name]
    config = CONFIG_MAPPING[numbers.pop("model_type", name)](**numbers)
    auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, on some of its own classes
        model = auto.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    folder = _MODELS / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loaded(folder, masked)


def loaded(folder: Path, masked: bool, *more: str) -> Loaded:
    words = ["task=toy", "model=own", "model.path=PATH", "model.max_length=128"]
    words += ["task.num_train=8", "task.num_dev=4", "task.num_test=8", "device=cpu"]
    words += ["method=sparse_mezo", "steps=2", "lr=1e-3", "eps=1e-3", "compile=false"]
    words += ["method.executor=sequential", *more]  # to time another takes as long as a step
    if masked:
        words += ["model.family=masked", "task.prompt='{text}. It was {mask} .'"]
        words += ["task.labels=[bad,good]"]
    settings = settings_of(*words)
    settings = dataclasses.replace(settings, model=settings.model | {"path": str(folder)})
    return Loaded(settings, "cpu", lambda line: None)


@functools.cache
def refusal_of(name: str) -> str:
    """The sentence that answers an architecture of REFUSED."""
    with pytest.raises(UserError) as caught:
        job_of(name)
    return str(caught.value)


ALL = [name for name in (*CAUSAL, *MASKED) if name not in REFUSED]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused_in_one_sentence(name: str) -> None:
    assert REFUSED[name] in refusal_of(name)
    assert "\n" not in refusal_of(name)


def scores_of(job: Loaded, rows: Sequence[Candidates], together: bool) -> Tensor:
    """Differences of the scores of each row's first candidates to that of its first."""
    if together:
        found = [(i, row) for of in job.scorer.score_all(rows) for i, row in zip(*of, strict=True)]
        scores = torch.stack([row for _, row in sorted(found, key=lambda pair: pair[0])])
    else:
        with torch.inference_mode():
            scores = torch.cat([job.scorer.scores([row]) for row in rows])
    return scores - scores[:, :1]


def choices(job: Loaded) -> list[Candidates]:
    """Rows of unlike length with options of unlike length."""
    return [
        Candidates(
            tuple((*range(5, 5 + length), *range(60, 60 + k)) for k in (1, 2, 3, 4)),
            (1, 2, 3, 4),
            0,
            False,
            kind="choice",
            words=("a", "b", "c", "d"),
        )
        for length in (30, 90, 17)
    ]


@pytest.mark.parametrize("name", ALL)
def test_scores_in_a_batch_are_those_of_a_row_alone(name: str) -> None:
    job = job_of(name)
    texts = ("dull", "a warm and clever plot", "the score was awful, and the jokes were stale")
    rows = job.encode([Row({"text": t}, 0, id=t) for t in texts], job.prompts[0])
    assert len({max(row.width, len(row.context)) for row in rows}) == 3
    measure(job.scorer, rows).to(job.scorer)
    # Sums of float32 numbers of order 1, in another order.
    torch.testing.assert_close(
        scores_of(job, rows, True), scores_of(job, rows, False), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", [n for n in ALL if n in CAUSAL])
def test_options_in_a_batch_are_scored_as_those_of_a_row_alone(name: str) -> None:
    job = job_of(name)
    rows = choices(job)
    measure(job.scorer, rows).to(job.scorer)
    torch.testing.assert_close(
        scores_of(job, rows, True), scores_of(job, rows, False), atol=2e-4, rtol=1e-4
    )


def plain(job: Loaded, context: tuple[int, ...], num: int) -> str:
    """Greedy tokens by whole forwards of one row, without a cache."""
    ids, answer = list(context), list[int]()
    for _ in range(num):
        with torch.inference_mode():
            inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "use_cache": False}
            token = int(job.model(**inputs).logits[0, -1].argmax())
        if token == 2:
            break
        ids, answer = [*ids, token], [*answer, token]
        if "\n" in job.tokenizer.decode(answer, skip_special_tokens=True):
            break
    text: str = job.tokenizer.decode(answer, skip_special_tokens=True)
    return text.partition("\n")[0].strip()


@pytest.mark.parametrize("name", [n for n in ALL if n in CAUSAL])
def test_answers_in_a_batch_are_those_of_a_plain_loop(name: str) -> None:
    job = job_of(name)
    contexts = [
        tuple(range(start, start + length)) for start, length in ((70, 21), (9, 4), (40, 12))
    ]
    rows = [
        Candidates((), (), -1, False, "generation", context=c, max_new_tokens=5) for c in contexts
    ]
    measure(job.scorer, rows).to(job.scorer)
    texts = dict(pair for of in job.scorer.generate_all(rows) for pair in zip(*of, strict=True))
    assert [texts[i] for i in range(3)] == [plain(job, c, 5) for c in contexts]


@pytest.mark.parametrize("name", ALL)
def test_two_sparse_steps_and_what_is_saved_computes_the_same(name: str, tmp_path: Path) -> None:
    masked = name in MASKED
    job = loaded(_MODELS / name, masked) if job_of(name) else None
    assert job is not None
    rows = job.encode(job.task.train, job.prompts[0])[:4]
    before = {n: p.detach().clone() for n, p in job.model.named_parameters()}
    method = build_method(job)
    said = ""
    try:
        method.self_check(lambda: job.scorer.loss(rows[:2]))
    except ValueError as error:  # a run makes a UserError of it
        said = str(error)
    assert (name in IN_PLACE) == bool(said), said
    if said:
        assert "executor=in_place" in said
        assert "\n" not in said
        job = loaded(_MODELS / name, masked, "method.executor=in_place")
        method = build_method(job)
        method.self_check(lambda: job.scorer.loss(rows[:2]))
    losses = [method.step(lambda: job.scorer.loss(rows)).loss for _ in range(2)]
    assert torch.tensor(losses).isfinite().all()
    moved = [n for n, p in job.model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > len(before) // 2
    job.save(tmp_path / "saved")
    job.model.config.use_cache = False
    again = loaded(tmp_path / "saved", masked)
    theirs = dict(again.model.named_parameters())
    for n, p in job.model.named_parameters():
        # transformers sets the vector of Funnel's padding to zero whenever it loads one.
        first = int(name == "funnel" and n.endswith("word_embeddings.weight"))
        assert torch.equal(p[first:], theirs[n][first:]), n
    with torch.inference_mode():
        assert torch.equal(again.scorer.scores(rows), job.scorer.scores(rows))
