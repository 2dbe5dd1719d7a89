"""The two ways in which the U-Nets of Stable Diffusion are named: LDM's, in single files, and diffusers', in pipelines.

The map is that of diffusers' ``convert_ldm_unet_checkpoint`` for two residual blocks a level, which Stable Diffusion 1,
2 and XL have.  Of open_clip's text encoders, queries, keys and values have counterparts where its ``in_proj_weight`` is
split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

PER_LEVEL = 3  # input and output blocks a level: two residual blocks and what changes the resolution
_WHOLE = {
    "input_blocks.0.0": "conv_in", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2", "out.2": "conv_out",
}  # fmt: skip
_RESIDUAL = {
    "in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}  # fmt: skip
_OPEN_CLIP = {
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj",
    **{f"attn.{part}": f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj")},  # where in_proj_weight is split
}  # fmt: skip
_CLIPS_OWN = re.compile(r".*encoder[._]layers[._](?P<block>\d+)[._]self_attn[._][qkv]_proj(?:\.weight)?")
_TURNED = {theirs: own for own, theirs in (*_WHOLE.items(), *_RESIDUAL.items())}

_LDM = re.compile(
    r"(?P<before>(?:.*?\.)?)(?P<own>(?:(?:input|output)_blocks|middle_block|time_embed|label_emb|out)\.(?:\d+)(?:\..+)?)"
)
_BLOCK = re.compile(r"(?P<side>input|output)_blocks\.(?P<block>\d+)\.(?P<part>\d+)(?:\.(?P<rest>.+))?")
_MIDDLE = re.compile(r"middle_block\.(?P<part>[012])\.(?P<rest>.+)")
_DIFFUSERS = re.compile(
    r"(?P<before>(?:.*?\.)?)(?P<own>(?:(?:down|up)_blocks\.\d+|mid_block|conv_in|conv_out|time_embedding|add_embedding)(?:\..+)?)"
)
_LEVEL = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)"
    r"\.(?P<number>\d+)\.(?P<rest>.+)"
)
_MID = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<number>\d+)\.(?P<rest>.+)")
_CLIP = re.compile(r"(?P<before>(?:.*?\.)?)(?:model\.)?transformer\.resblocks\.(?P<block>\d+)\.(?P<rest>.+)")


def aliases(module: str) -> Iterator[tuple[str, str]]:
    """(what stands before it, the module's name as the other tools have it) of each name that a module also has."""
    match = _LDM.fullmatch(module)
    own = None if match is None else _to_diffusers(match["own"])
    if match is not None and own is not None:
        yield match["before"].rstrip("."), own
    match = _DIFFUSERS.fullmatch(module)
    if match is not None:
        for name in _to_ldm(match["own"]):
            yield match["before"].rstrip("."), name
    match = _CLIP.fullmatch(module)
    if match is not None and match["rest"] in _OPEN_CLIP:
        yield match["before"].rstrip("."), f"text_model.encoder.layers.{match['block']}.{_OPEN_CLIP[match['rest']]}"


def open_clips_whole(name: str) -> str | None:
    """How the matrix ends that open_clip has instead of this query, key or value of a text encoder; None for others."""
    match = _CLIPS_OWN.fullmatch(name)
    return None if match is None else f".resblocks.{match['block']}.attn.in_proj_weight"


def _to_diffusers(name: str) -> str | None:
    if name in _WHOLE:
        return _WHOLE[name]
    match = _MIDDLE.fullmatch(name)
    if match is not None:
        if match["part"] == "1":
            return f"mid_block.attentions.0.{match['rest']}"
        rest = _RESIDUAL.get(match["rest"])
        return None if rest is None else f"mid_block.resnets.{int(match['part']) // 2}.{rest}"
    match = _BLOCK.fullmatch(name)
    if match is None or match["rest"] is None:
        return None
    block, rest = int(match["block"]), match["rest"]
    down = match["side"] == "input"
    level, number = divmod(block - 1 if down else block, PER_LEVEL)
    side = "down" if down else "up"
    if down and rest == "op":
        return f"down_blocks.{level}.downsamplers.0.conv"
    if not down and rest == "conv":
        return f"up_blocks.{level}.upsamplers.0.conv"
    if match["part"] == "0":
        return None if rest not in _RESIDUAL else f"{side}_blocks.{level}.resnets.{number}.{_RESIDUAL[rest]}"
    return f"{side}_blocks.{level}.attentions.{number}.{rest}" if match["part"] == "1" else None


def _to_ldm(name: str) -> Iterator[str]:
    if name in _TURNED:
        yield _TURNED[name]
        return
    match = _MID.fullmatch(name)
    if match is not None:
        if match["kind"] == "attentions":
            yield f"middle_block.1.{match['rest']}"
        elif match["rest"] in _TURNED:
            yield f"middle_block.{2 * int(match['number'])}.{_TURNED[match['rest']]}"
        return
    match = _LEVEL.fullmatch(name)
    if match is None:
        return
    down, kind, rest = match["side"] == "down", match["kind"], match["rest"]
    level, number = int(match["level"]), int(match["number"])
    side, block = ("input", PER_LEVEL * level + number + 1) if down else ("output", PER_LEVEL * level + number)
    if kind == "resnets" and rest in _TURNED:
        yield f"{side}_blocks.{block}.0.{_TURNED[rest]}"
    elif kind == "attentions":
        yield f"{side}_blocks.{block}.1.{rest}"
    elif kind == "downsamplers" and rest == "conv":
        yield f"input_blocks.{PER_LEVEL * (level + 1)}.0.op"
    elif kind == "upsamplers" and rest == "conv":  # after an attention, where the level has some
        yield from (f"output_blocks.{PER_LEVEL * level + 2}.{part}.conv" for part in (1, 2))
