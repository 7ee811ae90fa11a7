#!/usr/bin/env python
"""Where the masked weights have a gradient that rows agree on.

    .venv/bin/python scripts/gradient_shares.py
    .venv/bin/python scripts/gradient_shares.py --prompt 1 --sparsity 0 --longest 24

The embedded job before training. For each kind of linear layer and each first block that is
trained, over the small part of each tensor (a quarter; with --sparsity 0 all of it): its share of
the squared norm of the mean gradient (what a step can win), of the mean squared norm of a row's own
gradient (what bounds the step size), and the ratio of the two. Weights are only read.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.files.fetch import cache_dir
from smezo_cli.run.loaded import Loaded

KINDS = {
    "all linear layers": ("q", "k", "v", "o", "gate", "up", "down"),
    "q, k, v": ("q", "k", "v"),
    "q, k": ("q", "k"),
    "v": ("v",),
    "MLP": ("gate", "up", "down"),
}
BLOCKS = [0, 8, 12, 14, 16, 18, 20, 22, 26]


def shares_of(
    job: Loaded, num_rows: int, prompt: int, sparsity: float, longest: int
) -> dict[tuple[str, int], tuple[float, float]]:
    """Both squared norms by the kind of layer and its block; that of the mean is unbiased."""
    rows = [c for c in job.encode(job.task.train, job.prompts[prompt]) if c.width <= longest]
    named = {}
    for name, p in job.model.named_parameters():
        p.requires_grad_(".layers." in name and name.endswith("_proj.weight"))
        if p.requires_grad:
            size = p.detach().abs()
            h = size.flatten().kthvalue(round((1 - sparsity) * p.numel())).values
            named[name] = p, size <= h
    sums = {name: torch.zeros(int(m.sum()), dtype=torch.float64) for name, (_, m) in named.items()}
    squares = dict.fromkeys(named, 0.0)
    for row in rows[:num_rows]:
        job.model.zero_grad()
        job.scorer.loss([row]).backward()
        for name, (p, mask) in named.items():
            grad = p.grad[mask].double()
            sums[name] += grad
            squares[name] += float(grad @ grad)
    found = {}
    for name in named:
        _, block, _, layer, _ = name.removeprefix("model.").split(".")
        of_mean = float(sums[name] @ sums[name]) - squares[name]
        key = layer.removesuffix("_proj"), int(block)
        found[key] = of_mean / (num_rows * (num_rows - 1)), squares[name] / num_rows
    return found


def table(
    found: Mapping[tuple[str, int], tuple[float, float]], blocks: Sequence[int]
) -> list[dict[str, object]]:
    """The shares of the layers of each kind from each block on."""
    whole = [sum(of[k] for of in found.values()) for k in range(2)]
    lines: list[dict[str, object]] = []
    for kind, layers in KINDS.items():
        for first in blocks:
            chosen = [
                of for (name, block), of in found.items() if name in layers and block >= first
            ]
            mean, row = (sum(of[k] for of in chosen) / whole[k] for k in range(2))
            lines.append({"layers": kind, "first": first, "mean": mean, "row": row})
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=0)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--longest", type=int, default=40, help="tokens of a row, at most")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, help="first ones trained")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("SMEZO_CACHE", str(cache_dir()))
    job = Loaded(check(compose(["dtype=float32"])), "cpu", lambda line: None)
    shares = shares_of(job, given.rows, given.prompt, given.sparsity, given.longest)
    lines = table(shares, given.blocks)
    print("| layers | from block | of the mean's | of a row's own | ratio |\n|---|---|---|---|---|")
    for line in lines:
        mean, row = line["mean"], line["row"]
        print(f"| {line['layers']} | {line['first']} | {mean:.4f} | {row:.4f} | {mean / row:.2f} |")
    if given.json is not None:
        given.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
