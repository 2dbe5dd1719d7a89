"""The callback of the Trainer of transformers: what is logged, and that nothing else is changed by it."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import spectra
from spectra import plots
from spectra.errors import UsageError
from spectra.records.history import PREFIX
from spectra.runs.reports import Analysis
from spectra.training import Monitor, SpectraCallback, load_history
from tests.support.paths import ROOT
from tests.support.published import MINILM, article_batches, published
from tests.support.trainings import NO_ARGUMENTS, examples, logged, same, tiny, trained, verdicts, weights

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
    assert record.metrics["spectra/intruders_all"] == record.report.total("all") > 0  # its base is random
    assert record.metrics["spectra/intruders"] == record.report.total()
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
    data = [{k: v[i] for k, v in batch.items()} for batch in article_batches(tokenizer, 6, 4) for i in range(4)]
    watching = SpectraCallback(every=2, max_share=None, history_file=tmp_path / "run" / "history.jsonl")
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=6, learning_rate=4e-3, logging_steps=3,
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
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [3, 6]
    for name in ("intruders", "energy_share", "cosine_margin", "threshold_margin", "update_norm", "seconds"):
        seen = [(scalar.step, scalar.value) for scalar in events.Scalars(f"train/spectra/{name}")]
        expected = [(record.step, record.metrics[PREFIX + name]) for record in watching.history]
        assert [step for step, _ in seen] == [2, 4, 6]
        assert seen == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert events.Scalars("train/spectra/intruders_in/output.dense")
    history = load_history(tmp_path / "run" / "history.jsonl")
    assert [(record.step, record.metrics) for record in history] == [(r.step, r.metrics) for r in watching.history]
    assert verdicts(history[-1].report) == verdicts(watching.history[-1].report)
    assert plots.render(plots.training_history(history), "png")


def every_intruder(record):
    return record.metrics["spectra/intruders_all"]


def test_a_limit_warns_or_ends_the_training(tmp_path, caplog):
    warned = SpectraCallback(every=2, max_share=None, warn_above=0, limit_on="all")  # whose base is random
    trained(tiny(), tmp_path / "a", [warned])
    assert {record.limit for record in warned.history if every_intruder(record)} == {"warn"}
    assert "intruder dimensions, above the limit of 0" in caplog.text
    stopped = SpectraCallback(every=1, max_share=None, stop_above=0, limit_on="all")
    trainer = trained(tiny(), tmp_path / "b", [stopped], steps=30)
    assert stopped.history[-1].should_stop
    assert not any(map(every_intruder, stopped.history[:-1]))
    assert trainer.state.global_step == stopped.history[-1].step < 30


def test_limits_leave_out_what_was_never_trained(tmp_path):
    """A random base has intruders after any step, and they stop nothing."""
    watching = SpectraCallback(every=2, max_share=None, stop_above=0)
    trainer = trained(tiny(), tmp_path, [watching])
    assert every_intruder(watching.history[-1])
    assert not any(record.should_stop for record in watching.history)
    assert trainer.state.global_step == 8


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


def test_a_training_that_ended_in_an_error_can_be_let_go(tmp_path):
    callback = SpectraCallback(every=1)
    callback.release()
    callback.monitor = Monitor(torch.nn.Linear(8, 8), every=1)
    callback.release()
    assert callback.monitor._model is None
