"""The models of conf/model: built on the meta device, loaded from files and the hub, trained."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import httpx
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from smezo_cli import train
from smezo_cli.config.compose import compose
from smezo_cli.config.digest import digest
from smezo_cli.errors import UserError
from smezo_cli.files import fetch
from smezo_cli.methods.mezo import MeZO
from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.models import architecture, embedded
from smezo_cli.models.architecture import build_meta
from smezo_cli.models.load import load_model
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.scoring.scorer import Scorer
from tests import CONF

CPU = torch.device("cpu")
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
NODES: dict[str, dict[str, Any]] = {
    file.stem: OmegaConf.to_container(OmegaConf.load(file))  # type: ignore[misc]  # a mapping
    for file in sorted((CONF / "model").glob("*.yaml"))
    if file.stem != "own"
}
TINY = [name for name in NODES if "tiny" in NODES[name]]
CAUSAL = [name for name in TINY if name != "tiny-roberta"]
REAL = [name for name in NODES if name not in TINY]
# As the publishers name them, in millions.
PUBLIC = {
    **{"llama-7b": 6738, "llama-30b": 32529, "llama2-7b": 6738, "llama3-8b": 8030},
    **{"mistral-7b": 7242, "qwen2.5-0.5b": 494, "qwen2.5-7b": 7616, "gemma3-270m": 268},
    **{"opt-125m": 125, "opt-1.3b": 1300, "opt-2.7b": 2700, "opt-6.7b": 6700, "opt-13b": 13000},
    **{"opt-30b": 30000, "opt-66b": 66000, "roberta-large": 355},
    **{"smollm2-135m": 135, "smollm2-360m": 362},
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """All of these models are tiny."""


def load(cfg: dict[str, Any], **kw: Any) -> Loaded:
    given: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "cache": Path("/nowhere")}
    return load_model(cfg, **(given | kw))


def message_of(cfg: dict[str, Any]) -> str:
    """The one sentence of the UserError that loading raises."""
    with pytest.raises(UserError) as caught:
        load(cfg)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def at(path: Path | str, **changes: Any) -> dict[str, Any]:
    """The node of model=own."""
    return {"name": "own", "path": str(path), "attention": "sdpa", "max_length": 128} | changes


def is_tied(net: Any) -> bool:
    same: bool = net.get_input_embeddings().weight is net.get_output_embeddings().weight
    return same


# -------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("name", NODES)
def test_a_model_is_what_its_file_says_without_the_hub(name: str) -> None:
    cfg = NODES[name]
    net = build_meta(cfg)
    assert all(p.is_meta for p in net.parameters())
    assert net.dtype == getattr(torch, cfg.get("dtype", "float32"))
    (stated,) = re.findall(r"([\d,]{5,}) (?:random )?weights", text_of(name).split("name:")[0])
    total = sum(p.numel() for p in net.parameters())
    assert total == int(stated.replace(",", ""))
    assert is_tied(net) == cfg["config"]["tie_word_embeddings"]
    if name in REAL:
        assert total == pytest.approx(PUBLIC[name] * 1e6, rel=0.025)
    limit = architecture.context_length(net)
    assert limit is not None
    assert cfg["max_length"] <= limit


def text_of(name: str) -> str:
    return (CONF / "model" / f"{name}.yaml").read_text()


def make(net: nn.Module) -> set[str]:
    """What a model is made of: classes of modules and their parameters, whatever the sizes."""
    return {
        f"{type(module).__name__}.{re.sub(r'[0-9]+', 'N', path)}.{name}"
        for path, module in net.named_modules()
        for name, p in module._parameters.items()
        if p is not None
    }


@pytest.mark.parametrize("name", REAL)
def test_every_architecture_has_a_tiny_twin(name: str) -> None:
    real, tied = NODES[name], NODES[name]["config"]["tie_word_embeddings"]
    twins = [
        NODES[t] for t in TINY if NODES[t]["config"]["model_type"] == real["config"]["model_type"]
    ]
    (twin,) = twins
    assert twin.get("family") == real.get("family")
    small = build_meta(twin | {"config": twin["config"] | {"tie_word_embeddings": tied}})
    assert make(small) == make(build_meta(real))


def test_the_embedded_model_has_the_numbers_of_its_file() -> None:
    package = NODES["smollm2-135m"]["package"]
    name = f"smollm2-135m-{package['sha256'][:12]}-v{embedded.CONVERSION}"
    folder = fetch.cache_dir() / "models" / name
    if not folder.is_dir():
        pytest.skip("the embedded model has not been fetched here; smezo train fetches it")
    real = AutoConfig.from_pretrained(folder)
    for key, value in NODES["smollm2-135m"]["config"].items():
        got = getattr(real, key)
        assert got == (pytest.approx(value) if isinstance(value, float) else value), key


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"model_type": "lama"}, "model.config.model_type=lama is not known to transformers"),
        ({"model_type": None}, "model.config.model_type=None is not known"),
        ({"hidden_sise": 3}, "hidden_sise is not known to LlamaConfig; did you mean hidden_size"),
        ({"hidden_size": "wide"}, "model.config: llama does not take it"),
        ({"vocab_size": 100}, "the built-in tokenizer has 334 tokens; set model.config.vocab_size"),
        (
            {"max_position_embeddings": 128},
            "model.max_length=256, but tiny-llama reads at most 128",
        ),
    ],
)
def test_wrong_numbers_are_one_sentence(numbers: dict[str, Any], says: str) -> None:
    cfg = NODES["tiny-llama"]
    assert says in message_of(cfg | {"config": cfg["config"] | numbers})


@pytest.mark.parametrize("changes", [{"seed": "a"}, {"seed": 1.5}, {"add_bos": "maybe"}])
def test_a_wrong_tiny_node_is_one_sentence(changes: dict[str, Any]) -> None:
    cfg = NODES["tiny-llama"]
    ((key, value),) = changes.items()
    assert f"model.tiny.{key}={value}: it must be" in message_of(
        cfg | {"tiny": cfg["tiny"] | changes}
    )


def test_a_node_without_numbers_cannot_be_built() -> None:
    with pytest.raises(UserError, match=r"model own has no model\.config"):
        build_meta(at("anywhere"))


# ------------------------------------------------------------------------------------ tiny twins


def closure_of(loaded: Loaded) -> Callable[[], torch.Tensor]:
    """Mean loss of the label word: at the mask, or after the text."""
    net, tokenizer = loaded
    texts = ["the film was dull. It was", "a warm and clever plot. It was"]
    mask = tokenizer.mask_token
    rows = [tokenizer(f"{text} {mask} ." if mask else text)["input_ids"] for text in texts]
    labels = torch.tensor(
        [tokenizer(f" {w}")["input_ids"][-2 if mask else -1] for w in ("bad", "good")]
    )
    spot = [row.index(tokenizer.mask_token_id) if mask else len(row) - 1 for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    seen = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])

    def closure() -> torch.Tensor:
        logits = net(input_ids=ids, attention_mask=seen).logits
        return F.cross_entropy(logits[torch.arange(2), torch.tensor(spot)].float(), labels)

    return closure


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_functional_probes_reach_every_weight_of_a_twin(name: str, sparsity: float) -> None:
    """Also the bias of RoBERTa's head, which has two owners, and heads that share a weight."""
    loaded = load(NODES[name])
    closure = closure_of(loaded)
    method: MeZO
    if sparsity:
        method = SparseMeZO(loaded[0], lr=1e-3, eps=1e-3, sparsity=sparsity, backend="eager")
    else:
        method = MeZO(loaded[0], lr=1e-3, eps=1e-3, backend="eager")
    parts = [(m, n, p) for m in loaded[0].modules() for n, p in m._parameters.items()]
    kinds = {(type(m).__name__, n) for m, n, p in parts if p is not None}
    assert method.self_check(closure) == len(kinds)
    before = {name: p.clone() for name, p in loaded[0].named_parameters()}
    losses = [method.step(closure).loss for _ in range(3)]
    assert torch.tensor(losses).isfinite().all()
    unmoved = [n for n, p in loaded[0].named_parameters() if torch.equal(p, before[n])]
    assert not unmoved


