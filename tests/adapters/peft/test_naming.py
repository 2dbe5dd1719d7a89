"""Patterns over module names: as short as they can be."""

from __future__ import annotations

from spectra.adapters.peft.naming import ModuleNames


def test_the_default_makes_the_pattern_shortest(rng):
    for _ in range(20):
        values = {f"layers.{i}.{kind}": int(rng.integers(1, 5)) for i in range(4) for kind in "qkv"}
        names = ModuleNames({name: name[-1] for name in values}, ())
        default, pattern = names.pattern(values)
        lengths = []
        for candidate in set(values.values()):
            away = {name: value for name, value in values.items() if value != candidate}
            whole = [k for k in "qkv" if len({values[f"layers.{i}.{k}"] for i in range(4)}) == 1]
            lengths.append(len({name[-1] if name[-1] in whole else name for name in away}))
        assert len(pattern) == min(lengths)
        assert default in values.values()
