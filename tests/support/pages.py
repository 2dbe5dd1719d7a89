"""What is embedded in a page."""

from __future__ import annotations

import json
import re


def data_of(html):
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])
