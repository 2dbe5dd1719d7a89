"""Patterns over module names, as peft resolves them."""

from __future__ import annotations

import time
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from spectra.adapters.peft.pattern import Pattern
from spectra.errors import AdapterError
from tests.support.paths import FIXTURES

PLACE = Path("model.safetensors")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(key=st.text(max_size=20) | st.text("ab.*+?|()[]{}\\^$0123,-", max_size=20))
def test_any_pattern(key):
    try:
        found = Pattern(PLACE, {key: 2}).lookup("model.layers.0.q_proj", 1)
    except AdapterError:
        return
    assert found in (1, 2)


def test_patterns_are_tried_in_their_order():
    values = {"k_proj": 1, r"[qk]_proj": 2, "^model.q_proj": 3, "q_proj": 4, "v_proj": 5, r"layers\.\d+\.v_proj": 6}
    table = Pattern(PLACE, values)
    expected = {"a.k_proj": 1, "model.q_proj": 2, "b.q_proj": 2, "layers.1.v_proj": 5, "o_proj": 0, "xk_proj": 0}
    assert {module: table.lookup(module, 0) for module in expected} == expected
    table = Pattern(PLACE, {"^model.q_proj": 3, "q_proj": 4})
    assert [table.lookup(module, 0) for module in ("model.q_proj", "a.model.q_proj", "q_proj")] == [3, 4, 4]


def test_patterns_match_as_in_peft():
    import re

    modules = ["model.layers.1.q_proj", "model.layers.11.q_proj", "q_proj", "x.my_q_proj", "layers.1.q_proj"]
    keys = [
        "q_proj",
        "layers.1.q_proj",
        "^layers.1.q_proj",
        r"layers\.1\.q_proj",
        "1.q_proj$",
        r".*1\.q_proj",
        r"layers\.\d+\.q_proj",
        "layers.1..q_proj",
        "..1.q_proj",
        r"layers\..1.q_proj",
        ".q_proj",
        "q_proj.",
    ]
    for key in keys:
        pattern = Pattern(FIXTURES, {key: 5})
        for module in modules:
            expected = bool(re.match(rf"(.*\.)?({key})$", module))
            assert (pattern.lookup(module, 0) == 5) == expected, (key, module)


def test_many_plain_patterns_are_fast():
    pattern = Pattern(FIXTURES, {f"model.layers.{i}.self_attn.q_proj": i for i in range(2000)})
    started = time.process_time()
    assert [pattern.lookup(f"model.layers.{i}.self_attn.q_proj", -1) for i in range(0, 2000, 10)] == list(
        range(0, 2000, 10)
    )
    assert time.process_time() - started < 2
