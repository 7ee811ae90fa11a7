"""Call a tokenizer of unknown origin, and report what its library fails on in one sentence.

The tokenizers library panics at some regular expressions, normalizers and character maps. A panic
is no ``Exception`` in Python, and has been written to the standard error before it is raised.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from smezo_cli.errors import UserError, first_line


@contextmanager
def panics_as_exceptions() -> Iterator[None]:
    """Raise a panic within the context as a ``ValueError`` of its first line; print nothing of it.

    What else is written to the standard error is passed on at the end.
    """
    try:
        own = os.dup(2)
    except OSError:  # it is closed
        own = None
    if own is None or not hasattr(os, "memfd_create"):  # without a file in memory it is seen
        with _caught():
            yield
        return
    said = os.memfd_create("panics")
    os.dup2(said, 2)
    panicked = False
    try:
        with _caught():
            yield
    except _Panic:
        panicked = True
        raise
    finally:
        os.dup2(own, 2)
        os.close(own)
        size = os.lseek(said, 0, os.SEEK_CUR)
        if size and not panicked:
            with suppress(OSError):  # nobody may read it any more
                os.write(2, os.pread(said, size, 0))
        os.close(said)


class _Panic(ValueError):
    """Say that the tokenizers library failed or panicked."""


@contextmanager
def _caught() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # The library raises Exception itself, and pyo3's class of panics cannot be imported.
        if type(error) is not Exception and type(error).__module__ != "pyo3_runtime":
            raise
        raise _Panic(first_line(error)) from None


def encoded(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Return the token ids of each text.

    Args:
        tokenizer: of transformers.
        texts: any number.
        options: of the tokenizer.

    Raises:
        UserError: the tokenizer cannot take one of them.
    """

    def ids(some: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(list(some), verbose=False, **options)["input_ids"]
        return found

    if not texts:
        return []
    try:
        with panics_as_exceptions():
            return ids(texts)
    except _Panic as error:
        raise UserError(
            f"the model's tokenizer cannot take the text {_first_that_fails(texts, ids)!r} "
            f"({error}): mend its tokenizer.json, or choose another model."
        ) from error


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of token ids, without special tokens.

    Raises:
        UserError: the tokenizer cannot make one.
    """
    try:
        with _caught():
            text: str = tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
    except _Panic as error:
        raise UserError(
            f"the model's tokenizer cannot make a text of the tokens {list(ids)[:8]} ({error}): "
            "mend its tokenizer.json, or choose another model."
        ) from error
    return text


def _first_that_fails(texts: Sequence[str], ids: Callable[[Sequence[str]], list[list[int]]]) -> str:
    for text in texts:
        try:
            with panics_as_exceptions():
                ids([text])
        except _Panic:
            return text if len(text) <= 60 else f"{text[:57]}..."
    return ""  # together alone
