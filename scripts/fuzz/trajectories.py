"""Kind `trajectory`: the trajectory.bin of a run folder from elsewhere."""

import contextlib
import json
import math
import os
import random
import shutil
import struct
import zlib
from collections.abc import Sequence

from fuzz.cases import Case, kind
from fuzz.fixtures import train
from fuzz.hostile import as_json, hostile, number, reseal, spoil_bytes, spoil_tree

_FLOATS = (
    *(math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e308, -1e308, 5e-324, 1e-320),
    *(1e38, 3.5e38, 1e30, 1e150, 2.0**53),
)


def floats(rng: random.Random, data: bytearray, form: str, places: Sequence[int]) -> None:
    """Some hostile numbers at some of the places."""
    for at in rng.sample(list(places), min(len(places), rng.choice((1, 1, 2, 9)))):
        with contextlib.suppress(OverflowError):
            struct.pack_into(form, data, at, rng.choice(_FLOATS))


def rechained(header: bytes, rows: Sequence[bytes], length: int | None = None) -> bytes:
    """A trajectory.bin with checksums that are right."""
    start = struct.pack("<8sII", b"SMEZOTRJ", 1, len(header) if length is None else length)
    crc = zlib.crc32(start + header)
    content = start + header + struct.pack("<I", crc)
    for row in rows:
        crc = zlib.crc32(row, crc)
        content += row + struct.pack("<I", crc)
    return content


def spoil_trajectory(rng: random.Random, data: bytes) -> bytes:
    """A trajectory.bin that is not what a run has written."""
    (length,) = struct.unpack_from("<I", data, 12)
    header, content = data[16 : 16 + length], data[20 + length :]
    rows = [content[at : at + 32] for at in range(0, len(content), 36)]
    how = rng.randrange(10)
    if how < 2:
        return spoil_bytes(rng, data)
    if how == 2:
        spoiled = bytearray(data)
        struct.pack_into("<I", spoiled, rng.choice((8, 12, 16 + length)), number(rng, 32))
        return bytes(spoiled)
    if how in (3, 4):
        tree = json.loads(header)
        if rng.random() < 0.3:
            tree["identity"]["num_queries"] = rng.choice((0, -1, 2, 7, 4096, 4097, 2**40, 1.0))
        elif rng.random() < 0.5:
            tree[rng.choice(list(tree))] = hostile(rng)
        else:
            tree = spoil_tree(rng, tree)
        header = as_json(tree)
    if how == 5:
        header = spoil_bytes(rng, header)
    if how in (6, 7) and rows:
        for _ in range(rng.choice((1, 4))):
            at = rng.randrange(len(rows))
            row = bytearray(rows[at])
            if rng.random() < 0.2:
                struct.pack_into("<I", row, 0, number(rng, 32))
            elif rng.random() < 0.2:
                struct.pack_into("<f", row, 20, rng.choice((math.nan, math.inf, 3e38, -3e38, -1.0)))
            else:
                floats(rng, row, "<d", (4, 12, 24))
            rows[at] = bytes(row)
    if how == 8:
        count = rng.choice((0, 1, 3, 5, 40, 300))
        rows = [struct.pack("<I", at) + rows[at % len(rows)][4:] for at in range(count)]
    if how == 9:
        rng.shuffle(rows)
        rows += rows[: rng.randrange(3)]
    return rechained(header, rows)


@kind(2.5)
def trajectory(case: Case) -> None:
    """trajectory.bin of a run folder from elsewhere, through all that reads it."""
    rng = case.rng
    run = case.folder / "runs" / "g" / "r"
    shutil.copytree(case.fixtures / "run", run)
    file, checkpoint = run / "trajectory.bin", run / "checkpoint"
    if rng.random() < 0.1:
        file.unlink()
        match rng.randrange(4):
            case 0:
                file.mkdir()
            case 1:
                os.mkfifo(file)
            case _:
                file.symlink_to(
                    rng.choice(("/dev/zero", "../../../../outside/keep.txt", "nowhere", "/"))
                )
    else:
        file.write_bytes(spoil_trajectory(rng, file.read_bytes()))
    # The steps are applied where weights, or what was known of later ones, are gone.
    if rng.random() < 0.5:
        for weights in checkpoint.glob("*.safetensors"):
            if rng.random() < 0.6:
                weights.unlink()
    if rng.random() < 0.4:
        state = json.loads((checkpoint / "state.json").read_text())
        state["step"] = state["looked"] = rng.choice((0, 1, 2, 3, 4))
        if rng.random() < 0.7:
            state["best_step"] = rng.choice((0, 1, 2, state["step"], None))
        (checkpoint / "state.json").write_bytes(as_json(reseal(rng, state)))
    if rng.random() < 0.4:
        (run / "result.json").unlink()
    step = ["--step", str(rng.choice((0, 1, 2, 3, 4, 5, -1, 10**30)))]
    step = step if rng.random() < 0.7 else []
    match rng.randrange(8):
        case 0 | 1:
            split = ["--split", rng.choice(("none", "dev", "test"))]
            case.smezo("replay", "runs/g/r", *step, *split, codes=(0, 1))
        case 2:
            case.smezo("replay", "runs/g/r", *step, "--out", "m", codes=(0, 1))
        case 3 | 4:
            case.smezo("eval", "runs/g/r", *step)
        case 5:
            case.smezo("export", "runs/g/r", "out.delta", "--delta", *step)
        case _:
            train(case, run, "run")
