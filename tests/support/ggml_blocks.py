"""ggml's quantised blocks decoded value by value, after the C of ggml-quants.c: the twin of what the package gguf does.

The grids of the IQ types are constants, and are the package's own; everything else is written out here.
"""

from __future__ import annotations

import struct

import numpy as np
from gguf import quants

NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
POWERS = (1, 3, 9, 27, 81)


def half(block, at):
    return struct.unpack_from("<e", block, at)[0]


def u16(block, at):
    return struct.unpack_from("<H", block, at)[0]


def u32(block, at):
    return struct.unpack_from("<I", block, at)[0]


def signed(byte):
    return byte - 256 if byte > 127 else byte


def grid(name, index):
    kind = getattr(quants, name)
    kind.init_grid()
    return kind.grid.reshape(-1, kind.grid.shape[-1])[index].tolist()


def sign_of(seven, place):
    """Of seven bits of signs the eighth makes their number even."""
    eight = seven | (seven.bit_count() % 2) << 7
    return -1 if eight >> place & 1 else 1


def q4_0(b):
    d, qs = half(b, 0), b[2:]
    return [d * ((q & 15) - 8) for q in qs] + [d * ((q >> 4) - 8) for q in qs]


def q4_1(b):
    d, m, qs = half(b, 0), half(b, 2), b[4:]
    return [d * (q & 15) + m for q in qs] + [d * (q >> 4) + m for q in qs]


def _fives(qh, qs):
    low = [(q & 15) | (qh >> j & 1) << 4 for j, q in enumerate(qs)]
    return low + [(q >> 4) | (qh >> (j + 16) & 1) << 4 for j, q in enumerate(qs)]


def q5_0(b):
    d = half(b, 0)
    return [d * (q - 16) for q in _fives(u32(b, 2), b[6:])]


def q5_1(b):
    d, m = half(b, 0), half(b, 2)
    return [d * q + m for q in _fives(u32(b, 4), b[8:])]


def q8_0(b):
    d = half(b, 0)
    return [d * signed(q) for q in b[2:]]


