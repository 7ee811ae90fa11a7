"""Build the tiny random models of tests and first runs, and their tokenizer of bytes."""

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from smezo_cli.errors import UserError
from smezo_cli.models.architecture import WORDS, architecture, from_config


def tiny_model(
    cfg: Mapping[str, Any], dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build a random model of `cfg.config`, and its tokenizer.

    Vectors are as built, matrices normal with variance 1 / fan-in.
    """
    tiny = dict(cfg["tiny"])
    for key, kind, words in (
        ("seed", int, "a whole number"),
        ("add_bos", bool, "true or false"),
        ("add_eos", bool, "true or false"),
    ):
        if type(tiny.setdefault(key, kind())) is not kind:
            raise UserError(f"model.tiny.{key}={tiny[key]}: it must be {words}.")
    tokenizer = byte_tokenizer(
        add_bos=tiny["add_bos"],
        add_eos=tiny["add_eos"],
        add_mask=cfg.get("family") == "masked",
    )
    config = architecture(cfg)
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"model.config.vocab_size={config.vocab_size}: the built-in tokenizer has "
            f"{len(tokenizer)} tokens; set model.config.vocab_size={len(tokenizer)}."
        )
    # The constructor draws from the global generator: its state is put back, its draws replaced.
    with torch.random.fork_rng(devices=[]):
        model = from_config(config, cfg, torch.float32)
    generator = torch.Generator().manual_seed(tiny["seed"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    nn.Module.to(model, dtype)
    return model, tokenizer


def byte_tokenizer(
    *, add_bos: bool, add_eos: bool = False, add_mask: bool = False
) -> PreTrainedTokenizerBase:
    """Make a byte-level tokenizer: any text encodes, and each of `WORDS` is one token.

    `add_bos` and `add_eos` put `<s>` and `</s>` around a text; `add_mask` adds `<mask>` at the end
    of the vocabulary.
    """
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [start + word for word in WORDS for start in ("", "Ġ")]  # Ġ is the byte of a blank
    tokens = specials + alphabet + words + ["<mask>"] * add_mask
    vocab = {token: index for index, token in enumerate(tokens)}
    # Without merges a word that is in the vocabulary is taken whole, any other byte by byte.
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>", ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos or add_eos:
        around = f"{'<s> ' * add_bos}$A{' </s>' * add_eos}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(token, vocab[token]) for token in ("<s>", "</s>")]
        )
    fast: Any = PreTrainedTokenizerFast  # its constructor has no types
    wrapped: PreTrainedTokenizerBase = fast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **({"mask_token": "<mask>"} if add_mask else {}),
    )
    return wrapped
