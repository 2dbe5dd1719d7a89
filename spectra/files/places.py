"""Where Spectra keeps what it makes on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def default_root() -> Path:
    """Where spectra are kept: SPECTRA_CACHE, or ``spectra`` in the user's cache folder."""
    if named := os.environ.get("SPECTRA_CACHE"):
        return Path(named)
    fallback = "~/AppData/Local" if os.name == "nt" else "~/.cache"
    home = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    return Path(home if Path(home).is_absolute() else fallback).expanduser() / "spectra"
