"""What the base has instead of a weight that was looked for and not found: the same under another name, in other parts.

Only what the names show is said.  That this is the wrong base is asked where nothing here answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from spectra.adapters import PlannedUpdate
from spectra.adapters.ldm import open_clips_whole
from spectra.files.checkpoint import Checkpoint
from spectra.files.stored.fused import PROJECTIONS, SYNONYMS_GATED, SYNONYMS_QKV, apart, fused_module
from spectra.pairing.names import DEEPEST, without_wrappers

# What the projections of one kind are called in one writer's names or another's.
SYNONYMS = (
    *SYNONYMS_QKV,
    *SYNONYMS_GATED,
    ("o_proj", "out_proj", "wo", "out_lin", "to_out.0", "to_out"),
    ("down_proj", "w2"),
)
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
LDM, DIFFUSERS = re.compile(r"(^|\.)(input|middle|output)_blocks?\."), re.compile(r"(^|\.)(down|mid|up)_blocks?\.")

# What models call the modules that a task puts on top of them, with what these may consist of; and those that are one
# module, since a part of the model may be called so, too.
HEADS = frozenset(
    ["score", "classifier", "pre_classifier", "classification_head", "qa_outputs", "lm_head", "embed_out", "cls",
     "pooler", "head", "heads", "v_head", "value_head", "reward_head", "regression_head", "logits_proj",
     "vocab_transform", "vocab_projector", "vocab_layer_norm", "lm_predictions", "mask_predictions", "sequence_summary"]
)  # fmt: skip
LAST = frozenset(["decoder", "fc", "proj_out", "summary"])
OF_A_HEAD = 3  # parts of a name, such as cls.predictions.transform.dense
LAYERS = frozenset(["layers", "layer", "blocks", "block", "h"])


def is_new_head(name: str, tuned: Checkpoint) -> bool:
    """Whether a tensor or module is a head by its name, or named as a module to save by the adapter's config."""
    parts = name.removesuffix(".weight").removesuffix(".bias").split(".")
    for at, part in enumerate(parts):
        after = parts[at + 1 :]
        if part in HEADS and len(after) <= OF_A_HEAD and LAYERS.isdisjoint(parts):
            return True
        if part in LAST and not after and LAYERS.isdisjoint(parts):
            return True
    saved = (tuned.adapter_config or {}).get("modules_to_save")
    whole = f".{'.'.join(parts)}."
    return isinstance(saved, list) and any(isinstance(one, str) and f".{one}." in whole for one in saved)


class Relatives:
    """The base's names, asked what they have instead of others."""

    def __init__(self, base: Checkpoint):
        self._base = base
        self._plain = {without_wrappers(name): name for name in base.weights}
        self._joined = _joined(base)
        self._numberless = {_NUMBER.sub("#", plain): name for plain, name in self._plain.items()}

    def fused(self, update: PlannedUpdate) -> str | None:
        """What there is to say of an update whose weight the base has together with others, or in parts; else None."""
        modules = [update.module, *(target.removesuffix(".weight") for target in update.targets)]
        for name in (name for module in modules for spelled in _spellings(module) for name in apart(spelled)):
            weight = self._plain.get(without_wrappers(name)) or self._joined.get(name)
            if weight is not None:
                return _about(weight)
        for end in filter(None, map(open_clips_whole, update.targets)):
            weight = next((name for name in self._base.weights if name.endswith(end)), None)
            if weight is not None:
                return _about(weight)
        return None

    def otherwise(self, update: PlannedUpdate) -> str | None:
        """What the base has under another name that may be what was looked for; None where it has nothing alike."""
        for name in map(without_wrappers, update.targets):
            for part, shorter in _without_a_part(name):
                if shorter in self._plain:
                    return (
                        f"without {part!r} in its name it would be the base's {self._plain[shorter]!r}: save it "
                        "without what wraps the module, or rename it"
                    )
            for other in _renamed(name):
                if other in self._plain:
                    return f"the base has {self._plain[other]!r}, as other writers call this: convert one of the two"
        return self._as_other_tools(update)

    def of_another_number(self, update: PlannedUpdate) -> str | None:
        """The base's weight that differs from what was looked for by the numbers in its name alone."""
        names = (_NUMBER.sub("#", without_wrappers(name)) for name in update.targets)
        return next((self._numberless[name] for name in names if "#" in name and name in self._numberless), None)

    def _as_other_tools(self, update: PlannedUpdate) -> str | None:
        """The two ways in which the same U-Net is named."""
        for mine, theirs, names in (
            (DIFFUSERS, LDM, "as LDM's checkpoints do, the fine-tune as diffusers does"),
            (LDM, DIFFUSERS, "as diffusers does, the fine-tune as LDM's checkpoints do"),
        ):
            if any(mine.search(name.replace("_blocks_", "_blocks.")) for name in update.targets):
                there = next((name for name in self._base.weights if theirs.search(name)), None)
                if there is not None:
                    return f"the base names its U-Net {names} ({there!r}): convert one of the two"
        return None


def _about(weight: str) -> str:
    how = "together with others in" if fused_module(weight) else "apart, as"
    return (
        f"its base has this weight {how} {weight!r}, which is not compared with it; audit, compare, plot, ranks and "
        "inspect do that with --split-fused"
    )


def _spellings(module: str) -> Iterator[str]:
    """A module's name, and with a dot before its projection where its dots were turned into underscores."""
    yield module
    if "." not in module:
        yield from (f"{module.removesuffix(word)[:-1]}.{word}" for word in PROJECTIONS if module.endswith(f"_{word}"))


def _joined(base: Checkpoint) -> dict[str, str]:
    """Names of modules with the dots before their last part turned into underscores, as kohya's tools have them."""
    joined = {}
    for name in base.weights:
        home, _, own = name.removesuffix(".weight").rpartition(".")
        joined[f"{home.replace('.', '_')}.{own}.weight"] = name
    return joined


def _without_a_part(name: str) -> Iterator[tuple[str, str]]:
    """(part, name without it) of each part of a name but its last."""
    parts = name.split(".")
    for at, part in enumerate(parts[:-1] if 2 < len(parts) <= DEEPEST else ()):
        if not part.isdecimal():
            yield part, without_wrappers(".".join(parts[:at] + parts[at + 1 :]))


def _renamed(name: str) -> Iterator[str]:
    """The name with its projection as other writers call it."""
    module = name.removesuffix(".weight")
    for words in SYNONYMS:
        for word in words:
            if module.endswith(f".{word}"):
                yield from (f"{module.removesuffix(word)}{other}.weight" for other in words if other != word)
