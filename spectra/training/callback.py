"""The monitor as a callback of the Trainer of transformers."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import distributed

from spectra.errors import SpectraError, in_one_line, needs_extra
from spectra.records.history import Record
from spectra.sources.live import Source
from spectra.training.monitor import Monitor, checked

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError:
    raise needs_extra("the callback needs", "transformers", "training") from None

logger = logging.getLogger("spectra.training")


class SpectraCallback(TrainerCallback):
    """Audits the model in training, and logs what it finds as the trainer logs its loss.

    The numbers of :func:`spectra.records.history.metrics_of` go through ``trainer.log``, so into its history and to
    TensorBoard, W&B or whatever else it reports to.  Only the main process audits; others wait for it where they next
    meet, and with ``stop_above`` hear after each step whether to stop.  An audit that fails is a warning
    in the log, and the training goes on.  An audit must take less than the other processes' patience (``ddp_timeout``),
    and ``on_error="raise"`` is for one process: the others would wait.

    The last audit is of the weights after the last step, also where ``load_best_model_at_end`` puts others in their
    place.

    Parameters
    ----------
    base : as for :class:`Monitor`; to be given where a full fine-tune is resumed, since the model then is no longer
        the one it was begun with.
    **options : those of :class:`Monitor`.

    Attributes
    ----------
    monitor : of the training that goes on, or went on last; None before, and where the model could not be watched.
    """

    def __init__(self, base: Source | None = None, **options: Any):
        checked(options)  # now, rather than when the training has begun
        self._base, self._options = base, options
        self.monitor: Monitor | None = None
        self._trainer: Any = None

    @property
    def history(self) -> list[Record]:
        """The records so far."""
        return [] if self.monitor is None else self.monitor.history

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.monitor, self._trainer = None, None
        if not state.is_world_process_zero:
            return
        self._trainer = _trainer_of(state)
        model: torch.nn.Module = kwargs["model"]
        try:
            self.monitor = Monitor(model, self._base, resumed=state.global_step > 0, **self._options)
        except Exception as error:  # as in Monitor.step
            if self._options.get("on_error") == "raise":
                raise
            what = str(error) if isinstance(error, SpectraError) else f"{type(error).__name__}: {error}"
            logger.warning("the training is not watched: %s", in_one_line(what))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        stop = self._step(state, control)
        if self._options.get("stop_above") is not None and distributed.is_available() and distributed.is_initialized():
            # A process that stopped alone would leave the others waiting for it.
            told = torch.tensor([int(stop)], device=args.device)
            distributed.broadcast(told, src=0)
            stop = bool(told.item())
        if stop:
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The last chance before the trainer's reporters close, for whoever ended the training after its last step.
        self._step(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.release()

    def release(self) -> None:
        """Lets go of the model, the base and the spectra; for a training that was ended by an error, after which the
        trainer says nothing.
        """
        self._trainer = None
        if self.monitor is not None:
            self.monitor.release()

    def _step(self, state: TrainerState, control: TrainerControl) -> bool:
        """Audits if it is time to; whether the training should stop."""
        if self.monitor is None:
            return False
        last = control.should_training_stop or state.global_step >= state.max_steps
        record = self.monitor.step(state.global_step, last=last)
        if record is None:
            return False
        self._log(record, state, control)
        return record.should_stop

    def _log(self, record: Record, state: TrainerState, control: TrainerControl) -> None:
        if self._trainer is None:
            state.log_history.append({**record.metrics, "epoch": state.epoch, "step": record.step})
            return
        due = control.should_log  # the loss's own turn, which logging would take away
        self._trainer.log(dict(record.metrics))
        control.should_log = due

    def __getstate__(self) -> dict[str, Any]:
        """Without the trainer and the model, for those who copy or pickle callbacks."""
        return {**self.__dict__, "monitor": None, "_trainer": None}


def _trainer_of(state: TrainerState) -> Any:
    """The trainer whose state this is, or None.

    Events do not say which trainer they come from, and reporters stand before other callbacks, so that what these add
    to a log comes too late; but a trainer is what has called.
    """
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        candidate = frame.f_locals.get("self")
        if getattr(candidate, "state", None) is state and hasattr(candidate, "callback_handler"):
            return candidate
    logger.warning("no trainer found that called: what is found is in its history alone, and not reported")
    return None
