"""Trainings that are watched in a plain loop: what it costs, and that nothing else is changed by it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import spectra
from spectra.errors import CorruptFileError, MissingFileError, UsageError
from spectra.runs.reports import Analysis
from spectra.training import Monitor, SpectraCallback, load_history, monitor
from tests.support.paths import FIXTURES
from tests.support.trainings import NO_ARGUMENTS, loop, same, tiny, verdicts, weights

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def sharded(kind):
    model = tiny(lora=False)
    if kind == "ZeRO-3":
        model.classifier.weight.ds_id = 1
    elif kind == "FSDP":
        model.bert.encoder = type("FullyShardedDataParallel", (nn.Sequential,), {})(model.bert.encoder)
    else:
        from torch.distributed.tensor import distribute_tensor

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model.classifier.weight = nn.Parameter(distribute_tensor(model.classifier.weight, mesh))
    return model


@pytest.mark.parametrize("kind", ["ZeRO-3", "FSDP", "DTensor"])
def test_a_sharded_model_is_refused(kind, tmp_path, caplog):
    store = f"file://{tmp_path}/store"
    if kind == "DTensor":
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match=rf"sharded \({kind}\)"):
            Monitor(sharded(kind))
        watching = SpectraCallback()
        state = transformers.TrainerState(global_step=0, max_steps=1)
        watching.on_train_begin(NO_ARGUMENTS, state, transformers.TrainerControl(), model=sharded(kind))
        assert watching.monitor is None
        assert "the training is not watched: the model is sharded" in caplog.text
    finally:
        if kind == "DTensor":
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapped", ["plain", "compiled", "parallel", "autocast"])
def test_a_plain_loop(wrapped):
    alone, watched = tiny(), tiny()
    wrap = {
        "compiled": lambda model: torch.compile(model, backend="eager"),
        "parallel": nn.DataParallel,
    }.get(wrapped, lambda model: model)
    loop(alone, wrap=wrap, autocast=wrapped == "autocast")
    watch = Monitor(wrap(watched), every=3, max_share=None)
    records = loop(watched, watch, wrap=wrap, autocast=wrapped == "autocast")
    assert same(weights(alone), weights(watched))
    assert [record.step for record in records if record is not None] == [3, 6]
    assert watch.report is records[-1].report
    assert verdicts(watch.report) == verdicts(spectra.audit(watched, engine="exact", threads=1))


class Clock:
    """Stands for the time module: an audit takes ``cost`` seconds, and nothing else any."""

    def __init__(self, monkeypatch, cost):
        self.now, reports = 0.0, Analysis.reports

        def slow(*args):
            self.now += cost
            return reports(*args)

        monkeypatch.setattr(monitor, "time", self)
        monkeypatch.setattr(Analysis, "reports", slow)

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize(("cost", "steps_between"), [(0.001, 5), (0.02, 10), (0.1, 50)])
def test_audits_wait_until_they_fit_their_share(monkeypatch, cost, steps_between):
    clock = Clock(monkeypatch, cost)
    watch = Monitor(tiny(), every=5, max_share=0.02, at_end=False)
    watch._expected = cost
    done = []
    for step in range(1, 201):
        clock.now += 0.1  # of the training
        if watch.step(step) is not None:
            done.append(step)
            assert watch.share <= 0.02 + 1e-9
    assert done
    assert min(b - a for a, b in zip([0, *done], done, strict=False)) >= steps_between - 1  # a last digit decides
    assert len(done) == 200 // steps_between


def test_what_is_asked_for_by_number_does_not_wait(monkeypatch):
    clock = Clock(monkeypatch, 100.0)
    watch = Monitor(tiny(), every=1, at=(3,))
    for step in range(1, 7):
        clock.now += 0.1
        watch.step(step, last=step == 6)
    assert [record.step for record in watch.history] == [3, 6]


def test_the_exact_threshold_is_that_of_a_comparison():
    found = spectra.compare([FIXTURES / "lora-r4"], FIXTURES / "base", include=["layers.0.*"], draws=0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(FIXTURES / "base", num_labels=5)
    model = peft.PeftModel.from_pretrained(model, FIXTURES / "lora-r4", is_trainable=True)
    watch = Monitor(model, include=["layers.0.*"], exact_threshold=True)
    metrics = watch.audit(1).metrics
    assert metrics["spectra/threshold_margin_exact"] == pytest.approx(found.rows()[0]["threshold"], rel=0.01)
    predicted = min(layer.weights["predicted"] for layer in found.reports[0].layers if layer.weights is not None)
    assert metrics["spectra/threshold_margin"] == pytest.approx(predicted, rel=1e-3)
    assert 0.2 < metrics["spectra/threshold_margin_exact"] < 1


def test_steps_that_are_not_seen_are_made_up_for():
    watch = Monitor(tiny(), every=10, max_share=None)
    seen = [step for step in range(4, 60, 4) if watch.step(step) is not None]
    assert seen == [12, 20, 32, 40, 52]


def test_only_what_is_trained_is_audited_and_copied():
    model = tiny(lora=False)
    model.bert.embeddings.requires_grad_(False)
    watch = Monitor(model)
    report = watch.audit(1).report
    assert report is not None
    assert report.layers
    assert not any("embeddings" in layer.name for layer in report.layers)
    assert {layer.status for layer in report.layers} == {"unchanged"}
    assert "spectra/cosine_margin" not in watch.history[0].metrics
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="no matrix of it is trained"):
        Monitor(model)


def test_reports_of_long_ago_are_let_go(monkeypatch, tmp_path):
    monkeypatch.setattr(monitor, "REPORTS", 2)
    watch = Monitor(tiny(), history_file=tmp_path / "h.jsonl")
    for step in range(4):
        watch.audit(step)
    assert [record.report is None for record in watch.history] == [True, True, False, False]
    lines = (tmp_path / "h.jsonl").read_text()
    assert all(record.report is not None for record in load_history(tmp_path / "h.jsonl"))
    (tmp_path / "h.jsonl").write_text(lines[:-10])  # a training that was killed
    assert [record.step for record in load_history(tmp_path / "h.jsonl")] == [0, 1, 2]
    for text in ('{"step": 1}\n', "[]\n", "no JSON\n", json.dumps({"step": "x"}) + "\n"):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(CorruptFileError, match="line 1 is no record"):
            load_history(tmp_path / "bad.jsonl")
    with pytest.raises(MissingFileError):
        load_history(tmp_path / "none.jsonl")


def test_a_history_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    model = tiny()
    watch = Monitor(model, every=1, max_share=None, history_file=tmp_path / "file" / "h.jsonl")
    loop(model, watch, steps=2)
    assert len(watch.history) == 2
    assert "could not be written" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every = 0"),
        ({"every": 2.5}, "every = 2.5"),
        ({"max_share": 0}, "max_share = 0"),
        ({"stop_above": -1}, "stop_above = -1"),
        ({"limit_on": "new"}, "limit_on = 'new'"),
        ({"on_error": "die"}, "on_error = 'die'"),
        ({"engine": "fast"}, "engine = 'fast'"),
        ({"epsilon": 2}, "epsilon = 2"),
        ({"memory": -1}, "memory = -1"),
        ({"evry": 5}, "'evry' is no option"),
    ],
)
def test_options_are_checked_before_the_training(options, message):
    with pytest.raises(UsageError, match=message):
        SpectraCallback(**options)
    with pytest.raises(UsageError, match=message):
        Monitor(tiny(), **options)


def test_null_spaces_have_no_margin():
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 24, bias=False)
    model.weight.data = torch.randn(24, 3) @ torch.randn(3, 16)
    watch = Monitor(model, every=1, max_share=None)
    model.weight.data *= 1.01
    record = watch.audit(1)
    assert record.intruders == 0
    assert record.report is not None
    assert any("null_space" in vector.flags for vector in record.report.layers[0].vectors)
    assert record.metrics.get("spectra/cosine_margin", 1) > 0


@pytest.mark.parametrize(
    "options", [{"at": 5}, {"at": ("x",)}, {"max_share": "x"}, {"memory": None}, {"every": True}, {"memory": True}]
)
def test_options_of_the_wrong_kind(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        Monitor(torch.nn.Linear(8, 8), **options)
