"""What volunteers on home links would do for a 7B model: arithmetic on measured bytes.

    python scripts/volunteers.py [--link LINK.json] [--KEY VALUE ...]

Bytes of a step come from scripts/slow_link.py (`--json`). Everything else is assumed, is printed,
and can be given: seconds that a step takes whatever its rows (reading and moving the weights),
seconds a row (both forwards), the links, how often a volunteer is late or leaves. A step waits for
the slowest volunteer; rank 0 sends to and hears from each of the others over its own link. Who
leaves ends the step for all: the rest, and one who comes instead, start again, load the model and
apply the recorded steps. A line is the mean of `--plays` runs of `--steps` steps with random links,
lateness and losses, keyed by (seed, volunteers, rows, play).
"""

import argparse
import json
import math
import random
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass
class Assumed:
    """What is not measured here."""

    steps: float = 20000  # of a run
    fixed_s: float = (
        0.15  # a step: weights read twice, noise drawn, an update (7B, one consumer GPU)
    )
    row_s: float = 0.02  # a row: two forwards over some 64 tokens
    delay_s: float = 0.04  # one way, median over volunteers
    delay_spread: float = 0.6  # of its logarithm, drawn once a volunteer
    rate_bits: float = 1e6  # up and down, rank 0's
    late: float = 0.001  # chance that a volunteer is late in a step
    late_s: float = 2.0  # by so much
    stay_h: float = 8.0  # mean time until a volunteer leaves
    notice_s: float = 30.0  # until its loss is noticed and the rest have met again
    load_s: float = 60.0  # of the model from a disk
    replay_s: float = 0.05  # a recorded step that is applied again
    plays: float = 20
    seed: float = 0


def hours(a: Assumed, volunteers: int, rows: int, bytes_per_step: float) -> tuple[float, ...]:
    """Hours of a run: all, computing, exchanging, waiting for the late, starting again."""
    plays = range(int(a.plays) if volunteers > 1 else 1)
    found = [_play(a, volunteers, rows, bytes_per_step, play) for play in plays]
    return tuple(sum(column) / len(found) for column in zip(*found, strict=True))


def _play(
    a: Assumed, volunteers: int, rows: int, bytes_per_step: float, play: int
) -> tuple[float, ...]:
    draw = random.Random(f"{a.seed}/{volunteers}/{rows}/{play}")
    others = volunteers - 1
    slowest = max(
        (a.delay_s * math.exp(draw.gauss(0, a.delay_spread)) for _ in range(others)), default=0.0
    )
    compute = a.fixed_s + a.row_s * math.ceil(rows / volunteers)
    exchange = 2 * slowest + others * bytes_per_step * 8 / a.rate_bits if others else 0.0
    spent = {"compute": 0.0, "exchange": 0.0, "late": 0.0, "again": 0.0}
    left = draw.expovariate(volunteers / (3600 * a.stay_h)) if others else math.inf
    someone_late = 1 - (1 - a.late) ** volunteers if others else 0.0
    for step in range(int(a.steps)):
        late = a.late_s if draw.random() < someone_late else 0.0
        spent["compute"] += compute
        spent["exchange"] += exchange
        spent["late"] += late
        left -= compute + exchange + late
        if left < 0:  # another takes the place: the number stays
            spent["again"] += a.notice_s + a.load_s + a.replay_s * step
            left = draw.expovariate(volunteers / (3600 * a.stay_h))
    total = sum(spent.values())
    return tuple(seconds / 3600 for seconds in (total, *spent.values()))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--link", type=Path)
    parser.add_argument("--volunteers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 128])
    for one in fields(Assumed):
        parser.add_argument(f"--{one.name}", type=float, default=one.default)
    asked = vars(parser.parse_args())
    bytes_per_step = 400.0
    if asked["link"] is not None:
        bytes_per_step = max(json.loads(asked["link"].read_text())["bytes_per_step"])
    assumed = Assumed(**{one.name: asked[one.name] for one in fields(Assumed)})
    words = ", ".join(f"{k} {v:g}" for k, v in vars(assumed).items())
    print(f"{bytes_per_step:.0f} bytes a step and rank; assumed: {words}\n")
    names = ["rows", "volunteers", "hours", "computing", "exchange", "late", "again"]
    names += ["speed-up", "a volunteer"]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for rows in asked["rows"]:
        alone = hours(assumed, 1, rows, bytes_per_step)[0]
        for volunteers in asked["volunteers"]:
            if volunteers <= rows:
                total, *parts = hours(assumed, volunteers, rows, bytes_per_step)
                shares = " | ".join(f"{100 * part / total:.0f}%" for part in parts)
                up = alone / total
                print(
                    f"| {rows} | {volunteers} | {total:.1f} | {shares} | {up:.2f} x "
                    f"| {100 * up / volunteers:.0f}% |"
                )


if __name__ == "__main__":
    main()
