"""What watches a run: the metrics file, the progress line, the stop signal and the check that the adapter moves."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal, TextIO

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.errors import DiskError, ModelError
from finetune.files import disk_errors
from finetune.run.folder import RunFolder

# Two optimizer steps with a learning rate above zero: the first moves lora_B off zero wherever a gradient arrives.
STEPS_UNTIL_MOVED = 2

LINE_END = b"\n"


class MetricsFile(TrainerCallback):
    """Appends every logged figure to metrics.jsonl, on rank 0.

    What the disk does not take ends the run, or waits in memory for room, as training.on_save_error says.
    """

    def __init__(
        self,
        folder: RunFolder,
        on_error: Literal["stop", "continue"] = "stop",
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            folder: the run's.
            on_error: training.on_save_error.
            tell: told what the user should know and nothing else says.
        """
        self.folder = folder
        self.on_error = on_error
        self.tell = tell
        self._waiting = b""  # what is yet to be written, which may begin in the midst of a line
        self._told = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The last step is logged whatever logging_steps says: its loss is what a run reports as final."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """One line per log; figures that JSON cannot hold (NaN) become null.

        Raises:
            DiskError: the line could not be written, and training.on_save_error says stop.
        """
        if not state.is_world_process_zero:
            return
        logs = given.get("logs") or {}
        line = {"step": state.global_step, "time": round(time.time(), 3)}
        line.update({key: value if _is_json_number(value) else None for key, value in logs.items()})
        self._waiting += json.dumps(line).encode() + LINE_END
        self._write()

    def settle(self) -> None:
        """The run ends, however it does: what waits is tried a last time, and told where it stays unwritten."""
        if self._waiting and self.on_error == "continue":
            self._write()
            if self._waiting:
                self.tell(f"{self.folder.metrics} lacks its last {self._waiting.count(LINE_END)} lines")

    def _write(self) -> None:
        try:
            with disk_errors(self.folder.metrics), open(self.folder.metrics, "ab", buffering=0) as stream:
                while self._waiting:
                    self._waiting = self._waiting[stream.write(self._waiting) :]
        except DiskError as error:
            if self.on_error == "stop":
                newest = next((f" ({path.name} is the newest)" for path in self.folder.newest_first()), "")
                raise DiskError(f"{error}{newest}") from error
            if not self._told:
                self.tell(f"{error}. Training goes on; its figures are kept in memory and written once there is room")
            self._told = True
        else:
            self._told = False


def _is_json_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Progress(TrainerCallback):
    """A live line on a terminal, a line per tenth elsewhere: step, loss, tokens per second, time left."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.started = 0.0
        self.first_step = 0
        self.printed = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """The clock starts here, so that loading does not count as training."""
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Draw the newest figures."""
        logs = given.get("logs") or {}
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self._write(f"step {state.global_step}/{state.max_steps}  validation loss {logs['eval_loss']:.4f}", True)
            return
        if "loss" not in logs:
            return
        done = max(1, state.global_step - self.first_step)
        left = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
        line = (
            f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"{logs.get('tokens_per_second', 0):.0f} tokens/s  {_clock(left)} left"
        )
        tenth = 10 * state.global_step // max(1, state.max_steps)
        keep = tenth != self.printed or state.global_step >= state.max_steps
        self.printed = tenth
        self._write(line, keep)

    def _write(self, line: str, keep: bool) -> None:
        with contextlib.suppress(OSError, ValueError):  # whoever read this is gone; the run goes on
            if self.stream.isatty():
                self.stream.write(f"\r\x1b[2K{line}" + ("\n" if keep and "validation" in line else ""))
            elif keep:
                self.stream.write(line + "\n")
            self.stream.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Leave the live line behind."""
        if not state.is_world_process_zero:
            return
        with contextlib.suppress(OSError, ValueError):
            if self.stream.isatty():
                self.stream.write("\n")
                self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class StopSignal(TrainerCallback):
    """SIGINT, SIGTERM or SIGUSR1: finish the step, write a checkpoint, stop. A second signal stops at once.

    All ranks stop at the same step: after each step they agree on whether any of them was told to.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, hurry: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            hurry: called at the first signal, in the handler.
        """
        self.received: int | None = None
        self.stopped = False
        self._hurry = hurry
        self._group: Any = None
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Take over the signals; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        self._hurry()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """A group over the CPU, so that asking costs an accelerator nothing."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Agree, then stop with a checkpoint, unless this was the last step anyway."""
        told = self.received is not None
        if self._group is not None:
            flag = torch.tensor([int(told)])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            told = bool(flag.item())
        if told and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True


class BeforeFirstStep(TrainerCallback):
    """Does something once the trainer has wrapped the model, before it trains."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Once per process."""
        self.act()


class AdapterMoves(TrainerCallback):
    """After the first steps every adapted module must have moved; else the run stops and names the others."""

    def __init__(self, untrained: Callable[[PeftModel], list[str]], steps: int = STEPS_UNTIL_MOVED) -> None:
        self.untrained = untrained
        self.steps = steps
        self.moved = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Counts steps whose learning rate was above zero, and looks once."""
        skipped = getattr(given.get("optimizer"), "step_was_skipped", False)  # by the gradient scaler, in float16
        if self.moved >= self.steps or skipped:
            return
        scheduler = given.get("lr_scheduler")
        # The scheduler has stepped already: the rate of the step just made is the one of the step before.
        rates = [fn(state.global_step - 1) for fn in getattr(scheduler, "lr_lambdas", [])]
        self.moved += 1 if not rates or any(rate > 0 for rate in rates) else 0
        if self.moved < self.steps:
            return
        still = self.untrained(given["model"])
        if still:
            raise ModelError(
                f"after {state.global_step} steps the adapter of {len(still)} modules is as it began, so nothing "
                f"trains it: {', '.join(still[:8])}{' …' if len(still) > 8 else ''}; leave them out of "
                "adapter.target_modules, or report this if they should train"
            )
