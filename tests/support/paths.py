"""Where the repository is, and the trained family in it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
MEMBERS = ("lora-r1", "lora-r4", "lora-r16", "lora-r64", "rslora-r16", "dora-r16", "full")
