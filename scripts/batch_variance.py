#!/usr/bin/env python
"""What the classes of a batch add to the variance of a projected gradient.

    .venv/bin/python scripts/batch_variance.py

The embedded job before training, seed 0. For each of some directions the projected gradient of
every row is measured (the central difference of its loss at eps 1e-3). Printed: their variance,
which over the rows of a batch is that of a shuffled one's mean; and the variance within the
classes, which is that of a stratified one's (up to the row or two by which it misses its share).
Weights are only read.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch.nn import functional as F

from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.files.fetch import cache_dir
from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.run.loaded import Loaded

EPS = 1e-3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directions", type=int, default=8)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("SMEZO_CACHE", str(cache_dir()))
    settings = check(compose(["dtype=float32"]))
    job = Loaded(settings, "cpu", lambda line: None)
    longest = settings.task["max_train_tokens"]
    rows = [c for c in job.encode(job.task.train, job.prompts[0]) if c.width <= longest]
    batches = [rows[i : i + settings.batch_size] for i in range(0, given.rows, settings.batch_size)]
    labels = torch.tensor([row.label for batch in batches for row in batch])
    method = SparseMeZO(
        job.model,
        lr=1e-9,
        eps=EPS,
        sparsity=settings.sparsity,
        freeze=["*embed_tokens*", "*norm*"],
        executor="sequential",
        check=False,
    )
    losses: list[torch.Tensor] = []

    def loss(batch: list) -> torch.Tensor:
        target = torch.tensor([row.label for row in batch])
        losses.append(F.cross_entropy(job.scorer.scores(batch), target, reduction="none"))
        return losses[-1].mean()

    found = []
    print("| direction | variance over rows | within classes | ratio |\n|---|---|---|---|")
    for k in range(given.directions):
        method.num_steps = k
        method.direction.begin(method.num_steps)
        losses.clear()
        with torch.no_grad():
            for batch in batches:
                method.executors.used.losses(
                    lambda: loss(batch),  # noqa: B023  # called at once
                    [method.mover([0], [EPS]), method.mover([0], [-EPS])],
                )
        plus, minus = torch.cat(losses[::2]).double(), torch.cat(losses[1::2]).double()
        grads = (plus - minus) / (2 * EPS)
        within = sum(
            (labels == c).double().mean() * grads[labels == c].var() for c in labels.unique()
        )
        found.append({"over_rows": float(grads.var()), "within_classes": float(within)})
        print(
            f"| {k} | {grads.var():.1f} | {within:.1f} | {grads.var() / within:.2f} |", flush=True
        )
    whole, part = (sum(f[key] for f in found) for key in ("over_rows", "within_classes"))
    print(f"| all | {whole / len(found):.1f} | {part / len(found):.1f} | {whole / part:.2f} |")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
