"""Make the sound files that cases spoil copies of."""

import contextlib
import functools
import io
import os
import shutil
from pathlib import Path
from typing import Any

from fuzz import product
from fuzz.cases import Case

QUICK = (
    *("model=tiny-llama", "device=cpu", "steps=1", "batch_size=2", "compile=false"),
    *("task.num_train=4", "task.num_dev=2", "task.num_test=2", "method.executor=sequential"),
)


RUN = (
    *("task=toy", "method=sparse_mezo", "lr=1e-3", "steps=4", "eval_every=2", "keep=all"),
    *(word for word in QUICK if word != "steps=1"),
)
ADAMW = (
    *("task=toy", "method=adamw", "lr=1e-3", "lr_schedule=constant", "steps=4", "eval_every=2"),
    *(w for w in QUICK if w not in ("steps=1", "compile=false", "method.executor=sequential")),
)


@functools.cache
def settings_of(*words: str) -> Any:
    """Return checked settings, composed once a worker."""
    return product.check(product.compose(words))


@functools.cache
def tiny_model() -> tuple[Any, Any]:
    """Return tiny-llama and its tokenizer, loaded once a worker."""
    return load_cpu(settings_of("task=toy", "model=tiny-llama").model, Path("cache"))


def load_cpu(node: Any, cache: Path) -> tuple[Any, Any]:
    """Load the model of these settings as a run on a CPU does."""
    import torch

    device = torch.device("cpu")
    return product.load_model(node, dtype=torch.float32, device=device, cache=cache)


def train(case: Case, run: Path, which: str) -> None:
    """The command that trained a fixture, in the folder of a copy."""
    (case.folder / "runs" / "default").mkdir(parents=True)
    name = (case.fixtures / f"{which}.name").read_text()
    shutil.move(run, case.folder / "runs" / "default" / name)
    longer = ["steps=5"] if which == "adamw" and case.chance(0.5) else []
    case.smezo("train", *(RUN if which == "run" else ADAMW), *longer)


def restore(scratch: Path) -> None:
    """The surroundings as they were."""
    for name in ("outside", "home", "cache"):
        shutil.rmtree(scratch / name, ignore_errors=True)
        (scratch / name).mkdir()
    (scratch / "outside" / "keep.txt").write_text("keep\n")


def prepare(scratch: Path) -> None:
    """Sound files to spoil: finished runs, a saved model, a delta, a GGUF file."""
    import gguf as library
    import torch

    torch.set_num_threads(1)
    restore(scratch)
    (scratch / "tmp").mkdir()
    fixtures = scratch / "fixtures"
    fixtures.mkdir()
    os.chdir(fixtures)
    with contextlib.redirect_stdout(io.StringIO()):
        for name, words in (("run", RUN), ("adamw", ADAMW)):
            if product.main(["train", *words]) != 0:
                raise SystemExit("fuzz: the run to be spoiled cannot be made; see above.")
            (run,) = Path("runs/default").iterdir()
            Path(f"{name}.name").write_text(run.name)
            shutil.move(run, name)
        for words in (("run", "model"), ("run", "tiny.delta", "--delta")):
            if product.main(["export", *words]) != 0:
                raise SystemExit("fuzz: the model to be spoiled cannot be made; see above.")
    shutil.rmtree("runs")
    net = tiny_model()[0]
    writer = library.GGUFWriter("tiny.gguf", "llama")
    config = net.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = ["a", "b", "ab", *(f"t{k}" for k in range(3, config.vocab_size))]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}
    parts |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    parts |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    parts |= {"post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm"}
    parts |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts |= {"model.layers.": "blk."}
    for name, tensor in net.state_dict().items():
        if name != "lm_head.weight":
            for old, new in parts.items():
                name = name.replace(old, new)
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
