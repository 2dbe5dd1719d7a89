"""What a report says first: what was looked at, what was found in it, and what does not follow.

A count of intruders certifies nothing: most ordinary fine-tunes of a language model have none, and forget all the same.
So no word here grades the fine-tune.
"""

from __future__ import annotations

from dataclasses import dataclass

from spectra.records.report import Report
from spectra.records.sweeps import mean_update_size
from spectra.render.columns import plural

FEW = 0.25  # of the changed layers; where fewer were judged, the finding says how many
UNRELATED = 1.0  # ‖dW‖/‖W0‖ of a real fine-tune is far below; of two unrelated weights about √2
NONE_FOLLOWS = (
    "This does not mean that nothing was forgotten: no count of intruders tells that. Next: evaluate the fine-tune "
    "beside its base on what it was not trained for."
)
SOME_FOLLOWS = (
    "Such directions go with forgetting, and do not measure it. Next: evaluate the fine-tune beside its base on what "
    "it was not trained for."
)


@dataclass(frozen=True)
class Finding:
    """``title`` is a few words without a full stop, ``said`` one sentence, ``more`` further ones, a line each."""

    title: str
    said: str
    more: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        return (self.said, *self.more)


def finding(report: Report) -> Finding:
    """What a report says first."""
    analysed = [layer for layer in report.layers if layer.vectors]
    judged, noisy = report.judged, len(analysed) - len(report.judged)
    if not analysed:
        if report.failed:
            failed = len(report.failed)
            which = "the one changed layer could not" if failed == 1 else f"none of the {failed} changed layers could"
            return Finding("Cannot tell", f"Cannot tell: {which} be analysed.")
        unchanged = report.summary["layers_unchanged"]
        return Finding("Nothing changed", f"Nothing changed: {plural(unchanged, 'weight')} as in the base.")
    beyond = report.total("all") - report.total()
    more: list[str] = []
    if judged:
        found = _found(report, noisy, beyond)
        changed = len(analysed) + len(report.failed)
        if len(judged) < FEW * changed:
            others = "noise-like or failed" if report.failed else "noise-like"
            more.append(f"This is from {len(judged)} of {changed} changed layers; the others are {others}.")
        elif report.failed:
            more.append(f"{plural(len(report.failed), 'layer')} could not be analysed.")
        if all(layer.status == "proved_small" for layer in judged):
            more.append("The size of the updates alone rules them out.")
        more.append(SOME_FOLLOWS if report.total() else NONE_FOLLOWS)
    else:
        which = "layer that could be analysed" if report.failed else "changed layer"
        found = Finding(
            "Cannot tell",
            f"Cannot tell: the base of every {which} is plain noise, as if it was never trained, and there anything "
            f"moves the vectors ({plural(beyond, 'intruder')} in {plural(noisy, 'layer')}).",
        )
    more += _of_size(report) + _of_baseline(report)
    return Finding(found.title, found.said, tuple(more))


def _found(report: Report, noisy: int, beyond: int) -> Finding:
    total, vectors = report.total(), report.compared()
    among = f"{vectors:,} leading singular vectors of {plural(len(report.judged), 'layer')}"
    apart = f"{plural(noisy, 'noise-like layer')} apart" if noisy else ""
    if beyond:
        apart += f", with another {beyond}"
    if not total:
        return Finding("No intruder dimensions", f"No intruder dimensions among {among}{f' ({apart})' * bool(apart)}.")
    inside = f"{total / vectors:.1%}" + (f"; {apart}" if apart else "")
    return Finding(plural(total, "intruder dimension"), f"Intruder dimensions: {total} of {among} ({inside}).")


def _of_size(report: Report) -> list[str]:
    size = mean_update_size(report)
    if size is None or size < UNRELATED:
        return []
    return [f"The update is as large as the base ({size:.2f} of it): are these two related at all?"]


def _of_baseline(report: Report) -> list[str]:
    if report.baseline is None:
        return []
    new, gone, before = (report.baseline[key] for key in ("intruders_new", "intruders_gone", "intruders"))
    return [
        f"Against the baseline, a report on {report.baseline['tuned'].get('path')} with {before}: "
        f"{new} new, {before - gone} still there, {gone} gone."
    ]
