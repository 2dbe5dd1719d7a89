"""Folders that hold a training's shards instead of weights: what they are, and what makes a model of them."""

from __future__ import annotations

from pathlib import Path

# Patterns of files in the folder that mark a kind; what they are; what its own project converts them with.
KINDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("zero_pp_rank_*_optim_states.pt", "*/zero_pp_rank_*", "*/bf16_zero_pp_rank_*", "zero_to_fp32.py"),
        "DeepSpeed's shards",
        "python zero_to_fp32.py . OUT (DeepSpeed puts the script into the folder), or train with "
        "stage3_gather_16bit_weights_on_model_save",
    ),
    (
        ("model_world_size_*_rank_*.pt", "*/model_world_size_*_rank_*.pt"),
        "verl's shards",
        "python -m verl.model_merger merge --backend fsdp --local_dir FOLDER --target_dir OUT",
    ),
    (
        ("*.distcp", "*/*.distcp"),
        "a distributed checkpoint of torch (DCP)",
        "accelerate merge-weights FOLDER OUT, or python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        "FOLDER FILE.pt",
    ),
    (
        ("mp_rank_*_model_states.pt", "*/mp_rank_*_model_states.pt", "mp_rank_*/model_optim_rng.pt"),
        "Megatron's or DeepSpeed's shards",
        "the converter of the project that wrote them",
    ),
)


def shards_in(folder: Path) -> str | None:
    """What a folder's shards are and how to make a model of them, in a sentence; None where it has none."""
    for patterns, what, how in KINDS:
        found = next((path for pattern in patterns for path in sorted(folder.glob(pattern))[:1]), None)
        if found is not None:
            named = found.relative_to(folder).as_posix()
            return f"no weights here, only {what} ({named}, …); to make a model of them: {how}"
    return None
