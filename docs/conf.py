"""How the site is built: ``python -m sphinx -W docs build/docs`` from the repository's root."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE), str(HERE.parent)]
os.environ.setdefault("SPECTRA_CACHE", os.devnull)  # the figures are of this repository, not of what somebody cached

import spectra  # noqa: E402  (from this repository)

project = "Spectra"
author = "the Spectra contributors"
copyright = f"{author}. Apache-2.0"
version = release = spectra.__version__

extensions = [
    "myst_parser", "sphinx.ext.autodoc", "commands", "docstrings", "drawings", "formulas", "measurements",
    "notebooks", "schemas",
]  # fmt: skip
exclude_patterns = ["extensions"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]  # figures and docstrings are made by functions

smartquotes = False  # quotes are parts of commands
nitpicky = True
# What signatures mention of other libraries, by bare names, and of what is not public: nothing here describes them.
nitpick_ignore_regex = [
    ("py:.*", r"(np|numpy|torch|pandas|matplotlib|collections|concurrent|pathlib|typing)\b.*"),
    ("py:class", r"\w+|.*\[.*"),
    ("py:mod", r"spectra\..*"),
    ("py:func", r"spectra\.render\.naming\..*"),
    ("py:class", r"spectra\..*\.(Answer|Checkpoint|LayerPair|Scanned|Skipped|TunedWeight)"),
]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 70
add_module_names = False

html_theme = "furo"
html_title = f"Spectra {version}"
html_static_path = ["static"]
html_css_files = ["spectra.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
