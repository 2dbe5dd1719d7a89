"""GGUF files that are broken or made to harm, each written byte by byte.

``python -m tests.support.hostile_gguf FOLDER RESULTS`` runs all of them.
"""

from __future__ import annotations

import json
import struct
import sys
from functools import partial
from pathlib import Path

from spectra.files.gguf.headers import MAX_ITEMS, TYPES
from tests.support import hostile
from tests.support.gguf_files import LORA
from tests.support.hostile import Case


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return len(raw).to_bytes(8, "little") + raw


def field(key, kind=8, value=None):
    return text(key) + struct.pack("<I", kind) + (text(value) if kind == 8 and value is not None else value or b"")


def tensor(name="blk.0.attn_q.weight.lora_a", shape=(8, 2), kind=0, offset=0):
    return (
        text(name)
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


ADAPTER = field("general.architecture", value="llama") + field("general.type", value="adapter")
ADAPTER += field("adapter.type", value="lora")
BOTH = tensor() + tensor("blk.0.attn_q.weight.lora_b", (2, 8), 0, 64)


def a_file(fields=ADAPTER, tensors=BOTH, *, magic=b"GGUF", version=3, count=2, fields_count=3, data=128, alignment=32):
    head = magic + struct.pack("<IQQ", version, count, fields_count) + fields + tensors
    return head + b"\0" * (-len(head) % alignment) + b"\0" * data


def array(inner, count, content=b""):
    return struct.pack("<IQ", inner, count) + content


CASES: dict[str, Case] = {}


def case(name, words, content):
    def build(box):
        (box / LORA).write_bytes(content)

    assert name not in CASES
    CASES[name] = Case(name, build, (LORA, *words))


HUGE = 2**64 - 1
for _name, _words, _content in (
    ("an empty file", ("truncated",), b""),
    ("four letters", ("truncated",), b"GGUF"),
    ("another file", ("no GGUF file",), b"\x7fELF" + b"\2" * 200),
    ("a pickle", ("no GGUF file",), b"\x80\x04\x95" + b"\0" * 60),
    ("version 1", ("version 1",), a_file(version=1)),
    ("version 99", ("version 99",), a_file(version=99)),
    ("big-endian", ("big-endian",), a_file(version=3 << 24)),
    ("no tensors", ("no tensors",), a_file(tensors=b"", count=0)),
    ("tensors, 2 to the 64th", ("tensors",), a_file(count=HUGE)),
    ("tensors, a million", ("tensors",), a_file(count=10**6)),
    ("fields, 2 to the 64th", ("fields",), a_file(fields_count=HUGE)),
    ("fields, 20,000", ("fields",), a_file(fields=b"".join(field(f"{i}", 0, b"\1") for i in range(20_000)),
                                           fields_count=20_000)),
    ("half a header", ("truncated",), a_file()[:150]),
    ("half of its values", ("truncated", "lora_b"), a_file(data=100)),
    ("a key of 4 GB", ("a key of",), a_file(fields=struct.pack("<Q", 2**32) + b"x" * 60, fields_count=1)),
    ("a key of nothing", ("a key of 0",), a_file(fields=field(""), fields_count=1)),
    ("a key that is no text", ("no text",), a_file(fields=field(b"\xff\xfe", 0, b"\1"), fields_count=1)),
    ("a key with a line of its own", ("no text",),
     a_file(fields=field("a\nspectra: error: fine", 0, b"\1"), fields_count=1)),
    ("a key twice", ("'general.type'", "twice"),
     a_file(fields=ADAPTER + field("general.type", value="model"), fields_count=4)),
    ("a text of 16 EB", ("truncated",), a_file(fields=text("x") + struct.pack("<IQ", 8, HUGE), fields_count=1)),
    ("a value of type 77", ("type 77",), a_file(fields=field("x", 77, b"\1" * 8), fields_count=1)),
    ("an array of 16 EB", ("truncated",), a_file(fields=field("x", 9, array(10, HUGE)), fields_count=1)),
    ("an array of texts without end", ("texts",), a_file(fields=field("x", 9, array(8, HUGE)), fields_count=1)),
    ("an array of empty texts", ("texts",), a_file(fields=field("x", 9, array(8, MAX_ITEMS + 1, b"\0" * 8 * MAX_ITEMS)),
                                                   fields_count=1)),
    ("as many empty texts as there may be", ("neither a model", "'x'"),
     a_file(fields=field("x", 9, array(8, MAX_ITEMS, b"\0" * 8 * MAX_ITEMS)) + field("general.type", value="x"),
            fields_count=2)),
    ("texts that lead out", ("truncated",), a_file(fields=field("x", 9, array(8, 3, struct.pack("<QQQ", 5, 2**40, 1))),
                                                   fields_count=1)),
    ("arrays within arrays", ("arrays within",), a_file(fields=field("x", 9, array(9, 1) * 50), fields_count=1)),
    ("arrays of many arrays", ("arrays within",), a_file(fields=field("x", 9, array(9, 10**9) * 2), fields_count=1)),
    ("numbers, 9 million", ("general.architecture",),
     a_file(fields=field("x", 9, array(10, 9 * 10**6, b"\0" * 72 * 10**6)) + field("general.type", value="adapter")
            + field("adapter.type", value="lora"))),
    ("a header of 120 MB", ("100,000,000",), a_file(fields=field("x", 9, array(10, 15 * 10**6, b"\0" * 120 * 10**6)))),
    ("texts of 60 kB, a thousand of them", ("neither a model",),
     a_file(fields=b"".join(field(f"x{i}", value="y" * 60_000) for i in range(1000)), fields_count=1000)),
    ("short texts, 9,000 of them", ("neither a model",),
     a_file(fields=b"".join(field(f"x{i}", value="y" * 255) for i in range(9000)) + field("general.type", value="x"),
            fields_count=9001)),
    ("a name that is no text", ("no text",), a_file(tensors=tensor(b"\xff\xfe\xfd") + BOTH, count=3)),
    ("a name of a million letters", ("a tensor's name of",), a_file(tensors=tensor("x" * 10**6) + BOTH, count=3)),
    ("a name twice", ("lora_a", "twice"), a_file(tensors=tensor() + tensor(offset=64))),
    ("9 dimensions", ("9 dimensions",), a_file(tensors=tensor(shape=(1,) * 9) + BOTH, count=3)),
    ("dimensions, 2 to the 32nd", ("dimensions",),
     a_file(tensors=text("x") + struct.pack("<I", 2**32 - 1) + BOTH, count=3)),
    ("an enormous shape", ("lora_a", "takes"), a_file(tensors=tensor(shape=(2**40, 2**40)), count=1)),
    ("a shape that overflows", ("lora_a", "takes"), a_file(tensors=tensor(shape=(2**63, 2**63, 2)), count=1)),
    ("a type nobody knows", ("lora_a", "type 99"), a_file(tensors=tensor(kind=99), count=1)),
    ("a type that is gone", ("lora_a", "type 4"), a_file(tensors=tensor(kind=4), count=1)),
    ("rows that are no blocks", ("lora_a", "blocks of 32"), a_file(tensors=tensor(kind=8), count=1)),
    ("an offset that overlaps", ("lora_b", "begins at 32"), a_file(tensors=tensor() + tensor("lora_b", (2, 8), 0, 32))),
    ("an offset that leaves a gap", ("lora_b", "begins at 96"),
     a_file(tensors=tensor() + tensor("lora_b", (2, 8), 0, 96))),
    ("an offset behind the end", ("lora_a", "begins at"), a_file(tensors=tensor(offset=HUGE - 31), count=1)),
    ("an alignment of 3", ("alignment of 3",),
     a_file(fields=ADAPTER + field("general.alignment", 4, b"\3\0\0\0"), fields_count=4)),
    ("an alignment of 0", ("alignment of 0",),
     a_file(fields=ADAPTER + field("general.alignment", 4, b"\0" * 4), fields_count=4)),
    ("an alignment of 2 GB", ("alignment of",),
     a_file(fields=ADAPTER + field("general.alignment", 4, b"\0\0\0\x80"), fields_count=4)),
    ("an alignment that is a text", ("alignment of",),
     a_file(fields=ADAPTER + field("general.alignment", value="32\n"), fields_count=4)),
    ("an alpha that is NaN", ("adapter.lora.alpha",),
     a_file(fields=ADAPTER + field("adapter.lora.alpha", 6, b"\0\0\xc0\x7f"), fields_count=4)),
    ("an alpha that is a text", ("adapter.lora.alpha",),
     a_file(fields=ADAPTER + field("adapter.lora.alpha", value="8"), fields_count=4)),
    ("a kind with a line of its own", ("adapter.type",),
     a_file(fields=field("general.type", value="adapter") + field("adapter.type", value="x\nspectra: error: fine"),
            fields_count=2)),
    ("an architecture with a line of its own", ("architecture",),
     a_file(fields=field("general.architecture", value="x\x1b[2J\nspectra: error: fine")
            + field("general.type", value="adapter") + field("adapter.type", value="lora"))),
    ("an architecture that is a number", ("general.architecture",),
     a_file(fields=field("general.architecture", 4, b"\7\0\0\0") + field("general.type", value="adapter")
            + field("adapter.type", value="lora"))),
    ("no module of the base", ("wrong base", "output"),
     a_file(tensors=tensor("output.weight.lora_a") + tensor("output.weight.lora_b", (2, 8), 0, 64))),
    ("a block of a million digits", ("a tensor's name of",),
     a_file(tensors=tensor(f"blk.{'1' * 10**6}.attn_q.weight.lora_a"), count=1)),
    ("a block of 400 digits", ("no module",), a_file(tensors=tensor(f"blk.{'1' * 400}.attn_q.weight.lora_a")
     + tensor(f"blk.{'1' * 400}.attn_q.weight.lora_b", (2, 8), 0, 64))),
):  # fmt: skip
    case(_name, _words, _content)


def _whole_file(box):
    (box / LORA).write_bytes(a_file())


_name = "a base that does not tell its heads"
CASES[_name] = Case(_name, _whole_file, ("q_proj", "num_attention_heads"))


# Models in blocks, each against a sound one.

MODEL = "model.gguf"
Q8_0, Q4_K, IQ2_XXS, NVFP4 = 8, 12, 16, 40
HALF_NAN, HALF_INF = b"\x00\x7e", b"\x00\x7c"


def a_block_of(kind, scale=b"\x00\x3c"):
    """One block whose first scale is that half, 1 where none is said."""
    _, values, width = TYPES[kind]
    body = bytes(index % 50 for index in range(width))
    if kind == Q4_K:
        return values, scale + scale + body[4:]
    return values, scale + body[2:]


def a_model(kind=Q8_0, *, rows=4, shape=None, name="blk.0.attn_v.weight", blocks=None, more=b"", count=1, offset=0,
            scale=b"\x00\x3c", cut=0, architecture="qwen2", fields=b"", fields_count=1):  # fmt: skip
    values, block = a_block_of(kind, scale)
    data = block * rows if blocks is None else blocks
    described = tensor(name, (values, rows) if shape is None else shape, kind, offset) + more
    head = b"GGUF" + struct.pack("<IQQ", 3, count, fields_count) + field("general.architecture", value=architecture)
    head += fields + described
    whole = head + b"\0" * (-len(head) % 32) + data + b"\0" * (-len(data) % 32)
    return whole[: len(whole) - cut] if cut else whole


def case_of_a_model(name, words, content):
    def build(box):
        (box / MODEL).write_bytes(content)
        (box / "sound.gguf").write_bytes(a_model(rows=4))
        return ["audit", str(box / MODEL), "--base", str(box / "sound.gguf")]

    assert name not in CASES
    CASES[name] = Case(name, build, words)


for _model_name, _model_words, _model_content in (
    ("blocks that end too soon", (MODEL, "truncated", "attn_v"), a_model(cut=40)),
    ("blocks that are not there", (MODEL, "truncated", "attn_v"), a_model(blocks=b"")),
    ("rows of a block and a bit", (MODEL, "attn_v", "blocks of 32"), a_model(shape=(33, 4))),
    ("rows of a part of a block", (MODEL, "attn_v", "blocks of 256"), a_model(Q4_K, shape=(32, 4))),
    ("rows of no blocks", (MODEL, "nothing to analyse (empty)"), a_model(shape=(0, 4))),
    ("no rows of blocks", (MODEL, "nothing to analyse (empty)"), a_model(shape=(32, 0), blocks=b"")),
    ("blocks in five dimensions", (MODEL, "5 dimensions"), a_model(shape=(32, 1, 1, 1, 4))),
    ("blocks without dimensions", (MODEL, "attn_v"), a_model(shape=())),
    ("blocks, 2 to the 60th", (MODEL, "takes"), a_model(shape=(2**40, 2**20))),
    ("blocks that overlap", (MODEL, "attn_k", "begins at 128"),
     a_model(more=tensor("blk.0.attn_k.weight", (32, 4), Q8_0, 128), count=2, blocks=b"\0" * 400)),
    ("blocks with a gap between", (MODEL, "attn_k", "begins at 192"),
     a_model(more=tensor("blk.0.attn_k.weight", (32, 4), Q8_0, 192), count=2, blocks=b"\0" * 400)),
    ("one name for two blocks", (MODEL, "attn_v", "twice"),
     a_model(more=tensor("blk.0.attn_v.weight", (32, 4), Q8_0, 160), count=2, blocks=b"\0" * 400)),
    ("more blocks said than there are", (MODEL,), a_model(count=2)),
    ("a scale that is NaN", ("v_proj", "non_finite"), a_model(scale=HALF_NAN)),
    ("a scale that is infinite", ("v_proj", "non_finite"), a_model(scale=HALF_INF)),
    ("a scale of the K kind that is NaN", ("v_proj",), a_model(Q4_K, scale=HALF_NAN)),
    ("a scale of the IQ kind that is NaN", ("v_proj",), a_model(IQ2_XXS, scale=HALF_NAN)),
    ("blocks of a kind that is named only", ("NVFP4",), a_model(NVFP4)),
    ("blocks of other rows than the base's", ("v_proj", "shape"), a_model(rows=8)),
    ("a vector in blocks", (MODEL, "not a matrix"), a_model(shape=(128,))),
    ("blocks of experts in a model without", (MODEL,),
     a_model(name="blk.0.ffn_gate_exps.weight", shape=(32, 2, 2))),
    ("blocks of an architecture nobody checked", (MODEL, "'rwkv'"), a_model(architecture="rwkv")),
    ("more experts than any model has", ("experts",),
     a_model(name="blk.0.ffn_gate_exps.weight", shape=(32, 1, 70_000), blocks=b"\0" * 34 * 70_000,
             architecture="qwen3moe", fields=field("qwen3moe.expert_count", 4, struct.pack("<I", 70_000)),
             fields_count=2)),
):  # fmt: skip
    case_of_a_model(_model_name, _model_words, _model_content)


if __name__ == "__main__":
    jobs = {name: partial(hostile.prepare, one=CASES[name]) for name in sys.argv[3:] or CASES}
    Path(sys.argv[2]).write_text(json.dumps(dict(hostile.run_all(Path(sys.argv[1]), jobs))))