def q2_k(b):
    scales, qs, d, least = b[:16], b[16:80], half(b, 80), half(b, 82)
    out: list[float] = []
    for at in (0, 32):
        for shift in (0, 2, 4, 6):
            for part in (0, 16):
                scale = scales[len(out) // 16]
                out += [d * (scale & 15) * (q >> shift & 3) - least * (scale >> 4) for q in qs[at + part :][:16]]
    return out


def q3_k(b):
    masks, qs, packed, d = b[:32], b[32:96], b[96:108], half(b, 108)
    scales = []
    for i in range(16):
        low = packed[i] & 15 if i < 8 else packed[i - 8] >> 4
        scales.append((low | (packed[8 + i % 4] >> 2 * (i // 4) & 3) << 4) - 32)
    out: list[float] = []
    for at in (0, 32):
        for shift in (0, 2, 4, 6):
            bit = at // 32 * 4 + shift // 2
            for part in (0, 16):
                scale = d * scales[len(out) // 16]
                for place in range(part, part + 16):
                    high = 0 if masks[place] >> bit & 1 else 4
                    out.append(scale * ((qs[at + place] >> shift & 3) - high))
    return out


def _six_bits(packed, j):
    """(scale, minimum) of the j-th of eight groups."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4


def q4_k(b):
    d, least, packed, qs = half(b, 0), half(b, 2), b[4:16], b[16:]
    out = []
    for group in range(8):
        scale, minimum = _six_bits(packed, group)
        for q in qs[32 * (group // 2) :][:32]:
            out.append(d * scale * (q >> 4 * (group % 2) & 15) - least * minimum)
    return out


def q5_k(b):
    d, least, packed, high, qs = half(b, 0), half(b, 2), b[4:16], b[16:48], b[48:]
    out = []
    for group in range(8):
        scale, minimum = _six_bits(packed, group)
        for place, q in enumerate(qs[32 * (group // 2) :][:32]):
            value = (q >> 4 * (group % 2) & 15) + 16 * (high[place] >> group & 1)
            out.append(d * scale * value - least * minimum)
    return out


def q6_k(b):
    low, high, scales, d = b[:128], b[128:192], b[192:208], half(b, 208)
    out = []
    for at in range(256):
        part, inside = divmod(at, 128)
        row, place = divmod(inside, 32)
        q = low[64 * part + 32 * (row % 2) + place] >> 4 * (row // 2) & 15
        q |= (high[32 * part + place] >> 2 * row & 3) << 4
        out.append(d * signed(scales[at // 16]) * (q - 32))
    return out


def _nl(d, qs):
    return [d * NL[q & 15] for q in qs] + [d * NL[q >> 4] for q in qs]


def iq4_nl(b):
    return _nl(half(b, 0), b[2:])


def iq4_xs(b):
    d, high, low, qs = half(b, 0), u16(b, 2), b[4:8], b[8:]
    out = []
    for group in range(8):
        scale = (low[group // 2] >> 4 * (group % 2) & 15) | (high >> 2 * group & 3) << 4
        out += _nl(d * (scale - 32), qs[16 * group :][:16])
    return out


def mxfp4(b):
    d = 2.0 ** (b[0] - 128)
    return [d * FP4[q & 15] for q in b[1:]] + [d * FP4[q >> 4] for q in b[1:]]


def _third(byte, power):
    return ((byte * power & 255) * 3 >> 8) - 1


def tq1_0(b):
    d = half(b, 52)
    out = [d * _third(q, power) for power in POWERS for q in b[:32]]
    out += [d * _third(q, power) for power in POWERS for q in b[32:48]]
    return out + [d * _third(q, power) for power in POWERS[:4] for q in b[48:52]]


def tq2_0(b):
    d = half(b, 64)
    return [d * ((q >> shift & 3) - 1) for at in (0, 32) for shift in (0, 2, 4, 6) for q in b[at : at + 32]]


def iq2_xxs(b):
    d, out = half(b, 0), []
    for group in range(8):
        places, signs = b[2 + 8 * group :][:4], u32(b, 6 + 8 * group)
        scale = d * (0.5 + (signs >> 28)) * 0.25
        for i, place in enumerate(places):
            row = grid("IQ2_XXS", place)
            out += [scale * value * sign_of(signs >> 7 * i & 127, j) for j, value in enumerate(row)]
    return out


def iq2_xs(b):
    d, out = half(b, 0), []
    for i in range(32):
        q = u16(b, 2 + 2 * i)
        scale = d * (0.5 + (b[66 + i // 4] >> 4 * (i % 4 // 2) & 15)) * 0.25
        out += [scale * value * sign_of(q >> 9, j) for j, value in enumerate(grid("IQ2_XS", q & 511))]
    return out


def iq2_s(b):
    d, low, signs, high, scales, out = half(b, 0), b[2:34], b[34:66], b[66:74], b[74:82], []
    for i in range(32):
        scale = d * (0.5 + (scales[i // 4] >> 4 * (i % 4 // 2) & 15)) * 0.25
        row = grid("IQ2_S", low[i] | (high[i // 4] >> 2 * (i % 4) & 3) << 8)
        out += [scale * value * (-1 if signs[i] >> j & 1 else 1) for j, value in enumerate(row)]
    return out


def iq3_xxs(b):
    d, qs, out = half(b, 0), b[2:66], []
    for group in range(8):
        signs = u32(b, 66 + 4 * group)
        scale = d * (0.5 + (signs >> 28)) * 0.5
        for i in range(4):
            row = grid("IQ3_XXS", qs[8 * group + 2 * i]) + grid("IQ3_XXS", qs[8 * group + 2 * i + 1])
            out += [scale * value * sign_of(signs >> 7 * i & 127, j) for j, value in enumerate(row)]
    return out


def iq3_s(b):
    d, qs, high, signs, scales, out = half(b, 0), b[2:66], b[66:74], b[74:106], b[106:110], []
    for i in range(64):  # four values each
        group = i // 8
        scale = d * (1 + 2 * (scales[group // 2] >> 4 * (group % 2) & 15))
        row = grid("IQ3_S", qs[i] | (high[group] >> i % 8 & 1) << 8)
        out += [scale * value * (-1 if signs[i // 2] >> (4 * (i % 2) + j) & 1 else 1) for j, value in enumerate(row)]
    return out


def iq1_s(b):
    d, qs, out = half(b, 0), b[2:34], []
    for i in range(32):
        high = u16(b, 34 + 2 * (i // 4))
        scale, delta = d * (2 * (high >> 12 & 7) + 1), -0.125 if high & 0x8000 else 0.125
        row = grid("IQ1_S", qs[i] | (high >> 3 * (i % 4) & 7) << 8)
        out += [scale * (value + delta) for value in row]
    return out


def iq1_m(b):
    qs, high, words, out = b[:32], b[32:48], struct.unpack_from("<4H", b, 48), []
    packed = sum((word >> 12) << 4 * i for i, word in enumerate(words))
    d = struct.unpack("<e", struct.pack("<H", packed))[0]
    for i in range(32):
        group, part = i // 4, i % 4
        bits = high[i // 2] >> 4 * (i % 2) & 15
        scale = d * (2 * (words[group // 2] >> (6 * (group % 2) + 3 * (part // 2)) & 7) + 1)
        row = grid("IQ1_M", qs[i] | (bits & 7) << 8)
        out += [scale * (value + (-0.125 if bits & 8 else 0.125)) for value in row]
    return out


TWINS = {
    twin.__name__.upper(): twin
    for twin in (q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs, mxfp4, tq1_0, tq2_0,
                 iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, iq1_s, iq1_m)
}  # fmt: skip
# Where a block has half-precision scales, which random bytes would make infinite or NaN.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (), "TQ1_0": (52,),
    "TQ2_0": (64,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,),
    "IQ1_M": (),
}  # fmt: skip


def random_blocks(rng, kind, rows, blocks, width):
    """(rows, blocks·width) bytes of valid blocks: any codes, finite scales."""
    raw = rng.integers(0, 256, size=(rows, blocks, width), dtype=np.uint8)
    for at in HALVES[kind]:
        scales = rng.normal(size=(rows, blocks)).astype("<f2")
        raw[:, :, at : at + 2] = scales.view(np.uint8).reshape(rows, blocks, 2)
    if kind == "IQ1_M":  # its half is in the highest bits of four words
        bits = rng.normal(size=(rows, blocks)).astype("<f2").view("<u2").astype(int)
        for i in range(4):
            raw[:, :, 49 + 2 * i] = raw[:, :, 49 + 2 * i] & 15 | ((bits >> 4 * i & 15) << 4).astype(np.uint8)
    if kind == "MXFP4":
        raw[:, :, 0] = rng.integers(100, 140, size=(rows, blocks))
    return raw.reshape(rows, blocks * width)


def decoded(raw, kind, width):
    """The values (rows, n), float64, block by block."""
    rows = [[TWINS[kind](bytes(row[at : at + width])) for at in range(0, row.size, width)] for row in raw]
    return np.array(rows, np.float64).reshape(raw.shape[0], -1)
