"""Check that a sum over ranks works here, with one rank."""

import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from gpu_check.rows import Place, Row, row, skipped

ENTRIES = 1 << 18


def check(place: Place) -> Iterator[Row]:
    """Yield whether an all_reduce gives the numbers of the only rank; nccl on CUDA, else gloo."""
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    is_there = dist.is_available() and getattr(dist, f"is_{backend}_available")()
    name = f"all_reduce: {backend}, one rank"
    if not is_there:
        yield skipped(name, f"this torch has no {backend}")
        return
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        limit = timedelta(seconds=max(5.0, place.left))
        device = place.device if backend == "nccl" else None
        dist.init_process_group(
            backend, init_method=store, rank=0, world_size=1, timeout=limit, device_id=device
        )
        try:
            given = torch.arange(ENTRIES, dtype=torch.float32, device=place.device)
            found = given.clone()
            dist.all_reduce(found)  # the first one connects
            place.wait()
            start = time.perf_counter()
            dist.all_reduce(found)
            place.wait()
            spent = time.perf_counter() - start
            yield row(name, torch.equal(found, given), entries=ENTRIES, ms=1e3 * spent)
        finally:
            dist.destroy_process_group()
