"""The figure of a training that was watched."""

from __future__ import annotations

import numpy as np
import pytest

from spectra import plots
from spectra.errors import UsageError
from spectra.records.history import PREFIX
from spectra.training import Monitor
from tests.support.trainings import loop, tiny


def test_the_figure():
    model = tiny()
    watch = Monitor(model, every=1, max_share=None)
    loop(model, watch)
    figure = plots.training_history(watch.history, title="a training")
    lines = [np.asarray(axes.lines[0].get_xydata()) for axes in figure.axes]
    names = ("intruders", "update_norm_largest", "cosine_margin", "threshold_margin")
    for line, name in zip(lines, names, strict=True):
        assert line.tolist() == [[record.step, record.metrics[PREFIX + name]] for record in watch.history]
    with pytest.raises(UsageError, match="no audit"):
        plots.training_history([])