METHODS = {
    "mezo": ["method=mezo"],
    "small": ["method=sparse_mezo", "method.mask=small"],
    "large": ["method=sparse_mezo", "method.mask=large"],
    "random": ["method=sparse_mezo", "method.mask=random"],
    "adamw": ["method=adamw"],
    "sgd": ["method=sgd"],
}


@pytest.mark.parametrize("words", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", [*CAUSAL, "tiny-roberta"])
def test_every_method_trains_every_twin(name: str, words: list[str], tmp_path: Path) -> None:
    asked = ["task.prompt=0"]
    if name not in CAUSAL:
        asked = ["task.prompt='{text} . It was {mask} .'", "task.labels=[bad,good]"]
    few = ["task.num_train=8", "task.num_dev=4", "task.num_test=4", *asked]
    short = ["steps=3", "batch_size=4", "eval_every=3", "device=cpu", "compile=auto"]
    cfg = compose(["task=toy", f"model={name}", *words, *few, *short, f"runs_dir={tmp_path}"])
    result = train.run(cfg)
    assert (result["status"], result["step"], result["test"]["n"]) == ("done", 3, 4)
    assert (result["dtype"], result["recipes"]) == ("float32", [])


def test_a_masked_twin_sees_both_sides_of_the_mask_and_no_padding() -> None:
    net, tokenizer = load(NODES["tiny-roberta"])
    ids = tokenizer("It was <mask> . good")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    spot = ids.index(tokenizer.mask_token_id)

    def at_mask(row: list[int], padding: int = 0) -> torch.Tensor:
        full = torch.tensor([row + [tokenizer.pad_token_id] * padding])
        seen = torch.tensor([[1] * len(row) + [0] * padding])
        with torch.inference_mode():
            logits: torch.Tensor = net(input_ids=full, attention_mask=seen).logits
        return logits[0, spot]

    torch.testing.assert_close(at_mask(ids, 7), at_mask(ids), rtol=0, atol=1e-5)
    other = [*ids[:-2], ids[-2] + 1, ids[-1]]
    assert (at_mask(other) - at_mask(ids)).abs().max() > 0.01
    full = torch.full((1, 256), ids[1])  # the longest that it reads
    net(input_ids=full, attention_mask=torch.ones_like(full))


def test_a_limit_beyond_the_positions_of_roberta_is_refused() -> None:
    """It has 257 positions and counts from the one after its padding token."""
    message = message_of(NODES["tiny-roberta"] | {"max_length": 257})
    assert "model.max_length=257, but tiny-roberta reads at most 256 tokens" in message


# ---------------------------------------------------------------------------- folders and GGUF


def save(name: str, folder: Path) -> Path:
    net, tokenizer = load(NODES[name])
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_masked_model_loads_from_its_folder_if_it_is_called_one(tmp_path: Path) -> None:
    folder = save("tiny-roberta", tmp_path / "saved")
    net, _ = load(at(folder, family="masked"))
    assert type(net).__name__ == "RobertaForMaskedLM"
    message = message_of(at(folder))
    assert "is a RobertaForMaskedLM: add model.family=masked" in message
    message = message_of(at(save("tiny-opt", tmp_path / "opt"), family="masked"))
    assert "is a OPTForCausalLM: add model.family=causal" in message


@pytest.mark.parametrize(
    ("key", "other"),
    [("hidden_size", 64), ("num_hidden_layers", 3), ("vocab_size", 335), ("model_type", "opt")],
)
def test_a_checkpoint_of_other_numbers_is_refused(tmp_path: Path, key: str, other: Any) -> None:
    folder = save("tiny-llama", tmp_path / "saved")
    numbers = dict(NODES["tiny-llama"]["config"])
    load(at(folder, config=numbers))
    message = message_of(at(folder, name="mine", config=numbers | {key: other}))
    assert message == (
        f"model=mine has {key} {other} and the model found has {numbers[key]}: load it by "
        "model=own model.path=PATH."
    )


def test_the_asked_bos_stands_in_front_of_every_prompt(tmp_path: Path) -> None:
    """OPT's own is </s>; MeZO's code puts <s>."""
    folder = save("tiny-opt", tmp_path / "saved")
    plain, asked = load(at(folder))[1], load(at(folder, bos_token="<unk>"))[1]
    ids = plain("It was")["input_ids"]
    assert asked("It was")["input_ids"] == [asked.unk_token_id, *ids[1:]]
    folder = save("tiny-llama", tmp_path / "llama")
    assert load(at(folder, bos_token="<s>"))[1]("It was")["input_ids"][0] == 1
    assert "model.bos_token=<x> cannot be put" in message_of(at(folder, bos_token="<x>"))


def test_a_tokenizer_without_padding_pads_with_unk_as_mezo(tmp_path: Path) -> None:
    folder = save("tiny-llama", tmp_path / "saved")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load(at(folder))[1]
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 3


def write_gguf(net: Any, file: Path) -> None:
    """A Llama as its GGUF converter writes it: half-rotations interleaved, float32."""
    config = net.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["a", "b", "ab", *(f"t{k}" for k in range(3, config.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    names = {"self_attn": "attn", "_proj": "", "o.": "output.", "mlp.": "ffn_"}
    short = {"attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output"}
    short |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    del names["o."]
    for name, tensor in net.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads, width = config.num_attention_heads, tensor.shape[1]
            tensor = tensor.view(heads, 2, -1, width).transpose(1, 2).reshape(tensor.shape)
        name = name.removeprefix("model.").replace("layers.", "blk.")
        name = {
            "embed_tokens.weight": "token_embd.weight",
            "norm.weight": "output_norm.weight",
        }.get(name, name)
        for old, new in [*names.items(), *short.items()]:
            name = name.replace(old, new)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_an_ordinary_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    net = load(NODES["tiny-llama"])[0]
    write_gguf(net, tmp_path / "tiny.gguf")
    capfd.readouterr()
    found, tokenizer = load(at(tmp_path / "tiny.gguf"))
    assert capfd.readouterr() == ("", "")
    assert len(tokenizer) >= net.config.vocab_size
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(found(input_ids=ids).logits, net(input_ids=ids).logits)
    half = load(at(tmp_path / "tiny.gguf"), dtype=torch.bfloat16)[0]
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    found.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load(at(tmp_path / "saved"))[0]
    with torch.inference_mode():
        assert torch.equal(again(input_ids=ids).logits, found(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["model.safetensors", "tiny.gguf"])
def test_a_file_that_was_cut_off_is_one_sentence(tmp_path: Path, name: str) -> None:
    folder = save("tiny-llama", tmp_path / "saved")
    write_gguf(load(NODES["tiny-llama"])[0], folder / "tiny.gguf")
    whole = (folder / name).read_bytes()
    path = folder if name == "model.safetensors" else folder / name
    for share in (0.999, 0.5, 0.01, 0.001):
        (folder / name).write_bytes(whole[: int(share * len(whole))])
        message = message_of(at(path))
        says = "is no GGUF file that can be read" if name == "tiny.gguf" else "could not be loaded"
        assert message.startswith(f"model.path={path} {says} (")


def test_an_attention_that_is_not_installed_is_one_sentence(
    tmp_path: Path,
) -> None:
    if is_flash_attn_2_available():
        pytest.skip("flash-attention is installed here")
    folder = save("tiny-llama", tmp_path / "saved")
    for cfg in (NODES["tiny-llama"], at(folder)):
        message = message_of(cfg | {"attention": "flash_attention_2"})
        assert message.startswith("model.attention=flash_attention_2 cannot be used with")
        assert message.endswith("set model.attention=sdpa.")


# Its attention has no sdpa.
NO_SDPA = {"name": "own", "tiny": {}, "attention": "auto", "max_length": 64} | {
    "config": {"model_type": "bloom", "vocab_size": 334, "hidden_size": 16, "n_layer": 1}
    | {"n_head": 2}
}


def test_auto_attention_is_sdpa_or_eager_and_a_named_one_is_taken_at_its_word() -> None:
    assert load(NODES["tiny-llama"] | {"attention": "auto"})[0].config._attn_implementation == (
        "sdpa"
    )
    assert load(NO_SDPA)[0].config._attn_implementation == "eager"
    assert build_meta(NO_SDPA).config._attn_implementation == "eager"
    for asked in ("sdpa", "flash_attention_2", "flex_attention"):
        message = message_of(NO_SDPA | {"attention": asked})
        assert message.startswith(f"model.attention={asked} cannot be used with own here (Bloom")
        assert message.endswith("; set model.attention=eager.")


def test_auto_attention_falls_back_for_a_folder_too(tmp_path: Path) -> None:
    net, tokenizer = load(NO_SDPA)
    net.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load(at(tmp_path / "saved", attention="auto"))[0]
    assert again.config._attn_implementation == "eager"
    assert message_of(at(tmp_path / "saved")).endswith("; set model.attention=eager.")


def test_auto_attention_leaves_the_digest_of_sdpa_as_it_was() -> None:
    words = ["task=toy", "model=own", "model.path=x", "method=mezo"]
    digests = [
        digest(compose([*words, *more]))
        for more in ([], ["model.attention=auto"], ["model.attention=sdpa"])
    ]
    assert len(set(digests)) == 1
    assert digest(compose([*words, "model.attention=eager"])) != digests[0]


def test_a_run_says_and_records_the_attention_that_it_fell_back_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, tokenizer = load(NO_SDPA)
    net.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    few = ["task.num_train=8", "task.num_dev=4", "task.num_test=4", "task.prompt=0", "steps=1"]
    own = ["model=own", f"model.path={tmp_path / 'saved'}", "model.max_length=64", "device=cpu"]
    result = train.run(compose(["task=toy", *own, *few, f"runs_dir={tmp_path}", "method=mezo"]))
    assert result["attention"] == "eager"
    said = capsys.readouterr().out
    assert said.count("attention=eager, as BloomForCausalLM has no sdpa") == 1


XGLM = {"model_type": "xglm", "vocab_size": 334, "d_model": 16, "ffn_dim": 16, "num_layers": 1} | {
    "attention_heads": 2,
    "max_position_embeddings": 96,
}
XLNET = {"model_type": "xlnet", "vocab_size": 334, "d_model": 16, "n_layer": 1, "n_head": 2} | {
    "d_inner": 16
}


def test_positions_that_are_computed_have_their_own_limit_or_none() -> None:
    """XGLM's are no weights, and XLNet says -1 where it has no limit."""
    assert architecture.context_length(load(NO_SDPA | {"config": XGLM})[0]) == 96
    assert (
        architecture.context_length(load(NO_SDPA | {"config": XLNET, "max_length": 4096})[0])
        is None
    )


MASKED_NODE = NO_SDPA | {"family": "masked"}
_SIZES = {"vocab_size": 335, "hidden_size": 16, "intermediate_size": 16, "pad_token_id": 0} | {
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 96},
}
HEADS: dict[str, dict[str, Any]] = {
    "esm": _SIZES | {"model_type": "esm", "mask_token_id": 334},
    "mobilebert": _SIZES
    | {"model_type": "mobilebert", "embedding_size": 8, "intra_bottleneck_size": 16}
    | {"true_hidden_size": 16, "num_feedforward_networks": 1},
    "deberta-v2": _SIZES
    | {"model_type": "deberta-v2", "legacy": False, "relative_attention": True}
    | {"pos_att_type": ["c2p"]},
    "bert": _SIZES | {"model_type": "bert"},
}


@pytest.mark.parametrize("name", HEADS)
def test_label_words_are_scored_whatever_gives_the_logits(name: str) -> None:
    """A bias behind the output layer, a weight that is read, and another layer of that name."""
    net, tokenizer = load(MASKED_NODE | {"config": HEADS[name]})
    assert (net.get_output_embeddings() is None) == (name != "bert")
    ids = tokenizer("It was <mask> .")["input_ids"]
    spot = ids.index(tokenizer.mask_token_id)
    full = [tuple([*ids[:spot], word, *ids[spot + 1 :]]) for word in (300, 310)]
    row = Candidates(tuple(full), (1, 1), 0, False, context=tuple(ids), mask=spot)
    with torch.inference_mode():
        found = Scorer(net, tokenizer).scores([row, row])
        wanted = net(input_ids=torch.tensor([ids])).logits[0, spot, [300, 310]]
    torch.testing.assert_close(found, wanted.expand(2, -1), atol=1e-5, rtol=1e-5)


def test_a_model_that_cannot_be_run_is_refused_when_it_is_loaded() -> None:
    numbers = _SIZES | {"model_type": "nystromformer", "num_landmarks": 8}
    message = message_of(MASKED_NODE | {"config": numbers | {"segment_means_seq_len": 64}})
    assert "NystromformerForMaskedLM cannot read a text of 4 tokens here" in message


def test_a_vocabulary_of_short_vectors_is_not_damage(tmp_path: Path) -> None:
    """ALBERT's are shorter than its hidden states; what cannot be is still refused."""
    numbers = {"vocab_size": 4000, "embedding_size": 4, "model_type": "albert"}
    net, tokenizer = load(MASKED_NODE | {"config": _SIZES | numbers})
    net.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    load(at(tmp_path / "saved", family="masked", max_length=64))
    config = tmp_path / "saved" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 400_000}))
    assert "vocab_size=400000 times embedding_size=4 is more than" in message_of(
        at(tmp_path / "saved", family="masked", max_length=64)
    )


# ------------------------------------------------------------------- other things than a model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = "<!DOCTYPE html>\n<html><head></head></html>\n"


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "x.gguf"],
)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (POINTER, "is a git-lfs pointer, not the file itself: run `git lfs pull`"),
        (PAGE, "is a web page, not the file itself"),
        ("", "is empty: fetch it again"),
    ],
    ids=["pointer", "page", "empty"],
)
def test_what_lies_in_the_place_of_a_file_is_named(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    folder = save("tiny-llama", tmp_path / "saved")
    (folder / name).write_text(content)
    message = message_of(at(folder / name if name == "x.gguf" else folder))
    assert f"{name} {says}" in message
    assert "would have" not in message


def changed(folder: Path, name: str, **values: Any) -> None:
    """Change values of a JSON file; None takes one out."""
    content = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def two_of_three(folder: Path) -> None:
    names = [f"model-{k}-of-3.safetensors" for k in (1, 2, 3)]
    (folder / "model.safetensors").rename(folder / names[0])
    index = {"weight_map": dict(zip("abc", names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_tokenizer, "no tokenizer in it (tokenizer.json or tokenizer.model)"),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "its tokenizer cannot be loaded (no tokenizer.json or tokenizer.model in it)",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0", "mod'),
            "its tokenizer cannot be loaded (",
        ),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "no file named model.safetensors",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model.ckpt"),
            "its weights are a pickle, which is never opened",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + b"0" * 99),
            "model.safetensors is a pickle of PyTorch under another name",
        ),
        (two_of_three, "2 of its 3 files of weights are missing, model-2-of-3.safetensors"),
        (
            lambda folder: changed(folder, "config.json", model_type=None),
            "could not be loaded (its config.json has no model_type",
        ),
        (
            lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
            "it is no whole model but an adapter of peft",
        ),
    ],
    ids=[
        *("no-tokenizer", "no-vocabulary", "half-tokenizer", "no-weights", "pickle", "zip"),
        *("missing-parts", "no-model-type", "adapter"),
    ],
)
def test_what_a_folder_lacks_is_one_sentence(
    tmp_path: Path, change: Callable[[Path], object], says: str
) -> None:
    folder = save("tiny-llama", tmp_path / "saved")
    change(folder)
    assert says in message_of(at(folder))


