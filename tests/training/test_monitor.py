"""Trainings that are watched: what is logged, what it costs, and that nothing else is changed by it."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import spectra
from spectra import plots
from spectra.errors import CorruptFileError, MissingFileError, UsageError
from spectra.records.history import PREFIX
from spectra.runs.reports import Analysis
from spectra.svd import short_spectrum
from spectra.training import Monitor, SpectraCallback, load_history, monitor
from tests.support.paths import FIXTURES, ROOT
from tests.support.published import MINILM, article_batches, published
from tests.support.trainings import LABELS, NO_ARGUMENTS, examples, logged, loop, same, tiny, trained, verdicts, weights

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("lora", [True, False])
def test_the_training_is_the_same_and_every_log_is_there(tmp_path, lora):
    watching = SpectraCallback(every=2, max_share=None)
    alone, watched = tiny(lora), tiny(lora)
    before = trained(alone, tmp_path / "a")
    after = trained(watched, tmp_path / "b", [watching])
    assert same(weights(alone), weights(watched))
    assert [step for step, _ in logged(after, "loss")] == [2, 4, 6, 8]
    assert logged(before, "loss") == logged(after, "loss")
    assert [record.step for record in watching.history] == [2, 4, 6, 8]
    for name in watching.history[0].metrics:
        assert logged(after, name) == [(record.step, record.metrics[name]) for record in watching.history]
    sizes = [record.metrics["spectra/update_norm"] for record in watching.history]
    assert 0 < sizes[0] < sizes[-1]


@pytest.mark.parametrize("lora", [True, False])
def test_the_last_record_is_the_audit_of_what_is_saved(tmp_path, lora):
    model, watching = tiny(lora), SpectraCallback(every=None)
    base = model.get_base_model() if lora else model
    if not lora:
        base.save_pretrained(tmp_path / "base")
    trained(model, tmp_path / "out", [watching])
    (record,) = watching.history
    assert record.step == 8
    model.save_pretrained(tmp_path / "tuned")
    if lora:
        tiny(lora=False).save_pretrained(tmp_path / "base")
    assert record.report is not None
    expected = spectra.audit(tmp_path / "tuned", tmp_path / "base", cache=False)
    found = verdicts(record.report)
    for layer in expected.layers:
        assert found[layer.name] == (layer.status, layer.intruder_indices)
    assert record.metrics["spectra/intruders"] == record.report.total("all") > 0
    assert sum(record.by_module_type.values()) == record.intruders
    lowest = min(v.max_cosine or 0.0 for layer in record.report.judged for v in layer.vectors)
    assert record.metrics["spectra/cosine_margin"] == pytest.approx(lowest - 0.5)


@published
def test_a_published_model_is_watched_by_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    assert MINILM is not None
    assert MINILM.submodule_search_locations
    folder = Path(MINILM.submodule_search_locations[0]) / "model"
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=5)
    model = peft.get_peft_model(
        model, peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value", "dense"])
    )
    data = [{k: v[i] for k, v in batch.items()} for batch in article_batches(tokenizer, 12, 8) for i in range(8)]
    watching = SpectraCallback(every=4, max_share=None, history_file=tmp_path / "run" / "history.jsonl")
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=8, max_steps=12, learning_rate=2e-3, logging_steps=3,
        report_to=["tensorboard"], save_strategy="no", disable_tqdm=True, use_cpu=True,
        gradient_checkpointing=True, bf16=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data,
        data_collator=transformers.DataCollatorWithPadding(tokenizer), callbacks=[watching],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    (event_file,) = (tmp_path / "events").rglob("events.*")
    events = EventAccumulator(str(event_file)).Reload()
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [3, 6, 9, 12]
    for name in ("intruders", "energy_share", "cosine_margin", "threshold_margin", "update_norm", "seconds"):
        seen = [(scalar.step, scalar.value) for scalar in events.Scalars(f"train/spectra/{name}")]
        expected = [(record.step, record.metrics[PREFIX + name]) for record in watching.history]
        assert [step for step, _ in seen] == [4, 8, 12]
        assert seen == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert events.Scalars("train/spectra/intruders_in/output.dense")
    history = load_history(tmp_path / "run" / "history.jsonl")
    assert [(record.step, record.metrics) for record in history] == [(r.step, r.metrics) for r in watching.history]
    assert verdicts(history[-1].report) == verdicts(watching.history[-1].report)
    assert plots.render(plots.training_history(history), "png")


def test_a_limit_warns_or_ends_the_training(tmp_path, caplog):
    warned = SpectraCallback(every=2, max_share=None, warn_above=0)
    trained(tiny(), tmp_path / "a", [warned])
    assert {record.limit for record in warned.history if record.intruders} == {"warn"}
    assert "intruder dimensions, above the limit of 0" in caplog.text
    stopped = SpectraCallback(every=1, max_share=None, stop_above=0)
    trainer = trained(tiny(), tmp_path / "b", [stopped], steps=30)
    assert stopped.history[-1].should_stop
    assert not any(record.intruders for record in stopped.history[:-1])
    assert trainer.state.global_step == stopped.history[-1].step < 30


def test_a_training_that_another_ends_has_its_last_audit(tmp_path):
    from transformers import TrainerCallback

    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    watching = SpectraCallback(every=None)
    trainer = trained(tiny(), tmp_path, [watching, Enough()])
    assert logged(trainer, "spectra/intruders") == [(3, watching.history[0].intruders)]
    assert watching.monitor is not None
    share = watching.monitor.share
    assert watching.monitor._spectra.bytes == 0
    assert watching.monitor.share == share
    with pytest.raises(UsageError, match="let go of its model"):
        watching.monitor.audit(4)


def test_an_audit_that_fails_ends_no_training_unless_asked(tmp_path, caplog, monkeypatch):
    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Analysis, "reports", fails)
    trainer = trained(tiny(), tmp_path / "a", [watching := SpectraCallback(every=4, max_share=None)])
    assert trainer.state.global_step == 8
    assert watching.history == []
    assert caplog.text.count("was not audited: RuntimeError: out of memory") == 2
    with pytest.raises(RuntimeError, match="out of memory"):
        trained(tiny(), tmp_path / "b", [SpectraCallback(every=4, max_share=None, on_error="raise")])


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


def test_only_the_main_process_audits():
    watching = SpectraCallback()
    state = transformers.TrainerState(is_world_process_zero=False)
    watching.on_train_begin(NO_ARGUMENTS, state, transformers.TrainerControl(), model=tiny())
    assert watching.monitor is None


def test_processes_stop_together(tmp_path):
    script = (
        f"import os; from tests.support.trainings import one_of_two; one_of_two(os.environ['RANK'], {str(tmp_path)!r})"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script],
            env={**os.environ, **names, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=240) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert main[0] == other[0] == main[2][0] < 30
    assert (main[1], other[1], other[2]) == (main[0], 0, [])


def test_a_full_fine_tune_that_is_resumed_needs_its_base(tmp_path, caplog):
    model = tiny(lora=False)
    start = weights(model)
    trained(model, tmp_path, steps=4, save_strategy="steps", save_steps=4)
    lost, given = SpectraCallback(max_share=None), SpectraCallback(start, max_share=None)
    for watching in (lost, given):
        trainer = transformers.Trainer(
            model=tiny(lora=False),
            args=transformers.TrainingArguments(
                str(tmp_path), per_device_train_batch_size=4, max_steps=6, report_to=[], save_strategy="no",
                disable_tqdm=True, use_cpu=True,
            ),
            train_dataset=examples(),
            callbacks=[watching],
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert lost.monitor is None
    assert "its base is no longer there" in caplog.text
    (record,) = given.history
    assert record.step == 6
    assert record.metrics["spectra/update_norm"] > 0


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


def test_the_base_is_decomposed_once_and_within_the_memory_given(monkeypatch, tmp_path):
    made = []

    def counted(W0):
        made.append(W0.shape)
        return short_spectrum(W0)

    monkeypatch.setattr("spectra.training.kept.short_spectrum", counted)
    model = tiny()
    watch = Monitor(model, every=2, max_share=None)
    loop(model, watch)
    assert sorted(made) == [(LABELS, 64)] + [(64, 64)] * 4  # the classifier; query and value of two layers
    assert len(watch.history) == 3
    made.clear()
    bounded = Monitor(model, memory=2 * 4 * 64 * 64)
    assert verdicts(bounded.audit(1).report) == verdicts(watch.report)
    assert bounded._spectra.bytes <= 2 * 4 * 64 * 64
    assert made == [(64, 64)] * 2
    Monitor(model, cache=tmp_path).audit(1)
    made.clear()
    disk = Monitor(model, cache=tmp_path)
    assert verdicts(disk.audit(1).report) == verdicts(watch.report)
    assert made == []
    assert disk._spectra.bytes == 0
    other = tiny()
    with torch.no_grad():
        for value in other.parameters():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(9)) / 8)
    assert verdicts(Monitor(other, cache=tmp_path).audit(1).report) == verdicts(spectra.audit(other, engine="exact"))


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


def test_a_callback_without_a_trainer_keeps_its_history(caplog):
    watching = SpectraCallback(every=1, max_share=None)
    state = transformers.TrainerState(global_step=0, max_steps=1)
    control = transformers.TrainerControl()
    watching.on_train_begin(NO_ARGUMENTS, state, control, model=tiny())
    state.global_step = 1
    watching.on_step_end(NO_ARGUMENTS, state, control)
    assert [record.step for record in watching.history] == [1]
    assert state.log_history[0]["spectra/intruders"] == 0
    assert "no trainer found" in caplog.text
    assert pickle.loads(pickle.dumps(watching)).history == []


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


def test_a_killed_training_goes_on_in_its_history(tmp_path):
    """A line that was cut is cut off, and what an earlier attempt found beyond where it went on is left out."""
    file = tmp_path / "history.jsonl"
    for steps in ((1, 2, 3), (2, 3, 4)):
        model = torch.nn.Linear(24, 16)
        watch = Monitor(model, every=1, max_share=None, history_file=file)
        for step in steps:
            model.weight.data += 0.1
            watch.step(step)
        file.write_bytes(file.read_bytes()[:-20])
    assert [record.step for record in load_history(file)] == [1, 2, 3]


def test_a_history_is_appended_to_no_other_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("my data")
    with pytest.raises(UsageError, match="no history of a training"):
        Monitor(torch.nn.Linear(8, 8), history_file=file)
    assert file.read_text() == "my data"


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


def test_a_training_that_ended_in_an_error_can_be_let_go(tmp_path):
    callback = SpectraCallback(every=1)
    callback.release()
    callback.monitor = Monitor(torch.nn.Linear(8, 8), every=1)
    callback.release()
    assert callback.monitor._model is None
