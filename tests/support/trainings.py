"""Trainings of a small BERT, by the Trainer of transformers and in a plain loop."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from spectra.training import SpectraCallback

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LABELS, LENGTH = 5, 12
NO_ARGUMENTS: Any = None  # which the callback does not look at


def tiny(lora: bool = True, **options):
    """A BERT of two layers, 64 wide, that has not learnt anything."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        max_position_embeddings=LENGTH, num_labels=LABELS, **options,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    if not lora:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(
            model, peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=64, target_modules=["query", "value"])
        )


def examples(count=64):
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(0, 50, (LENGTH,), generator=generator), "labels": torch.tensor(i % LABELS)}
        for i in range(count)
    ]


def trained(model, folder, callbacks=(), steps=8, **options):
    """The trainer after a training; batches of 4."""
    values = {
        "per_device_train_batch_size": 4, "max_steps": steps, "learning_rate": 2e-2, "logging_steps": 2, "seed": 3,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, **options,
    }  # fmt: skip
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(str(folder), **values),
        train_dataset=examples(),
        callbacks=list(callbacks),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer


def verdicts(report):
    return {layer.name: (layer.status, layer.intruder_indices) for layer in report.layers}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logged(trainer, name):
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


def one_of_two(rank, folder):
    """What each process of a training on two does; the script that starts them is in tests/training."""
    watching = SpectraCallback(every=1, max_share=None, stop_above=0, limit_on="all")
    trainer = trained(tiny(), folder, [watching], steps=30, ddp_backend="gloo", ddp_find_unused_parameters=False)
    stopped = [record.step for record in watching.history if record.should_stop]
    Path(folder, f"{rank}.json").write_text(json.dumps([trainer.state.global_step, len(watching.history), stopped]))


def loop(model, watch=None, steps=6, wrap=lambda model: model, autocast=False):
    """A plain training loop with dropout; returns the records."""
    torch.manual_seed(5)
    running = wrap(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    data, records = examples(), []
    model.train()
    for step in range(1, steps + 1):
        batch = {key: torch.stack([example[key] for example in data[4 * step : 4 * step + 4]]) for key in data[0]}
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            running(**batch).loss.backward()
            optimizer.step()
            if watch is not None:
                before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
                state = torch.get_rng_state()
                records.append(watch.step(step, last=step == steps))
                assert torch.equal(state, torch.get_rng_state())
                assert all(module.training for module in model.modules())
                for parameter, grad in zip(model.parameters(), before, strict=True):
                    assert (parameter.grad is None) == (grad is None)
                    assert grad is None or torch.equal(parameter.grad, grad)
        optimizer.zero_grad()
    return records
