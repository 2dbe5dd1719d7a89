"""Repairs from paths: intruder dimensions scaled down, the adapter or checkpoint written, and the result checked."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal, Unpack

from spectra import __version__
from spectra.adapters.peft.repaired import replaceable
from spectra.adapters.peft.writing import STORED
from spectra.analysis.layer import LayerAnalysis
from spectra.errors import UsageError
from spectra.files.folders import check_apart, check_folder, whole_folder, write_record
from spectra.pairing.pairs import LayerPair
from spectra.records.repair import LayerRepair, Repair
from spectra.records.report import LayerReport
from spectra.repairs.choice import Choice, Scale, Which, edit
from spectra.repairs.forms import AdapterForm, Form, begin_checkpoint
from spectra.runs.options import AuditOptions, takes_options
from spectra.runs.progress import shown
from spectra.runs.reports import Analysis, Result, layer_report, open_cache
from spectra.runs.run import SingleRun, check_whole, fingerprint, open_run
from spectra.runs.settings import checked_settings
from spectra.sources.live import Source
from spectra.updates.algebra import TunedWeight

METHODS = ("intruders",)
STORE_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


@takes_options(AuditOptions)
def repair(
    tuned: Source,
    base: Source | None = None,
    *,
    scale: Scale,
    to: str | Path | None = None,
    method: Literal["intruders"] = "intruders",
    which: Which = "all",
    noise_like: bool = False,
    keep_rank: bool = False,
    merged: bool = False,
    store_dtype: str | None = None,
    force: bool = False,
    **options: Unpack[AuditOptions],
) -> Repair:
    """Scales a fine-tune's intruder dimensions and writes the result, as an adapter or a checkpoint of its own.

    In each weight W1 = W0 + dW the chosen singular values σ become scale·σ; all others, and all singular vectors, stay
    (Shuttleworth et al., arXiv 2410.21228v3, section 5).  The inputs stay as they are.

    Parameters
    ----------
    tuned, base : a fine-tune and the model it was made from, as for :func:`spectra.audit`.
    scale : 1 changes nothing, 0 removes; or {pattern over module names: scale}, of which the last match wins.
    to : the folder to write; it appears whole or not at all.  None writes nothing and only says what would be done.
        For models in memory only adapters can be written.
    method : what is repaired: "intruders", so far the only method.
    which : "all" intruders among the top ``top_k`` vectors, the "top" one of each weight (as in the paper), or
        {pattern: indices} for vectors by name, intruders or not.
    noise_like : the first two also in layers whose base is plain noise, which else stay as they are: anything moves the
        vectors there, and what is scaled is what was learnt.
    keep_rank : keep the adapter's rank r, by the best approximation of that rank; else a changed layer with q chosen
        vectors has rank r + q, and is exact.
    merged : write an adapter's result into a copy of the base, laid out and stored as the base is.
    store_dtype : the precision in which the factors of changed layers are written: "float32" (default; "float64" where
        the adapter is stored so), "bfloat16", "float16".  Checkpoints keep theirs.
    force : replace an earlier result of a repair at ``to``; any other folder that exists is refused.
    {options}

    Layers that ``include`` and ``exclude`` leave out are written unchanged.

    Returns
    -------
    Repair : what was scaled, what that changed and how exactly, and the audit of the result.

    Raises
    ------
    UsageError : bad options, a folder that is there already, an output that cannot hold the result.
    SpectraError : as for :func:`spectra.audit`; also where a layer could not be analysed.

    Examples
    --------
    >>> import spectra
    >>> planned = spectra.repair("fixtures/lora-r4", "fixtures/base", scale=0.5)
    >>> planned.intruders_before, len(planned.scaled)
    (35, 35)
    """
    started = time.perf_counter()
    if method not in METHODS:
        raise UsageError(f"method = {method!r}; expected one of {', '.join(METHODS)}")
    if to is not None:
        check_folder(to, force=force, ours=replaceable)
    choice = Choice(scale, which, noise_like=noise_like)
    settings = checked_settings(**options)
    if store_dtype is not None and store_dtype not in STORE_DTYPES:
        raise UsageError(f"store_dtype = {store_dtype!r}; expected one of {', '.join(STORE_DTYPES)}")
    run = open_run(tuned, base, settings)
    check_whole(run, "a repair")
    choice.check(run.pairs)
    with ExitStack() as stack:
        home = None
        if to is not None:
            check_apart(to, run.tuned, run.base)
            home = stack.enter_context(whole_folder(to, force=force, ours=replaceable))
        form: Form
        if run.plan.format == "full" or merged:
            if keep_rank or store_dtype is not None:
                given = "keep-rank" if keep_rank else "store-dtype"
                raise UsageError(f"{given} is for adapters: a checkpoint has no rank, and each weight keeps its dtype")
            form = begin_checkpoint(run, home, merged=run.plan.format != "full")
        else:
            form = AdapterForm(run, home, None if store_dtype is None else STORED[STORE_DTYPES[store_dtype]], keep_rank)
        work = _Repairs(run, choice, form, keep_rank)
        analysis = Analysis(settings, open_cache(options["cache"]), visit=work.visit, chance=False)
        with shown(options["progress"]) as progress:
            before = analysis.reports([run], started, progress)[0]
        if before.failed:
            problems = "; ".join(str(layer.error) for layer in before.failed)
            raise UsageError(f"{problems}{form.advice(before.failed)}")
        repairs = form.records([work.repairs[layer.name] for layer in before.layers if layer.name in work.repairs])
        record = Repair(
            base=before.base,
            source={**before.tuned, **fingerprint(run.tuned, hash_contents=run.plan.format != "full")},
            output=None,
            settings={
                "method": method, **choice.record(), "keep_rank": keep_rank, "merged": form.merged,
                "store_dtype": store_dtype, **settings.record(),
            },
            layers=tuple(repairs),
            audit=None,
            intruders_before=before.total("all" if any(one.noise_like_base for one in repairs) else "judged"),
            left_behind=form.left_behind,
            remarks=choice.left_alone(before),
            spectra_version=__version__,
        )  # fmt: skip
        if home is not None:
            assert to is not None
            record = form.finished(record, before, work.audited, Path(to))
        record = replace(record, seconds=round(time.perf_counter() - started, 3))
        if home is not None:
            write_record(home, record.to_json())
    return record


class _Repairs:
    """The layers of one fine-tune gone through: what is chosen is edited and handed to the form it is written in."""

    def __init__(self, run: SingleRun, choice: Choice, form: Form, keep_rank: bool):
        self.run, self.choice, self.form, self.keep_rank = run, choice, form, keep_rank
        self.repairs: dict[str, LayerRepair] = {}
        self.audited: dict[str, LayerReport] = {}

    def visit(self, pair: LayerPair, tuned: TunedWeight, analysis: LayerAnalysis, result: Result) -> None:
        findings = result.findings
        assert findings is not None
        started = time.perf_counter()
        chosen = self.choice.of(pair.name, findings)
        differs = "base_copy_differs" in result.report.flags
        if not chosen:
            stored = self.form.take(pair, tuned, None)
            if stored is not None:  # rounded to what the base is stored in
                findings = analysis.of(stored)
                self.audited[pair.name] = layer_report(self.run, pair, findings, differs, time.perf_counter() - started)
            return
        self.form.check(pair)
        edited = edit(
            pair, tuned, analysis, findings, chosen, dtype=self.form.dtype_of(pair),
            in_factors=self.form.in_factors(pair), keep_rank=self.keep_rank,
        )  # fmt: skip
        self.form.take(pair, tuned, edited)
        self.repairs[pair.name] = edited.record
        self.audited[pair.name] = layer_report(self.run, pair, edited.findings, differs, time.perf_counter() - started)
