#!/usr/bin/env python
"""What bfloat16 adds to a projected gradient, against eps.

    .venv/bin/python scripts/low_precision.py

The embedded model on batches of its own data. For each eps and each of the same directions and
batches the projected gradient is measured in float32, with float32 weights computed in bfloat16,
and with bfloat16 weights. Printed, as a Markdown table: the root mean square of the float32
ones, and that of the differences from them. Weights are only read.
"""

import argparse
import json
import os
from pathlib import Path

import torch

from smezo_cli.config.compose import compose
from smezo_cli.config.settings import check
from smezo_cli.files.fetch import cache_dir
from smezo_cli.methods.sparse_mezo import SparseMeZO
from smezo_cli.run.batches import Batches
from smezo_cli.run.loaded import Loaded

KINDS = {  # name: dtype of the weights, of the forward pass
    "float32": ("float32", "float32"),
    "float32 weights, bfloat16 compute": ("float32", "bfloat16"),
    "bfloat16": ("bfloat16", "bfloat16"),
}


def projected_grads(
    kind: str, sparsity: float, eps: list[float], directions: int
) -> dict[float, torch.Tensor]:
    """(directions,) float64 by eps; direction k is that of step k, on the batch of step k."""
    dtype, compute = KINDS[kind]
    settings = check(compose([f"dtype={dtype}", f"compute_dtype={compute}"]))
    job = Loaded(settings, "cpu", lambda line: None)
    prompt = job.prompts[0]
    rows = [c for c in job.encode(job.task.train, prompt) if c.width <= 40]
    batches = Batches(rows, settings.batch_size, 0, settings.batch_order)
    method = SparseMeZO(
        job.model, lr=1e-9, eps=1e-3, sparsity=sparsity, executor="sequential", check=False
    )
    found: dict[float, list[float]] = {e: [] for e in eps}
    with torch.no_grad():
        for step in range(directions):
            batch = [rows[i] for i in batches(step)]
            method.num_steps = step
            method.direction.begin(method.num_steps)
            for e in eps:
                pair = method.executors.used.losses(
                    lambda: job.scorer.loss(batch),  # noqa: B023  # called at once
                    [method.mover([0], [e]), method.mover([0], [-e])],
                )
                plus, minus = (float(x) for x in pair)
                found[e].append((plus - minus) / (2 * e))
    return {e: torch.tensor(values, dtype=torch.float64) for e, values in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directions", type=int, default=24)
    parser.add_argument("--eps", default="1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1")
    parser.add_argument("--sparsity", default="0,0.75")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("SMEZO_CACHE", str(cache_dir()))
    eps = [float(e) for e in given.eps.split(",")]
    records = []
    print("| sparsity | eps | rms in float32 | " + " | ".join(f"added: {k}" for k in [*KINDS][1:]))
    print("|---|---|---|" + "---|" * (len(KINDS) - 1))
    for sparsity in map(float, given.sparsity.split(",")):
        found = {k: projected_grads(k, sparsity, eps, given.directions) for k in KINDS}
        for e in eps:
            exact = found["float32"][e]
            rms = {"float32": float(exact.square().mean().sqrt())}
            rms |= {k: float((found[k][e] - exact).square().mean().sqrt()) for k in [*KINDS][1:]}
            records.append({"sparsity": sparsity, "eps": e, "rms": rms})
            print(
                f"| {sparsity:g} | {e:g} | " + " | ".join(f"{v:.3g}" for v in rms.values()) + " |"
            )
    if given.json is not None:
        given.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
