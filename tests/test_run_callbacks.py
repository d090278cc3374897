"""What watches a run: the metrics file, the progress line, the stop signal and the check that the adapter moves."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments, get_scheduler

from finetune.errors import DiskError, ModelError
from finetune.run.callbacks import STEPS_UNTIL_MOVED, AdapterMoves, MetricsFile, Progress, StopSignal
from finetune.run.folder import RunFolder


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])


def state(step: int, most: int = 20, main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=most, is_world_process_zero=main)


def control() -> TrainerControl:
    return TrainerControl()


# -- metrics -------------------------------------------------------------------------------------------------------


def test_every_log_is_a_line(args: TrainingArguments, tmp_path: Path) -> None:
    watcher = MetricsFile(RunFolder(tmp_path))
    watcher.on_log(args, state(1), control(), logs={"loss": 2.5, "epoch": 0.1})
    watcher.on_log(args, state(2), control(), logs={"eval_loss": 1})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{key: value for key, value in line.items() if key != "time"} for line in lines] == [
        {"step": 1, "loss": 2.5, "epoch": 0.1},
        {"step": 2, "eval_loss": 1},
    ]
    assert all(line["time"] > 1.7e9 for line in lines)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "text", None, torch.ones(2)])
def test_what_is_no_number_becomes_null_and_the_file_stays_json(
    args: TrainingArguments, tmp_path: Path, value: Any
) -> None:
    MetricsFile(RunFolder(tmp_path)).on_log(args, state(3), control(), logs={"loss": value})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None


def test_only_rank_0_writes(args: TrainingArguments, tmp_path: Path) -> None:
    MetricsFile(RunFolder(tmp_path)).on_log(args, state(1, main=False), control(), logs={"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(args: TrainingArguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*words: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(DiskError, match=r"metrics\.jsonl: no space left"):
        MetricsFile(RunFolder(tmp_path)).on_log(args, state(1), control(), logs={"loss": 1.0})


def test_figures_that_the_disk_does_not_take_wait_for_room_where_the_recipe_says_so(
    args: TrainingArguments, tmp_path: Path
) -> None:
    """The limit of this process on the size of files stands for the disk: a write is cut short, then the next fails."""
    told: list[str] = []
    watcher = MetricsFile(RunFolder(tmp_path), "continue", told.append)
    watcher.on_log(args, state(1), control(), logs={"loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, limit[1]))
    try:
        for step in (2, 3):
            watcher.on_log(args, state(step), control(), logs={"loss": float(step)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "metrics.jsonl").stat().st_size == size + 7
    assert len(told) == 1
    assert "a write failed" in told[0]
    assert "kept in memory" in told[0]
    watcher.settle()
    assert len(told) == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0)]


# -- progress ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    """A stream whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def walk(watcher: Progress, args: TrainingArguments, first: int = 0, most: int = 20, main: bool = True) -> None:
    """A run from `first` to `most` with a validation at the end."""
    watcher.on_train_begin(args, state(first, most, main), control())
    for step in range(first + 1, most + 1):
        logs = {"loss": 1 / step, "tokens_per_second": 123.4}
        watcher.on_log(args, state(step, most, main), control(), logs=logs)
    watcher.on_log(args, state(most, most, main), control(), logs={"eval_loss": 0.25})
    watcher.on_log(args, state(most, most, main), control(), logs={"train_runtime": 3.0})
    watcher.on_train_end(args, state(most, most, main), control())


def test_without_a_terminal_there_is_a_line_for_each_tenth(args: TrainingArguments) -> None:
    stream = io.StringIO()
    walk(Progress(stream), args, most=50)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [
        "1/50", "5/50", "10/50", "15/50", "20/50", "25/50", "30/50", "35/50", "40/50", "45/50", "50/50", "50/50"
    ]  # fmt: skip
    assert lines[0].startswith("step 1/50  loss 1.0000  123 tokens/s  0:")
    assert lines[-2].endswith("0:00 left")
    assert lines[-1] == "step 50/50  validation loss 0.2500"
    assert "\x1b" not in stream.getvalue()


def test_a_short_run_has_a_line_for_each_step(args: TrainingArguments) -> None:
    stream = io.StringIO()
    walk(Progress(stream), args, most=3)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/3", "2/3", "3/3", "3/3"]


def test_on_a_terminal_one_line_is_drawn_over_and_left_behind(args: TrainingArguments) -> None:
    stream = Terminal()
    walk(Progress(stream), args)
    parts = stream.getvalue().split("\r\x1b[2K")
    assert parts[0] == ""
    assert len(parts) == 22
    assert [part for part in parts if "\n" in part] == ["step 20/20  validation loss 0.2500\n\n"]


