"""Turn texts into token ids for a model, and choose the token that pads batches of them."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from smezo_cli.errors import UserError
from smezo_cli.scoring.tokenization import encoded


def token_ids(tokenizer: Any, texts: Sequence[str], *, goes_on: bool = True) -> list[list[int]]:
    """Return the token ids of each text, behind the special tokens that begin a text.

    Args:
        tokenizer: of transformers.
        texts: any number.
        goes_on: the model goes on behind the text, so that nothing which ends one (EOS, SEP) may
            stand there, whatever the tokenizer appends; False for masked models.

    Raises:
        UserError: the tokenizer cannot take one of them.
    """
    if not texts:
        return []
    found = encoded(tokenizer, texts)
    size = len(appended(tokenizer)) if goes_on else 0
    return [ids[: len(ids) - size] for ids in found] if size else found


def appended(tokenizer: Any) -> list[int]:
    """Return the special tokens that a tokenizer of transformers puts behind every text."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return []
    for text in ("a", "0", "."):  # a normalizer may leave nothing of one
        whole, bare = (
            encoded(tokenizer, [text], add_special_tokens=special)[0] for special in (True, False)
        )
        # From the right: in front may stand the very token that the text is.
        for start in range(len(whole) - len(bare), -1, -1):
            if bare and whole[start : start + len(bare)] == bare:
                return whole[start + len(bare) :]
    return []


def num_rows(model: nn.Module) -> int | None:
    """Return how many tokens the embedding of the model has rows for; None where none is found."""
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find() if find is not None else None, "weight", None)
    return None if weight is None else len(weight)


def padding_id(tokenizer: Any, model: nn.Module) -> int:
    """Return a token to pad with, which has a row in the embedding of the model.

    That of the tokenizer if it has such a one, else the first of the vocabulary: padding is hidden
    from all that is read, so any token serves.
    """
    pad, rows = tokenizer.pad_token_id, num_rows(model)
    fits = isinstance(pad, int) and pad >= 0 and (rows is None or pad < rows)
    return pad if fits else 0


def check_rows(tokenizer: Any, model: nn.Module, row: str, ids: Iterable[int]) -> None:
    """Raise UserError where a token of a row has none in the embedding of the model."""
    rows = num_rows(model)
    if rows is None or (highest := max(ids, default=0)) < rows:
        return
    raise UserError(
        f"row {row}: its token {tokenizer.convert_ids_to_tokens(highest)!r} has the number "
        f"{highest}, and the embedding of the model has {rows} rows, 0 to {rows - 1}: the "
        "tokenizer has tokens that the model was not given rows for; give the model its own "
        "tokenizer, or resize its embedding (resize_token_embeddings) and save it."
    )
