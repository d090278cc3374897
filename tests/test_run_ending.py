"""Every way a run can end has a code and a reason."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import DiskError, ExitCode
from finetune.run.ending import as_fault, code_and_reason


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