def test_the_time_left_counts_from_where_a_resumed_run_began(
    args: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("finetune.run.callbacks.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    watcher = Progress(stream)
    watcher.on_train_begin(args, state(90, 1000), control())
    watcher.on_log(args, state(100, 1000), control(), logs={"loss": 1.0})
    assert stream.getvalue().endswith("15:00 left\n")  # 900 steps at one a second


def test_hours_are_shown_where_there_are_any(args: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("finetune.run.callbacks.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    watcher = Progress(stream)
    watcher.on_train_begin(args, state(0, 1000), control())
    watcher.on_log(args, state(1, 1000), control(), logs={"loss": 1.0})
    assert stream.getvalue().endswith("2:46:30 left\n")


def test_other_ranks_draw_nothing(args: TrainingArguments) -> None:
    for stream in (io.StringIO(), Terminal()):
        walk(Progress(stream), args, main=False)
        assert stream.getvalue() == ""


def test_a_reader_that_has_left_does_not_stop_the_run(args: TrainingArguments) -> None:
    walk(Progress(Gone()), args)
    closed = io.StringIO()
    closed.close()
    walk(Progress(closed), args)


# -- stop ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
    watcher = StopSignal()
    watcher.listen()
    yield watcher
    watcher.restore()
    assert [signal.getsignal(number) for number in StopSignal.SIGNALS] == before


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_a_signal_ends_the_step_saves_and_stops(stop: StopSignal, args: TrainingArguments, number: int) -> None:
    asked = control()
    stop.on_train_begin(args, state(0), asked)
    stop.on_step_end(args, state(1), asked)
    assert (asked.should_save, asked.should_training_stop, stop.stopped) == (False, False, False)
    os.kill(os.getpid(), number)
    assert stop.received == number
    stop.on_step_end(args, state(2), asked)
    assert (asked.should_save, asked.should_training_stop, stop.stopped) == (True, True, True)


def test_a_signal_in_the_last_step_lets_the_run_finish(stop: StopSignal, args: TrainingArguments) -> None:
    asked = control()
    os.kill(os.getpid(), signal.SIGTERM)
    stop.on_step_end(args, state(20, 20), asked)
    assert (asked.should_save, asked.should_training_stop, stop.stopped) == (False, False, False)


def test_a_second_signal_stops_at_once(stop: StopSignal) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_handler_that_python_did_not_set_is_given_back_as_the_default() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        watcher = StopSignal()
        watcher._previous = {signal.SIGUSR1: None}
        watcher.restore()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


# -- the adapter moves ---------------------------------------------------------------------------------------------


class Skipping:
    """An optimizer as accelerate wraps it."""

    def __init__(self) -> None:
        self.step_was_skipped = False


class Walk:
    """Steps of a real scheduler, watched."""

    def __init__(self, args: TrainingArguments, still: list[str], warmup: int = 0, name: str = "cosine") -> None:
        self.args = args
        self.looked: list[int] = []
        self.still = still
        self.step = 0
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        self.optimizer = Skipping()
        self.scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
        self.watcher = AdapterMoves(self.untrained)

    def untrained(self, model: Any) -> list[str]:
        self.looked.append(self.step)
        return self.still

    def go(self, steps: int, skipped: bool = False) -> None:
        for _ in range(steps):
            self.step += 1
            self.optimizer.step_was_skipped = skipped
            if not skipped:
                self.scheduler.optimizer.step()
                self.scheduler.step()
            self.watcher.on_step_end(
                self.args, state(self.step), control(), model=None, lr_scheduler=self.scheduler,
                optimizer=self.optimizer,
            )  # fmt: skip


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "inverse_sqrt"])
def test_it_looks_once_after_two_steps(args: TrainingArguments, name: str) -> None:
    walk = Walk(args, [], name=name)
    walk.go(10)
    assert walk.looked == [STEPS_UNTIL_MOVED] == [2]


def test_steps_with_a_rate_of_zero_do_not_count(args: TrainingArguments) -> None:
    walk = Walk(args, [], warmup=5)  # the rate of the first step is 0
    walk.go(2)
    assert walk.looked == []
    walk.go(4)
    assert walk.looked == [3]


def test_steps_that_the_gradient_scaler_skips_do_not_count(args: TrainingArguments) -> None:
    walk = Walk(args, ["q"])
    walk.go(5, skipped=True)
    assert walk.looked == []
    walk.go(1)
    with pytest.raises(ModelError):
        walk.go(1)


def test_modules_that_stay_at_zero_stop_the_run_by_name(args: TrainingArguments) -> None:
    walk = Walk(args, [f"layer{number}" for number in range(11)])
    walk.go(1)
    with pytest.raises(ModelError, match=r"after 2 steps the adapter of 11 modules is as it began.*layer7 …") as caught:
        walk.go(1)
    assert "layer8" not in str(caught.value)
    assert caught.value.exit_code == 5
