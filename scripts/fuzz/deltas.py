"""Kind `delta`: deltas from elsewhere."""

import hashlib
import json
import struct
import zlib

from fuzz.cases import Case, kind
from fuzz.hostile import as_json, as_yaml, bomb, hostile, some_of, spoil_bytes, spoil_tree, whole
from fuzz.trajectories import floats


def spoil_delta(case: Case, data: bytes) -> bytes:
    """A delta that is not what `smezo export` has written; its digest is right in most cases."""
    import yaml

    (length,) = struct.unpack_from("<I", data, 12)
    about, packed = json.loads(data[16 : 16 + length]), data[16 + length : -32]
    columns = bytearray(zlib.decompress(packed))
    told = None
    match case.below(12):
        case 0:
            return spoil_bytes(case, data)
        case 1:
            content = spoil_bytes(case, data[:-32])
            return content + hashlib.sha256(content).digest()
        case 2:
            about = spoil_tree(case, about)
        case 3:
            about[case.pick(list(about))] = hostile(case)
        case 4 | 5:
            name = case.pick([k for k, v in about.items() if isinstance(v, dict) and v])
            about[name] = spoil_tree(case, about[name])
        case 6:
            tree = spoil_tree(case, yaml.safe_load(about["config"]))
            about["config"] = as_yaml(tree).decode("utf-8", "replace")
        case 7:
            bad = spoil_bytes(case, about["config"].encode())
            bad = case.pick((bad, about["config"].encode() + bomb(case)))
            about["config"] = bad.decode("utf-8", "replace")
        case 8:
            # By significance: a number's eight bytes lie apart.
            steps = len(columns) // 16
            numbers = [
                bytearray(columns[(c * 8 + b) * steps + s] for b in range(8))
                for c in (0, 1)
                for s in range(steps)
            ]
            for value in case.draw(some_of(numbers)):
                floats(case, value, "<d", (0,))
            columns = bytearray(
                numbers[c * steps + s][b] for c in (0, 1) for b in range(8) for s in range(steps)
            )
        case 9:
            about["step"] = case.pick((0, 1, 3, 5, 4_194_304, 2**31, 2**63, -1, True, 4.0, "4"))
            if case.chance(0.7) and isinstance(about["step"], int) and 0 <= about["step"] < 2**23:
                columns = bytearray(16 * about["step"])
        case 10:
            about["header"]["identity"]["num_queries"] = case.pick((0, 2, 4096, 4097, 2**40, "1"))
            columns = bytearray(case.pick((columns, bytes(1 << 26), b"", bytes(4097 * 8 * 4))))
        case _:
            told = case.draw(whole(32))
    text = as_json(about)
    content = struct.pack("<8sII", b"SMEZODLT", 1, len(text) if told is None else told) + text
    packed = zlib.compress(bytes(columns))
    if case.chance(0.1):
        packed = case.pick((packed[:-3], packed + b"x" * 9, spoil_bytes(case, packed), b""))
    content += packed
    return content + hashlib.sha256(content).digest()


@kind(2.5)
def delta(case: Case) -> None:
    """Deltas from elsewhere: numbers, settings, prompt and figures that somebody made up."""
    data = (case.fixtures / "tiny.delta").read_bytes()
    (case.folder / "x.delta").write_bytes(spoil_delta(case, data))
    words = [["--split", case.pick(("none", "dev"))], []][case.below(2)]
    if case.chance(0.2):
        words += ["--step", str(case.pick((0, 1, 4, 5, -1, 10**30)))]
    if case.chance(0.1):
        words += ["--out", "m"]
    if case.chance(0.1):
        words += [case.pick(("task.num_test=2", "model.path=x", "device=cpu", "steps=9", "x=1"))]
    case.smezo("replay", "x.delta", *words, codes=(0, 1))
