"""SARIF 2.1.0 of reports, for code scanning: one run, whose results are layers and whose artifacts are weight files.

Several fine-tunes share the run, since they share the invocation, and since GitHub takes no two runs of one tool and
category in one upload.
What GitHub asks beyond the standard is kept: relative URIs, a region with a line (of a weight file there is only the
first), and ``primaryLocationLineHash``, by which it knows a finding again.  Properties that only the standard has, such
as logical locations, hold the module's name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from spectra import __version__
from spectra.errors import in_one_line
from spectra.records.report import FAILED_STATUSES, LayerReport, Report
from spectra.render.columns import decimals, number, plural
from spectra.render.coverage import partial, unseen
from spectra.render.naming import hub_name, invocation, public_names, without_paths
from spectra.render.text import lowest_cosine, ranges

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
INTRUDERS, BORDERLINE, PARTIAL, FAILED, UNREADABLE = (
    "intruder-dimensions", "borderline-cosine", "updates-not-looked-at", "layer-not-analysed", "fine-tune-not-read",
)  # fmt: skip

# id, name, level, tags, one sentence, what it means and what to do about it.
_RULES = (
    (
        INTRUDERS, "IntruderDimensions", "warning", "fine-tuning",
        "Leading singular vectors of a tuned weight are nearly orthogonal to every singular vector of the base weight.",
        "Intruder dimensions go with forgetting (Shuttleworth et al. 2024, arXiv 2410.21228). They show risk, not "
        "harm, and without them a model may have forgotten, too: evaluate it beside its base on what it must not "
        "forget. The command 'spectra repair' scales them down.",
    ),
    (
        BORDERLINE, "BorderlineCosine", "note", "numerics",
        "A cosine lies within 0.001 of epsilon, so that a slightly other epsilon would count otherwise.",
        "The verdict stands: it was settled in float64. Where a gate depends on this layer alone, look at the count "
        "for several values of epsilon.",
    ),
    (
        PARTIAL, "UpdatesNotLookedAt", "error", "input",
        "Some updates of a fine-tune were not looked at: their base weight was not found, or their values not read.",
        "The counts are about the rest alone. The message says what is known of each; name a base that has all parts, "
        "leave out with --exclude what is not meant, or accept a part with --allow-partial.",
    ),
    (
        FAILED, "LayerNotAnalysed", "error", "numerics",
        "A layer could not be analysed: a value that is no number, or a decomposition that did not converge.",
        "The counts are without this layer. A NaN or an infinity in an adapter mostly comes from training that "
        "diverged, or from a file that was cut.",
    ),
)  # fmt: skip
_NOT_READ = (
    UNREADABLE, "FineTuneNotRead", "error", "input",
    "A fine-tune could not be read, or does not fit its base.",
    "Nothing is known of it. The message names the file and what is wrong with it; 'spectra inspect' says how each "
    "file would be read.",
)  # fmt: skip
_EXIT = {0: "done", 1: "a gate was crossed"}


@dataclass(frozen=True)
class Scanned:
    """What a run in CI knows beyond its reports.

    Attributes
    ----------
    files : a report's ``tuned`` path → the file that holds a module's weights; under None that of any other module.
    crossed : the ``tuned`` paths whose gate was crossed.
    unreadable : the errors of fine-tunes that could not be read.
    exit_code : of the command.
    root : the working directory, the repository's root in CI.
    url : where Spectra has its home, if it has one.
    further : words of the command that no report has.
    allow_partial : whether updates that were not looked at are accepted.
    addresses : a path of a report → the address of which that is a local copy.
    """

    files: Mapping[str, Mapping[str | None, str | PurePath]] = field(default_factory=dict)
    crossed: frozenset[str] = frozenset()
    unreadable: Sequence[Exception] = ()
    exit_code: int = 0
    root: str | PurePath | None = None
    url: str | None = None
    further: Sequence[str] = ()
    allow_partial: bool = False
    addresses: Mapping[str, str] = field(default_factory=dict)


def to_sarif(reports: Sequence[Report], scanned: Scanned | None = None, *, version: str = __version__) -> str:
    """A SARIF log of one run, as JSON text; the same reports give the same text, byte for byte."""
    return json.dumps(_Log(reports, scanned or Scanned(), version).log(), indent=1, allow_nan=False) + "\n"


class _Log:
    def __init__(self, reports: Sequence[Report], scanned: Scanned, version: str):
        self._reports, self._scanned, self._version = reports, scanned, version
        paths = [str(report.tuned["path"]) for report in reports]
        self._files = {path: dict(scanned.files.get(path) or {None: path}) for path in paths}
        files = [str(file) for of_one in self._files.values() for file in of_one.values()]
        bases = [str(report.base["path"]) for report in reports]
        failed = [str(error.path) for error in scanned.unreadable if hasattr(error, "path")]
        self._names = public_names([*paths, *bases, *failed, *files], scanned.root, scanned.addresses)
        self._uri = {
            str(file): _uri(self._file_name(path, str(file)))
            for path, of_one in self._files.items()
            for file in of_one.values()
        }
        self._uris = list(dict.fromkeys(self._uri.values()))

    def _file_name(self, path: str, file: str) -> str:
        """A weight file's name below its fine-tune's; without a commit of the hub, so that findings stay the same."""
        hub = hub_name(path)
        name = (self._names[path] if hub is None else hub.partition("@")[0]).rpartition("://")[2]
        if not PurePath(file).is_relative_to(path):
            return self._names[file]
        return os.path.normpath(PurePath(name) / PurePath(file).relative_to(path)).replace(os.sep, "/")

    def log(self) -> dict[str, Any]:
        notices = [
            _notice(FAILED, f"{layer.name}: {layer.status}: {self._public(layer.error)}")
            for report in self._reports
            for layer in report.failed
        ]
        for report in self._reports:
            said = partial(report)
            if said is not None:
                notices.append(_notice(PARTIAL, f"{self._names[str(report.tuned['path'])]}: {said}"))
        notices += [_notice(UNREADABLE, self._public(str(error))) for error in self._scanned.unreadable]
        called: dict[str, Any] = {
            "executionSuccessful": self._scanned.exit_code in (0, 1),
            "exitCode": self._scanned.exit_code,
            "exitCodeDescription": _EXIT.get(self._scanned.exit_code, "not all could be read or analysed"),
        }
        if self._reports:
            called["commandLine"] = invocation(self._reports, self._names, self._scanned.further)
        if notices:
            called["toolExecutionNotifications"] = notices
        run = {
            "tool": {"driver": self._driver()},
            "invocations": [called],
            "artifacts": [{"location": {"uri": uri}, "roles": ["analysisTarget"]} for uri in self._uris],
            "results": [result for report in self._reports for result in self._results(report)],
            "columnKind": "unicodeCodePoints",
            "properties": {"fineTunes": [self._summary(report) for report in self._reports]},
        }
        # The properties come first, so that our files are known by how they begin.
        maker = {"maker": "intruder-spectra", "version": self._version}
        return {"properties": maker, "$schema": SCHEMA, "version": "2.1.0", "runs": [run]}

    def _driver(self) -> dict[str, Any]:
        driver: dict[str, Any] = {
            "name": "Spectra",
            "version": self._version,
            "semanticVersion": self._version,
            "rules": [_rule(*rule) for rule in _RULES],
            "notifications": [_rule(*notice) for notice in (*_RULES[-2:], _NOT_READ)],
        }
        if self._scanned.url is not None:
            driver["informationUri"] = self._scanned.url
        return driver

    def _summary(self, report: Report) -> dict[str, Any]:
        summary = report.summary
        kept = (
            "intruder_level", "intruders", "vectors_compared", "intruders_all", "layers_analysed", "layers_failed",
            "intruders_new",
        )  # fmt: skip
        return {
            "fineTune": self._names[str(report.tuned["path"])],
            "base": self._names[str(report.base["path"])],
            **{name: summary[name] for name in kept if summary[name] is not None},
            "coverage": summary["coverage"],
        }

    def _results(self, report: Report) -> list[dict[str, Any]]:
        results = self._unseen(report)
        for layer in report.layers:
            if layer.intruders:
                level = self._level(report, layer)
                results.append(self._result(report, layer, INTRUDERS, level, _intruders(report, layer)))
            if layer.borderline:
                text = f"{plural(layer.borderline, 'cosine')} within 0.001 of epsilon {report.settings['epsilon']}"
                results.append(self._result(report, layer, BORDERLINE, "note", text))
            if layer.status in FAILED_STATUSES:
                text = f"{layer.status}: {self._public(layer.error)}"
                results.append(self._result(report, layer, FAILED, "error", text))
        return results

    def _unseen(self, report: Report) -> list[dict[str, Any]]:
        """One result that says how much of a fine-tune was not looked at, where that is not nothing."""
        said = partial(report)
        if said is None:
            return []
        uri = self._uri[str(next(iter(self._files[str(report.tuned["path"])].values())))]
        text = self._public("; ".join([said, *unseen(report)]))
        level = "warning" if self._scanned.allow_partial else "error"
        return [{**self._located(PARTIAL, level, uri, "", text), "properties": report.summary["coverage"]}]

    def _level(self, report: Report, layer: LayerReport) -> str:
        """An error where a crossed gate counted this layer; a note where little is new; else a warning."""
        counts = report.baseline is None or layer.name in report.baseline["new_by_layer"]
        if str(report.tuned["path"]) in self._scanned.crossed and counts:
            return "error"
        if layer.noise_like_base or report.intruder_level in ("none", "slight") or not counts:
            return "note"
        return "warning"

    def _result(self, report: Report, layer: LayerReport, rule: str, level: str, text: str) -> dict[str, Any]:
        of_one = self._files[str(report.tuned["path"])]
        file = of_one.get(layer.name.partition("#")[0]) or of_one.get(None) or next(iter(of_one.values()))
        uri = self._uri[str(file)]
        properties = {
            "shape": list(layer.shape),
            "moduleType": layer.module_type,
            "intruders": layer.intruders,
            "intruderIndices": list(layer.intruder_indices),
            "updateNormRelative": layer.measures.get("update_norm_relative"),
            "effectiveRank": layer.measures.get("effective_rank"),
        }
        if report.baseline is not None:
            properties["newIntruders"] = report.baseline["new_by_layer"].get(layer.name, 0)
        found = self._located(rule, level, uri, layer.name, f"{layer.name}: {text}.")
        return {**found, "properties": {name: value for name, value in properties.items() if value is not None}}

    def _located(self, rule: str, level: str, uri: str, module: str, text: str) -> dict[str, Any]:
        """A result at a file, and at one of its modules where it is about one."""
        digest = hashlib.sha256("\0".join((rule, uri, module)).encode("utf-8", "replace")).hexdigest()
        place: dict[str, Any] = {
            "physicalLocation": {
                "artifactLocation": {"uri": uri, "index": self._uris.index(uri)},
                "region": {"startLine": 1},
            }
        }
        if module:
            logical = {"name": module.split(".")[-1], "fullyQualifiedName": module, "kind": "module"}
            place["logicalLocations"] = [logical]
        return {
            "ruleId": rule,
            "ruleIndex": next(i for i, known in enumerate(_RULES) if known[0] == rule),
            "level": level,
            "message": {"text": _text(text)},
            "locations": [place],
            "partialFingerprints": {"primaryLocationLineHash": f"{digest[:16]}:1", "spectraLayer/v1": digest},
        }

    def _public(self, text: str | None) -> str:
        return in_one_line(without_paths(str(text), self._names, self._scanned.root))


def _intruders(report: Report, layer: LayerReport) -> str:
    cosine, exact = lowest_cosine(layer)
    text = (
        f"{layer.intruders} of the top {len(layer.vectors)} {report.settings['side']} singular vectors "
        f"{'is an intruder dimension' if layer.intruders == 1 else 'are intruder dimensions'} (at index "
        f"{ranges(layer.intruder_indices)}; lowest cosine {'' if exact else '≤ '}{cosine:.2f}, epsilon "
        f"{report.settings['epsilon']}; ‖dW‖/‖W0‖ {decimals(layer.measures.get('update_norm_relative'))}, rank "
        f"{number(layer.update['rank'])})"
    )
    if report.baseline is not None:
        text += f"; {report.baseline['new_by_layer'].get(layer.name, 0)} of them new since the baseline"
    return text + (", in a layer whose base is plain noise" if layer.noise_like_base else "")


def _rule(rule: str, name: str, level: str, tag: str, short: str, full: str) -> dict[str, Any]:
    return {
        "id": rule,
        "name": name,
        "shortDescription": {"text": short},
        "fullDescription": {"text": full},
        "help": {"text": full},
        "defaultConfiguration": {"level": level},
        "properties": {
            "tags": ["model-weights", tag],
            "precision": "very-high",
            "problem.severity": {"note": "recommendation"}.get(level, level),
        },
    }


def _notice(rule: str, text: str) -> dict[str, Any]:
    return {"descriptor": {"id": rule}, "level": "error", "message": {"text": _text(text)}}


def _text(text: str) -> str:
    """A message in which nothing is a link or a placeholder (SARIF 2.1.0, 3.11.5 and 3.11.6)."""
    text = in_one_line(text)
    for special in "\\[]":
        text = text.replace(special, "\\" + special)
    return text.replace("{", "{{").replace("}", "}}")


def _uri(name: str) -> str:
    return quote(os.fsencode(name), safe="/")
