"""Ranks as text, as CSV and as a table."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

from spectra.records.ranks import ROW_COLUMNS
from spectra.render.ranks import render_ranks, to_csv
from tests.support.ranks import model_of, of_matrix, report, suggested, with_rank


def test_rows_csv_and_dataframe():
    made = model_of(2)
    rows = made.rows()
    assert len(rows) == 9
    first, layer, choice = rows[0], made.layers[0], made.suggestion.choices[0]
    assert (first["layer"], first["rows"], first["rank_90"]) == (layer.name, 512, layer.rank_90)
    assert (first["suggested_rank"], first["suggested_alpha"]) == (choice.rank, 2 * choice.rank)
    assert first["error_at_2"] == layer.error_at(2)
    assert rows[-1]["suggested_rank"] is None  # the embedding
    frame = made.to_dataframe()
    assert list(frame.columns) == list(ROW_COLUMNS)
    assert frame["suggested_rank"].sum() == sum(choice.rank for choice in made.suggestion.choices)
    read = list(csv.DictReader(io.StringIO(to_csv([made, made]))))
    assert len(read) == 18
    assert read[0]["suggested_rank"] == str(choice.rank)


def config_in(text):
    return json.loads(text[text.index("config\n{") + len("config\n") :])


def test_text_says_the_answer_first():
    made = model_of(2)
    text = render_ranks(made)
    suggestion = made.suggestion
    assert text.startswith(f"Suggestion: LoRA with r = {suggestion.r} (")
    assert f"{suggestion.parameters:,} values to train" in text
    assert f"loses      {suggestion.relative_error:.1%}" in text
    assert "model.embed_tokens: an embedding" in text
    assert re.search(r"^self_attn\.q_proj +2 +512×512 ", text, flags=re.MULTILINE)
    assert config_in(text) == suggestion.peft_config()
    assert render_ranks(made, ascii_only=True).isascii()


@pytest.mark.parametrize("count", [28, 56])
def test_text_of_a_large_model_is_short_unless_asked(count):
    made = model_of(count)
    text = render_ranks(made)
    assert len(text.splitlines()) < 35
    assert "--verbose prints it" in text
    verbose = render_ranks(made, verbose=True)
    assert all(layer.name in verbose for layer in made.layers)
    assert config_in(verbose) == made.suggestion.peft_config()


def test_text_without_a_suggestion():
    layer = with_rank("embed", 2, role="embedding")
    failed = ({"name": "a", "status": "non_finite", "error": "tuned: a: holds NaN", "parameters": 8},)
    text = render_ranks(report([layer], suggested([layer]), failed=failed))
    assert text.startswith("Suggestion: none")
    assert "non_finite: a: tuned: a: holds NaN" in text
    assert "config" not in text
    assert render_ranks(report([], None)).startswith("Suggestion: none")


def test_text_of_a_rank_without_an_alpha():
    tuned = {"path": "tuned", "format": "mlx-lora", "rank": 4, "alpha": None, "scaling": 20.0}
    assert "tuned  (mlx-lora, rank 4, scaling 20)" in render_ranks(report([], None, tuned=tuned))


def test_text_of_dora_and_of_what_saves_nothing(rng):
    dora = with_rank("layers.0.q", 2, kind="row_scaled", rescaled=True)
    assert "trained with DoRA" in render_ranks(report([dora], suggested([dora])))
    flat = of_matrix(rng.normal(size=(40, 30)))
    text = render_ranks(report([flat], suggested([flat])))
    assert "training these weights whole costs no more" in text
    assert "above noise" in text
