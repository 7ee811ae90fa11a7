"""Kind `trajectory`: the trajectory.bin of a run folder from elsewhere."""

import contextlib
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Sequence

from hypothesis import strategies as st

from fuzz.cases import Case, kind
from fuzz.fixtures import train
from fuzz.hostile import FLOATS, as_json, hostile, reseal, some_of, spoil_bytes, spoil_tree, whole


def floats(case: Case, data: bytearray, form: str, places: Sequence[int]) -> None:
    """Some hostile numbers at some of the places."""
    for at in case.draw(some_of(places)):
        with contextlib.suppress(OverflowError):  # of a float of 4 bytes
            struct.pack_into(form, data, at, case.draw(FLOATS))


def rechained(header: bytes, rows: Sequence[bytes], length: int | None = None) -> bytes:
    """A trajectory.bin with checksums that are right."""
    start = struct.pack("<8sII", b"SMEZOTRJ", 1, len(header) if length is None else length)
    crc = zlib.crc32(start + header)
    content = start + header + struct.pack("<I", crc)
    for row in rows:
        crc = zlib.crc32(row, crc)
        content += row + struct.pack("<I", crc)
    return content


def spoil_trajectory(case: Case, data: bytes) -> bytes:
    """A trajectory.bin that is not what a run has written."""
    (length,) = struct.unpack_from("<I", data, 12)
    header, content = data[16 : 16 + length], data[20 + length :]
    rows = [content[at : at + 32] for at in range(0, len(content), 36)]
    how = case.below(10)
    if how < 2:
        return spoil_bytes(case, data)
    if how == 2:
        spoiled = bytearray(data)
        struct.pack_into("<I", spoiled, case.pick((8, 12, 16 + length)), case.draw(whole(32)))
        return bytes(spoiled)
    if how in (3, 4):
        tree = json.loads(header)
        if case.chance(0.3):
            tree["identity"]["num_queries"] = case.pick((0, -1, 2, 7, 4096, 4097, 2**40, 1.0))
        elif case.chance(0.5):
            tree[case.pick(list(tree))] = hostile(case)
        else:
            tree = spoil_tree(case, tree)
        header = as_json(tree)
    if how == 5:
        header = spoil_bytes(case, header)
    if how in (6, 7) and rows:
        for _ in range(case.pick((1, 4))):
            at = case.below(len(rows))
            row = bytearray(rows[at])
            if case.chance(0.2):
                struct.pack_into("<I", row, 0, case.draw(whole(32)))
            elif case.chance(0.2):
                struct.pack_into("<f", row, 20, case.pick((math.nan, math.inf, 3e38, -3e38, -1.0)))
            else:
                floats(case, row, "<d", (4, 12, 24))
            rows[at] = bytes(row)
    if how == 8:
        count = case.pick((0, 1, 3, 5, 40, 300))
        rows = [struct.pack("<I", at) + rows[at % len(rows)][4:] for at in range(count)]
    if how == 9:
        rows = case.draw(st.permutations(rows))
        rows += rows[: case.below(3)]
    return rechained(header, rows)


@kind(2.5)
def trajectory(case: Case) -> None:
    """trajectory.bin of a run folder from elsewhere, through all that reads it."""
    run = case.folder / "runs" / "g" / "r"
    shutil.copytree(case.fixtures / "run", run)
    file, checkpoint = run / "trajectory.bin", run / "checkpoint"
    if case.chance(0.1):
        file.unlink()
        match case.below(4):
            case 0:
                file.mkdir()
            case 1:
                os.mkfifo(file)
            case _:
                file.symlink_to(
                    case.pick(("/dev/zero", "../../../../outside/keep.txt", "nowhere", "/"))
                )
    else:
        file.write_bytes(spoil_trajectory(case, file.read_bytes()))
    # The steps are applied where weights, or what was known of later ones, are gone.
    if case.chance(0.5):
        for weights in checkpoint.glob("*.safetensors"):
            if case.chance(0.6):
                weights.unlink()
    if case.chance(0.4):
        state = json.loads((checkpoint / "state.json").read_text())
        state["step"] = state["looked"] = case.pick((0, 1, 2, 3, 4))
        if case.chance(0.7):
            state["best_step"] = case.pick((0, 1, 2, state["step"], None))
        (checkpoint / "state.json").write_bytes(as_json(reseal(case, state)))
    if case.chance(0.4):
        (run / "result.json").unlink()
    step = ["--step", str(case.pick((0, 1, 2, 3, 4, 5, -1, 10**30)))]
    step = step if case.chance(0.7) else []
    match case.below(8):
        case 0 | 1:
            split = ["--split", case.pick(("none", "dev", "test"))]
            case.smezo("replay", "runs/g/r", *step, *split, codes=(0, 1))
        case 2:
            case.smezo("replay", "runs/g/r", *step, "--out", "m", codes=(0, 1))
        case 3 | 4:
            case.smezo("eval", "runs/g/r", *step)
        case 5:
            case.smezo("export", "runs/g/r", "out.delta", "--delta", *step)
        case _:
            train(case, run, "run")
