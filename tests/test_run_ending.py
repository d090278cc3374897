"""Every way a run can end has a code and a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.errors import DiskError, ExitCode
from finetune.run.ending import as_fault, code_and_reason, leave_word
from finetune.run.folder import RunFolder


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), ExitCode.STOPPED, "stopped at once"),
        (
            torch.OutOfMemoryError("CUDA out of memory\nmore"),
            ExitCode.ENVIRONMENT,
            "out of memory: CUDA out of memory\n",
        ),
        (RuntimeError("Timed out waiting 20000ms for recv"), ExitCode.HANG, "within launch.timeout"),
        (RuntimeError("Read error: Connection reset by peer"), ExitCode.HANG, "another process of this run died"),
        (
            RuntimeError("[/x/gloo/tcp/pair.cc:553] Connection closed by peer [::1]:9. This is typically caused by"),
            ExitCode.HANG,
            "launch.timeout: Connection closed by peer [::1]:9; its own messages",
        ),
        (DiskError("no space"), ExitCode.DISK, "no space"),
    ],
)
def test_what_ends_a_run_is_told_with_its_code(error: BaseException, code: int, said: str) -> None:
    found, reason = code_and_reason(as_fault(error))
    assert found == code
    assert said in reason


def test_an_unexpected_error_stays_as_it_is() -> None:
    error = RuntimeError("something else")
    assert as_fault(error) is error
    assert code_and_reason(error) == (ExitCode.FAILURE, "RuntimeError: something else")


def test_a_disk_that_does_not_take_the_reason_is_told_and_raises_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").touch()  # a file where a folder is needed
    leave_word(RunFolder(tmp_path / "run"), ExitCode.NON_FINITE, "step 3: the loss is NaN", 3)
    assert "says how the run ended" in capsys.readouterr().err
    leave_word(RunFolder(tmp_path / "other"), ExitCode.NON_FINITE, "step 3: the loss is NaN", 3)
    assert "the loss is NaN" in (tmp_path / "other/exit.json").read_text()
