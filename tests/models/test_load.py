"""Models: tiny ones to build on, local folders, the embedded one with its verified cache."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smezo_cli.errors import UserError
from smezo_cli.files import fetch
from smezo_cli.models import embedded as embedded_module
from smezo_cli.models.architecture import WORDS
from smezo_cli.models.load import load_model
from smezo_cli.models.tiny import byte_tokenizer
from smezo_cli.tasks import load_task
from tests import CONF

CPU = torch.device("cpu")
TINY = ["tiny-llama", "tiny-opt", "tiny-mistral", "tiny-qwen2", "tiny-gemma3"]
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def node(group: str, name: str, **changes: Any) -> dict[str, Any]:
    """The node of a YAML file with some keys changed."""
    cfg = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"), resolve=True)
    assert isinstance(cfg, dict)
    return {str(key): value for key, value in cfg.items()} | changes


def load(cfg: dict[str, Any], cache: Path = Path("/nowhere"), **kw: Any) -> Loaded:
    return load_model(cfg, **({"dtype": torch.float32, "device": CPU, "cache": cache} | kw))


def message_of(cfg: dict[str, Any], cache: Path = Path("/nowhere")) -> str:
    """The one sentence of the UserError that loading raises."""
    with pytest.raises(UserError) as caught:
        load(cfg, cache)
    message = str(caught.value)
    assert "\n" not in message
    return message


def last_logits(loaded: Loaded, text: str, *, padding: int = 0) -> torch.Tensor:
    """Logits after the last token of `text`, shape (vocab,), with padding on the right."""
    net, tokenizer = loaded
    ids = tokenizer(text)["input_ids"]
    row = torch.tensor([ids + [tokenizer.pad_token_id] * padding])
    mask = torch.tensor([[1] * len(ids) + [0] * padding])
    with torch.inference_mode():
        logits: torch.Tensor = net(input_ids=row, attention_mask=mask).logits
    return logits[0, len(ids) - 1]


# ------------------------------------------------------------------------------------ tiny models


@pytest.mark.parametrize("name", TINY)
def test_logits_do_not_depend_on_right_padding(name: str) -> None:
    loaded = load(node("model", name))
    alone = last_logits(loaded, "the film was dull. It was")
    for padding in (1, 7, 64):
        padded = last_logits(loaded, "the film was dull. It was", padding=padding)
        torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)
    assert alone.std() > 0.3  # not the near-constant output of a usual initialisation


@pytest.mark.parametrize("name", TINY)
def test_the_weights_depend_on_their_seed_alone(name: str) -> None:
    cfg = node("model", name)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = load(cfg)[0].state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left alone
    torch.manual_seed(2)
    again = load(cfg)[0].state_dict()
    other = load(cfg | {"tiny": cfg["tiny"] | {"seed": 1}})[0].state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TINY)
def test_a_model_comes_in_the_dtype_asked_for_ready_for_scoring(
    name: str, dtype: torch.dtype
) -> None:
    net, tokenizer = load(node("model", name), dtype=dtype)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert all(p.requires_grad for p in net.parameters())
    assert not any(module.training for module in net.modules())
    assert net.config.use_cache is False
    assert net.config._attn_implementation == "sdpa"
    tied = net.get_input_embeddings().weight is net.get_output_embeddings().weight
    assert tied == (name != "tiny-mistral")
    assert tokenizer.pad_token_id is not None
    assert tokenizer.model_max_length == 256


def test_the_built_in_tokenizer_encodes_any_text_without_loss() -> None:
    tokenizer = byte_tokenizer(add_bos=False)
    every = "".join(map(chr, (*range(1, 0x250), 0x2028, 0x4E2D, 0x1F600, 0x10FFFF)))
    for text in (every, " a  b\n\n c ", "naïve 中文 😀", "It was terrible\nYes"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("before", ["", " ", "x ", "\n", ": "])
def test_each_word_of_the_built_in_tokenizer_is_one_token(before: str) -> None:
    tokenizer = byte_tokenizer(add_bos=False)
    prefix = tokenizer(before.rstrip(" "))["input_ids"]
    for word in WORDS:
        assert len(tokenizer(before + word)["input_ids"]) == len(prefix) + 1, word


def test_a_bos_is_added_where_the_architecture_has_one() -> None:
    opt, llama = (load(node("model", name))[1] for name in ("tiny-opt", "tiny-llama"))
    text = "It was"
    assert opt(text)["input_ids"] == [opt.bos_token_id, *llama(text)["input_ids"]]


def one_token_share(tokenizer: PreTrainedTokenizerBase, task: Any) -> float:
    """Share of (prompt, row, label) whose label is one token after the tokens of the context."""
    good = total = 0
    for prompt in task.prompts:
        for row in task.train[:100] + task.test[:100]:
            context = tokenizer(prompt.context(row.fields))["input_ids"]
            for k in range(len(task.classes)):
                full = tokenizer(prompt.candidates(row)[k])["input_ids"]
                good += full[:-1] == context
                total += 1
    return good / total


@pytest.mark.parametrize("name", TINY)
def test_the_label_words_of_the_toy_task_are_one_token(name: str) -> None:
    task = load_task(node("task", "toy"), data_seed=0, cache=Path("/nowhere"))
    assert one_token_share(load(node("model", name))[1], task) == 1


# --------------------------------------------------------------------------- what cannot be loaded


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_length": 0}, "model.max_length=0"),
        ({"max_length": "long"}, "model.max_length=long"),
        ({"path": "x/y"}, "one of model.package, model.path and model.tiny"),
        ({"tiny": None}, "got none of them"),
        ({"attention": "magic"}, "model.attention=magic"),
    ],
)
def test_a_wrong_model_node_is_one_sentence(changes: dict[str, Any], says: str) -> None:
    assert says in message_of(node("model", "tiny-llama", **changes))


def at(path: Path | str, **changes: Any) -> dict[str, Any]:
    return {"name": "mine", "path": str(path), "attention": "sdpa", "max_length": 128} | changes


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny model in a folder, as transformers saves it."""
    net, tokenizer = load(node("model", "tiny-llama"))
    net.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_model_loads_from_its_folder_with_equal_logits(saved: Path) -> None:
    text = "the plot was warm. It was"
    expected = last_logits(load(node("model", "tiny-llama")), text)
    assert torch.equal(last_logits(load(at(saved)), text), expected)
    assert {p.dtype for p in load(at(saved), dtype=torch.bfloat16)[0].parameters()} == {
        torch.bfloat16
    }


