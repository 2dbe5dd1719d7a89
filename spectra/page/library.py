"""The plotting library that the page carries: plotly.js as the plotly package has it, compressed."""

from __future__ import annotations

import base64
import gzip
import hashlib
from functools import lru_cache

from spectra.errors import needs_extra


def check_library() -> None:
    """Raises UsageError where plotly is not installed: to be known before an hour's work, not after it."""
    try:
        import plotly.offline  # noqa: F401
    except ImportError:
        raise needs_extra("HTML reports need", "plotly", "html") from None


@lru_cache(maxsize=1)
def plotly_library() -> tuple[str, str]:
    """(the library's source, gzipped, in base64; the source's hash as a Content-Security-Policy names it)."""
    check_library()
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs().encode()
    return base64.b64encode(gzip.compress(source, 9, mtime=0)).decode(), hash_of(source)


def hash_of(source: bytes) -> str:
    """As a Content-Security-Policy names the one script that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source).digest()).decode()}'"
