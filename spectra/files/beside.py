"""Files of weights in the folder of a checkpoint besides those that were read: what each is, as far as names tell.

Trainers put what they trained in full beside an adapter's factors (LLaVA's ``non_lora_trainables.bin``), and many
folders hold one model in several formats, or earlier steps of the same training.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spectra.errors import SpectraError
from spectra.files.checkpoint import PICKLE_SUFFIXES, STEP, TRAINING_STATE, Checkpoint
from spectra.files.configs import read_json_list

MODULES = "modules.json"  # of sentence-transformers: the folders that a model consists of
# What trainers call the file of what they trained besides the factors: LLaVA, LongLoRA, 2U1's Qwen-VL, TRL, diffusers.
_TRAINED = re.compile(
    r"(non_lora_(trainables|state_dict)|trainable_params|(mm_|multi_modal_)?projector|new_embeddings|learned_embeds"
    r"|embed(ding)?s|(v|value|reward|score|classifier|cls)_head|merger|visual)([.\-_].*)?\.[a-z]+"
)
# One model in another format, or a whole one: what transformers, diffusers, PEFT, MLX and Meta call their files.
_SAME = re.compile(
    r"((diffusion_)?(pytorch_|tf_|flax_)?model|adapter_model|ggml-adapter-model|adapters|\d+_adapters|consolidated"
    r"|pytorch_lora_weights)([.\-]\w+)*\.[a-z]+"
)
_EARLIER = re.compile(r"(global_?step|step|epoch|iter|ckpt)[-_]?\d+", re.IGNORECASE)

TRAINED = "by its name it holds trained weights that belong to this fine-tune; it was not read"
UNKNOWN = "another file of weights in the adapter's folder; it was not read, and whether it belongs to it is not known"
SAME = "by its name the same model in another format, or a whole one; it was not read"
OTHER = "other weights beside the model's own; they were not read"
EARLIER = "by its name another step of a training; it was not read"
MODULE = f"{MODULES} names it as a part of this model; its weights were not read"


@dataclass(frozen=True)
class Beside:
    """A file of weights, or a folder with some, beside those that were read; ``trained`` where it may be part of them.

    A folder's ``name`` ends in a slash.
    """

    name: str
    reason: str
    trained: bool


def beside(checkpoint: Checkpoint, *, adapter: bool) -> tuple[Beside, ...]:
    """What holds weights in the folder that was read, besides what was; ``adapter`` says that no whole model was."""
    if checkpoint.in_memory or not checkpoint.path.is_dir():
        return ()
    with contextlib.suppress(OSError):  # what may not be listed
        return tuple(_within(checkpoint, adapter))
    return ()


def _within(checkpoint: Checkpoint, adapter: bool) -> Iterator[Beside]:
    read = {file.resolve() for file in checkpoint.files}
    modules = _modules_of(checkpoint.path)
    for path in sorted(checkpoint.path.iterdir()):
        name = path.name
        if path.is_dir():
            if any(path.resolve() in file.parents for file in read) or not any(map(_has_weights, path.iterdir())):
                continue
            if name in modules:
                yield Beside(f"{name}/", MODULE, True)
            else:
                earlier = STEP.fullmatch(name) or _EARLIER.fullmatch(name)
                yield Beside(f"{name}/", EARLIER if earlier else OTHER, False)
        elif _has_weights(path) and path.resolve() not in read:
            if _TRAINED.fullmatch(name):
                yield Beside(name, TRAINED, True)
            elif _SAME.fullmatch(name):
                yield Beside(name, SAME, False)
            else:
                yield Beside(name, UNKNOWN if adapter else OTHER, adapter)


def _has_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".gguf", *PICKLE_SUFFIXES) and not TRAINING_STATE.match(path.name)


def _modules_of(folder: Path) -> frozenset[str]:
    """The folders that a model of sentence-transformers names as its modules."""
    file = folder / MODULES
    try:
        listed = read_json_list(file)
    except SpectraError:
        return frozenset()
    return frozenset(str(item.get("path")) for item in listed if isinstance(item, dict))