def test_a_prompt_limit_beyond_the_context_is_refused(saved: Path) -> None:
    message = message_of(at(saved, max_length=257))
    assert "model.max_length=257, but mine reads at most 256 tokens" in message


def test_a_pickle_is_never_opened(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.unlink()
    torch.save(load(node("model", "tiny-llama"))[0].state_dict(), saved / "pytorch_model.bin")
    assert f"model.path={saved}: its weights are a pickle, which is never" in message_of(at(saved))


def test_a_folder_that_holds_no_model_is_one_sentence(tmp_path: Path) -> None:
    assert "no config.json in it" in message_of(at(tmp_path))
    assert "there is no such folder or file" in message_of(at(tmp_path / "no"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert f"give its own path, {tmp_path}/model.gguf" in message_of(at(tmp_path))
    assert message_of(at(tmp_path / "model.gguf")).startswith(f"model.path={tmp_path}/model.gguf")
    (tmp_path / "weights").write_text("")
    assert "is a file and no GGUF" in message_of(at(tmp_path / "weights"))
    (tmp_path / "config.json").write_text("{}")
    assert "could not be loaded" in message_of(at(tmp_path))


def test_an_unreachable_hub_is_one_sentence_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "hub_answers", lambda: False)
    message = message_of(at("nobody/has-this-model"))
    assert message.startswith("model.path=nobody/has-this-model is not in the hub's cache (")
    assert "connect to the network, or give a copy by model.path=FOLDER" in message


# -------------------------------------------------------------------------------- embedded models


@pytest.fixture
def embedded(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A model node whose package is a small archive; its conversion copies a saved tiny model."""
    cache = tmp_path / "cache"
    wheel = cache / "packages" / "demo.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("demo/model.gguf", b"GGUF")

    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == b"GGUF"
        folder.mkdir()
        for path in saved.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(embedded_module, "_convert", convert)
    package = {
        "name": "demo",
        "version": "1.0",
        "file": "demo.whl",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "gguf": "demo/model.gguf",
    }
    return {"name": "demo", "package": package, "attention": "sdpa", "max_length": 64}


def test_an_embedded_model_is_converted_once_and_verified_afterwards(
    embedded: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = load(embedded, tmp_path / "cache")
    assert capsys.readouterr().err.count("converting demo") == 1
    again = load(embedded, tmp_path / "cache")
    assert capsys.readouterr().err == ""
    assert torch.equal(last_logits(first, "It was"), last_logits(again, "It was"))
    (folder,) = (p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir())
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {p.name for p in folder.iterdir()} - {"manifest.json"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        ("model.safetensors", Path.unlink),
        ("tokenizer.json", flip),
        ("config.json", Path.unlink),
        ("manifest.json", Path.unlink),
        ("manifest.json", lambda path: path.write_text("[]")),
    ],
)
def test_a_damaged_conversion_is_made_again_with_one_line(
    embedded: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Any,
) -> None:
    expected = last_logits(load(embedded, tmp_path / "cache"), "It was")
    (folder,) = (p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir())
    damage(folder / name)
    capsys.readouterr()
    mended = load(embedded, tmp_path / "cache")
    assert torch.equal(last_logits(mended, "It was"), expected)
    printed = capsys.readouterr().err.splitlines()
    assert [("is damaged" in line, "converting" in line) for line in printed] == [
        (True, False),
        (False, True),
    ]


@pytest.fixture(scope="module")
def smollm2() -> Loaded:
    try:
        return load(node("model", "smollm2-135m"), fetch.cache_dir())
    except UserError as error:
        pytest.skip(f"the embedded model cannot be had here: {error}")


def test_the_embedded_model_is_smollm2(smollm2: Loaded) -> None:
    net, tokenizer = smollm2
    assert sum(p.numel() for p in net.parameters()) == 134_515_008
    assert net.get_input_embeddings().weight is net.get_output_embeddings().weight
    assert len(tokenizer) == net.config.vocab_size == 49_152
    # Its pre-tokenizer takes digits one by one, and no BOS is added.
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 2024")["input_ids"]) == [
        "In",
        "Ġ",
        *"2024",
    ]


def test_the_embedded_model_knows_what_it_was_taught(smollm2: Loaded) -> None:
    for text, word, share in (
        ("The capital of France is", " Paris", 0.7),
        ("The opposite of hot is", " cold", 0.6),
    ):
        chances = last_logits(smollm2, text).softmax(-1)
        assert smollm2[1].decode(chances.argmax()) == word
        assert chances.max() > share


@pytest.mark.parametrize("name", ["rotten_tomatoes", "rte"])
def test_label_words_are_one_token_for_the_embedded_model(
    smollm2: Loaded, name: str, tmp_path: Path
) -> None:
    cfg = node("task", name)
    if name == "rte":
        row = {"premise": "Cats sleep.", "hypothesis": "A cat sleeps.", "label": "entailment"}
        for file in ("train.jsonl", "val.jsonl"):
            (tmp_path / file).write_text(f"{json.dumps(row)}\n" * 2)
        cfg |= {"data_dir": str(tmp_path), "num_train": 1, "num_dev": 1}
    try:
        task = load_task(cfg, data_seed=0, cache=fetch.cache_dir())
    except UserError as error:
        pytest.skip(f"the sentences cannot be had here: {error}")
    assert one_token_share(smollm2[1], task) == 1
