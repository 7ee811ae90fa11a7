"""Keep the scores of evaluations that were stopped between two batches, until they are used.

    RUN/scores-partial.safetensors

The file says what its scores belong to: a SHA-256 of all weights, the step, the settings that a
score depends on, and of each evaluation the rows, each by a digest of its id and its tokens. Of
other weights or rows, or damaged, it is not used. Whole batches are kept: so what is left is cut
into the batches that it would have been, and every score has the bits that it would have had.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smezo_cli import __version__
from smezo_cli.errors import UserError
from smezo_cli.scoring.candidates import Candidates
from smezo_cli.store.saved import Saved, save_tensors, tensors_digest
from smezo_cli.zo.step import NUMERICS

NAME = "scores-partial.safetensors"


class Part:
    """Hold what is known of the rows of one evaluation.

    Args:
        num_rows: of the evaluation.
        scored: rows, by their place, whose scores are known here or to rank 0.
        answered: the same of answers.

    Attributes:
        scores: a row each, (num_rows, most candidates of a row) float32, or hidden states
            (num_rows, size) float64; zeros where nothing is known. None where no row was scored.
        texts: answers by the place of their row.
        num_forwards: that it took.
        seconds: that it took, where that counts.
    """

    def __init__(
        self, num_rows: int, scored: Sequence[int] = (), answered: Sequence[int] = ()
    ) -> None:
        self.num_rows, self.num_forwards, self.seconds = num_rows, 0, 0.0
        self.scored, self.answered = set(scored), set(answered)
        self.scores: Tensor | None = None
        self.texts: dict[int, Any] = {}

    def table(self, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return :attr:`scores`, made where they are None."""
        if self.scores is None:
            self.scores = torch.zeros(self.num_rows, width, dtype=dtype)
        return self.scores

    def num_done(self, kind: str) -> int:
        """Return how many rows need nothing more; those of generation have an answer by then."""
        return len(self.answered if kind == "generation" else self.scored)

    @property
    def is_empty(self) -> bool:
        """Say whether nothing is known."""
        return not self.scored and not self.answered


class PartialScores:
    """Hold the parts of the evaluations that were made since results were last saved.

    Args:
        path: of the file; nothing is written before :meth:`keep`.
        model: whose weights the scores are of.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        self.path, self._model = path, model
        self._about: dict[str, Any] = {}
        self._parts: dict[str, tuple[Part, list[str]]] = {}  # by the digest of all their rows
        self._found: dict[str, Any] | None = (
            None  # what the file says, where it is of these weights
        )

    def part(self, about: Mapping[str, Any], split: str, rows: Sequence[Candidates]) -> Part:
        """Return what is known of an evaluation, to be filled by it.

        Args:
            about: plain JSON; what the scores depend on beside weights and rows, the step too.
            split: of the rows.
            rows: all of them.
        """
        about = {"smezo": [__version__, NUMERICS], **about}
        if about != self._about:  # the evaluations before were of other weights
            self._about, self._parts = about, {}
            self._found = self._load()
        keys = keys_of(split, rows)
        name = hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()[:32]
        if name not in self._parts:
            self._parts[name] = self._filled(name, keys), keys
        return self._parts[name][0]

    def forget(self) -> None:
        """Drop the evaluations so far: their results are saved, or soon will be."""
        self._parts = {}

    def keep(self) -> int:
        """Write what is known; return the number of rows.

        Raises:
            UserError: the file cannot be written.
        """
        known = {name: of for name, of in self._parts.items() if not of[0].is_empty}
        if not known:
            return 0
        entries, tensors, count = {}, {}, 0
        for name, (part, keys) in known.items():
            scored = sorted(part.scored)
            count += len(part.answered or scored)
            entries[name] = {
                "scored": [keys[i] for i in scored],
                "texts": {keys[i]: part.texts[i] for i in sorted(part.answered)},
                "num_forwards": part.num_forwards,
                "seconds": part.seconds,
            }
            if part.scores is not None:
                tensors[name] = part.scores[scored]
        for name, entry in (self._found or {}).items():  # of evaluations that were not reached yet
            if name not in known:
                entries[name] = {key: value for key, value in entry.items() if key != "scores"}
                if "scores" in entry:
                    tensors[name] = entry["scores"]
        content = {"about": self._about, "weights": self._weights(), "parts": entries}
        text = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        save_tensors(self.path, {"json": text, **tensors})
        return count

    def remove(self) -> None:
        """Remove the file; nothing where there is none."""
        self.forget()
        self._found = None
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _weights(self) -> str:
        return tensors_digest(dict(self._model.named_parameters()))

    def _load(self) -> dict[str, Any] | None:
        """Return what the file holds; None if it is of something else, damaged or missing."""
        if not self.path.is_file():
            return None
        try:
            saved = Saved(self.path)
            if not saved.is_whole():
                return None
            content = json.loads(saved["json"].numpy().tobytes())
            if content["about"] != self._about or content["weights"] != self._weights():
                return None
            parts: dict[str, Any] = content["parts"]
            for name, entry in parts.items():
                if name in saved:
                    entry["scores"] = saved[name]
            return parts
        except (UserError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def _filled(self, name: str, keys: Sequence[str]) -> Part:
        part, entry = Part(len(keys)), (self._found or {}).get(name)
        if entry is None:
            return part
        place = {key: i for i, key in enumerate(keys)}
        try:
            scored = [place[key] for key in entry["scored"]]
            texts = {place[key]: text for key, text in entry["texts"].items()}
            if scored:
                rows: Tensor = entry["scores"]
                part.table(rows.shape[1], rows.dtype)[scored] = rows
            part.texts, part.num_forwards = texts, int(entry["num_forwards"])
            part.seconds = float(entry.get("seconds", 0.0))  # a file may be older than this key
            part.scored, part.answered = set(scored), set(texts)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            return Part(len(keys))
        return part


def keys_of(split: str, rows: Sequence[Candidates]) -> list[str]:
    """Return a digest of each row: its split, its id, its tokens, how often it came before."""
    seen, keys = Counter[str](), []
    for row in rows:
        text = f"{split} {row!r}"
        keys.append(hashlib.sha256(f"{seen[text]} {text}".encode()).hexdigest()[:32])
        seen[text] += 1
    return keys
