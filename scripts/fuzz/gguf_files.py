"""Kind `gguf`: GGUF files."""

import struct

from hypothesis import strategies as st

from fuzz.cases import Case, kind
from fuzz.hostile import spoil_bytes, whole
from fuzz.model_folders import load_model_file


@kind(2.5)
def gguf(case: Case) -> None:
    """GGUF files: headers, strings, arrays, tensors and offsets that are not as they say."""
    data = bytearray((case.fixtures / "tiny.gguf").read_bytes())
    match case.below(6):
        case 0:
            struct.pack_into("<Q", data, case.pick((8, 16)), case.draw(whole()))
        case 1:
            struct.pack_into("<I", data, case.pick((0, 4)), case.draw(whole(32)))
        case 2:
            data = bytearray(hostile_gguf(case))
        case 3 | 4:
            end = data.find(b"output_norm.weight") + 64  # in the header, most of the time
            for _ in range(case.pick((1, 1, 2, 4))):
                at = case.draw(st.integers(4, max(4, min(len(data) - 9, end))))
                width, form = case.pick(((1, "B"), (4, "<I"), (8, "<Q")))
                struct.pack_into(form, data, at, case.draw(whole(8 * width)))
        case _:
            data = bytearray(spoil_bytes(case, bytes(data)))
    (case.folder / "x.gguf").write_bytes(data)
    load_model_file(case, "x.gguf")


def hostile_gguf(case: Case) -> bytes:
    """A header made from nothing."""

    def text(value: bytes) -> bytes:
        length = len(value) if case.chance(0.9) else case.draw(whole())
        return struct.pack("<Q", length) + value

    def value(depth: int = 0) -> bytes:
        form = case.pick((0, 4, 6, 7, 8, 9, 9, 10, 12, 13, 99))
        content = case.draw(st.binary(min_size=8, max_size=8))
        if form == 8:
            content = text(case.pick((b"llama", b"gpt2", b"\xff", b"")))
        if form == 9:
            inner = value(depth + 1) if depth < 40 else bytes(12)
            length = case.draw(st.sampled_from((0, 1, 3)) | whole())
            content = inner[:4] + struct.pack("<Q", length) + inner[4:]
        return struct.pack("<I", form) + content

    keys = [
        *(b"general.architecture", b"general.alignment", b"llama.block_count", b"llama.vocab_size"),
        *(b"llama.embedding_length", b"tokenizer.ggml.model", b"tokenizer.ggml.tokens", b"\xff"),
    ]
    pairs = b"".join(text(case.pick(keys)) + value() for _ in range(case.below(6)))
    pairs = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama") + pairs
    tensors = b"".join(
        text(case.pick((b"token_embd.weight", b"output_norm.weight", b"x")))
        + struct.pack("<I", (dims := case.pick((0, 1, 2, 4, case.draw(whole(32))))))
        + b"".join(struct.pack("<Q", case.draw(whole())) for _ in range(min(dims, 8)))
        + struct.pack("<IQ", case.pick((0, 1, 2, 8, 99)), case.draw(whole()))
        for _ in range(case.below(4))
    )
    some = st.sampled_from((0, 1, 3)) | whole()
    counts = struct.pack("<QQ", case.draw(some), case.draw(some))
    return b"GGUF" + struct.pack("<I", case.pick((2, 3, 3, 3))) + counts + pairs + tensors