def test_a_header_of_any_length_is_one(tmp_path: Path) -> None:
    """The length of a header that begins with a pickle's byte, 0x80, or with P and K."""
    folder = save("tiny-llama", tmp_path / "saved")
    whole = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    for low in (0x80, 0x0280, 0x4B50):
        wide = -(-(size - low) // 0x10000) * 0x10000 + low
        header = whole[8 : 8 + size].ljust(wide)
        (folder / "model.safetensors").write_bytes(
            wide.to_bytes(8, "little") + header + whole[8 + size :]
        )
        load(at(folder))


def test_a_download_that_was_broken_off_is_called_cut_off(tmp_path: Path) -> None:
    folder = save("tiny-llama", tmp_path / "saved")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100):
        (folder / "model.safetensors").write_bytes(whole[:size])
        assert "(model.safetensors: it is cut off" in message_of(at(folder))


def test_a_gguf_file_is_one_whatever_its_letters(tmp_path: Path) -> None:
    net = load(NODES["tiny-llama"])[0]
    write_gguf(net, tmp_path / "tiny.gguf")
    ids = torch.arange(5)[None]
    for name in ("TINY.GGUF", "tiny"):
        (tmp_path / name).write_bytes((tmp_path / "tiny.gguf").read_bytes())
        found, _ = load(at(tmp_path / name))
        with torch.inference_mode():
            torch.testing.assert_close(found(input_ids=ids).logits, net(input_ids=ids).logits)
    assert "there is no such folder or file" in message_of(at("no.GGUF"))


