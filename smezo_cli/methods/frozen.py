"""Methods that take no steps and leave the model as it is: zero-shot and in-context learning."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from smezo_cli.errors import UserError

SEPARATOR = "\n\n"  # between demonstrations, and between them and the row, as in MeZO


class ZeroShot:
    """The model as it came, asked with the prompt that is best on dev."""


class InContext:
    """Some labelled training rows before every row (MeZO, arXiv 2305.17333, appendix E).

    They are drawn at random, as in MeZO, by ``seed`` alone, and are the same for all rows.

    Args:
        num_demonstrations: rows shown, or as many as there are and fit.
        seed: keys the draw.
    """

    def __init__(self, *, num_demonstrations: int, seed: int = 0) -> None:
        self.num_demonstrations = num_demonstrations
        self.seed = seed

    def drawn(self, num_rows: int) -> list[int]:
        """Indices of the rows to show, in the order in which they are shown."""
        order = list(range(num_rows))
        random.Random(f"{self.seed}/demonstrations").shuffle(order)
        return order[: self.num_demonstrations]

    def choose(
        self,
        examples: Sequence[tuple[str, str]],
        count: Callable[[str], int],
        limit: int,
        longest: int,
    ) -> dict[str, Any]:
        """Of the training rows what is shown.

        As many of those drawn are shown, the first ones, as leave room for the longest row, or for
        half of the window where that row takes more: such rows lose tokens on the left, which are
        those of the first demonstrations.

        Args:
            examples: id of each training row, and its prompt with the right answer.
            count: tokens of a text.
            limit: tokens of the window.
            longest: tokens of the longest row that is to be asked.

        Returns:
            Plain values for the run: ``asked``, ``used``, their ``tokens`` (what parts them
            included), the ``rows`` by id, and the ``text`` that stands before every row.

        Raises:
            UserError: there is no room for a single one.
        """
        rows = [examples[i] for i in self.drawn(len(examples))]
        room = limit - min(longest, limit // 2)
        for used in range(len(rows), 0, -1):
            text = "".join(shown.strip() + SEPARATOR for _, shown in rows[:used])
            tokens = count(text)
            if tokens <= room:
                return {
                    **{"asked": self.num_demonstrations, "used": used, "tokens": tokens},
                    **{"rows": [name for name, _ in rows[:used]], "text": text},
                }
        raise UserError(
            f"method.num_demonstrations={self.num_demonstrations}: not one of them fits beside a "
            f"row into the {limit} tokens of a prompt; raise model.max_length, or choose "
            "method=zero_shot."
        )
