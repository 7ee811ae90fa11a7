"""Kind `gguf`: GGUF files."""

import random
import struct

from fuzz.cases import Case, kind
from fuzz.hostile import number, spoil_bytes
from fuzz.model_folders import load_model_file


@kind(2.5)
def gguf(case: Case) -> None:
    """GGUF files: headers, strings, arrays, tensors and offsets that are not as they say."""
    rng = case.rng
    data = bytearray((case.fixtures / "tiny.gguf").read_bytes())
    match rng.randrange(6):
        case 0:
            struct.pack_into("<Q", data, rng.choice((8, 16)), number(rng))
        case 1:
            struct.pack_into("<I", data, rng.choice((0, 4)), number(rng, 32))
        case 2:
            data = bytearray(hostile_gguf(rng))
        case 3 | 4:
            end = data.find(b"output_norm.weight") + 64  # in the header, most of the time
            for _ in range(rng.choice((1, 1, 2, 4))):
                at = rng.randrange(4, max(5, min(len(data) - 8, end)))
                width, form = rng.choice(((1, "B"), (4, "<I"), (8, "<Q")))
                struct.pack_into(form, data, at, number(rng, 8 * width))
        case _:
            data = bytearray(spoil_bytes(rng, bytes(data)))
    (case.folder / "x.gguf").write_bytes(data)
    load_model_file(case, "x.gguf")


def hostile_gguf(rng: random.Random) -> bytes:
    """A header made from nothing."""

    def text(value: bytes) -> bytes:
        length = len(value) if rng.random() < 0.9 else number(rng)
        return struct.pack("<Q", length) + value

    def value(depth: int = 0) -> bytes:
        form = rng.choice((0, 4, 6, 7, 8, 9, 9, 10, 12, 13, 99))
        content = rng.randbytes(8)
        if form == 8:
            content = text(rng.choice((b"llama", b"gpt2", b"\xff", b"")))
        if form == 9:
            inner = value(depth + 1) if depth < 40 else rng.randbytes(12)
            kind_of = inner[:4]
            content = kind_of + struct.pack("<Q", rng.choice((0, 1, 3, number(rng)))) + inner[4:]
        return struct.pack("<I", form) + content

    keys = [
        *(b"general.architecture", b"general.alignment", b"llama.block_count", b"llama.vocab_size"),
        *(b"llama.embedding_length", b"tokenizer.ggml.model", b"tokenizer.ggml.tokens", b"\xff"),
    ]
    pairs = b"".join(text(rng.choice(keys)) + value() for _ in range(rng.randrange(6)))
    pairs = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama") + pairs
    tensors = b"".join(
        text(rng.choice((b"token_embd.weight", b"output_norm.weight", b"x")))
        + struct.pack("<I", (dims := rng.choice((0, 1, 2, 4, number(rng, 32)))))
        + b"".join(struct.pack("<Q", number(rng)) for _ in range(min(dims, 8)))
        + struct.pack("<IQ", rng.choice((0, 1, 2, 8, 99)), number(rng))
        for _ in range(rng.randrange(4))
    )
    counts = struct.pack("<QQ", rng.choice((0, 1, 3, number(rng))), rng.choice((1, 3, number(rng))))
    return b"GGUF" + struct.pack("<I", rng.choice((2, 3, 3, 3))) + counts + pairs + tensors