# ------------------------------------------------------------------------------------- the hub


def refusing(kind: type[Exception], text: str) -> Callable[..., Any]:
    """What transformers does when the hub answers with an error of this kind."""

    def from_pretrained(*_: Any, **__: Any) -> Any:
        response = httpx.Response(403, request=httpx.Request("GET", "https://hub.example/x"))
        try:
            raise kind(text, response=response)  # type: ignore[call-arg]
        except kind as error:
            raise OSError(f"{text}\nand more lines") from error

    return from_pretrained


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (
            GatedRepoError,
            [
                f"model.path=who/what is gated: ask for access at {constants.ENDPOINT}/who/what",
                "`hf auth login`; or give a copy by model.path=FOLDER",
            ],
        ),
        (RepositoryNotFoundError, ["the hub has no such model, or hides it", "`hf auth login`"]),
        (RevisionNotFoundError, ["model.revision=v9: who/what has no such branch, tag or commit"]),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    kind: type[Exception], says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "hub_answers", lambda: True)
    monkeypatch.setattr(AutoConfig, "from_pretrained", refusing(kind, "no"))
    message = message_of(at("who/what", revision="v9"))
    assert all(part in message for part in says)


def test_a_model_of_the_hub_tells_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache, as an earlier download left it, with no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--who--what"
    save("tiny-llama", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "hub_answers", lambda: False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for the hub"))
    net, _ = load(at("who/what"))
    assert net.config._commit_hash == commit
    assert "is not in the hub's cache" in message_of(at("who/else"))
    weights = cached / "snapshots" / commit / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert "model.path=who/what" in message_of(at("who/what"))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", TINY)
def test_lockstep_has_the_bits_of_sequential_on_every_twin(name: str, threads: int) -> None:
    """Three steps under a mask, with the caches that the models make by default.

    One step in two threads, which wait for each other where a machine is busy.
    """
    before, ends = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for executor in ("sequential", "lockstep"):
            loaded = load(NODES[name])
            options = {"sparsity": 0.75, "backend": "eager", "executor": executor}
            method = SparseMeZO(loaded[0], lr=1e-3, eps=1e-3, keep_noise=False, **options)
            records = [method.step(closure_of(loaded)) for _ in range(3 if threads == 1 else 1)]
            ends.append((records, [p.detach().clone() for p in loaded[0].parameters()]))
    finally:
        torch.set_num_threads(before)
    assert ends[0][0] == ends[1][0]
    assert all(map(torch.equal, ends[0][1], ends[1][1]))
