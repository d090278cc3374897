"""What the machine computes with, and in which precision."""

from __future__ import annotations

import json

import pytest
import torch

from finetune.errors import HardwareError
from finetune.plan import hardware
from finetune.plan.hardware import Hardware, accelerator, compute_dtype, cpu, detect


def machine(device: str, bf16: bool) -> Hardware:
    return Hardware(device, 1, "x", 2**34, bf16, 4)


def test_the_cpu_is_described() -> None:
    found = cpu()
    assert (found.device, found.count) == ("cpu", 1)
    assert found.memory_bytes > 2**28
    assert found.threads == torch.get_num_threads()
    assert found.name
    assert json.loads(json.dumps(found.facts()))["device"] == "cpu"


@pytest.mark.parametrize(("flags", "bf16"), [({"amx_bf16", "sse"}, True), ({"avx512_bf16"}, False), (set(), False)])
def test_only_matrix_units_make_bfloat16_worth_while_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], bf16: bool
) -> None:
    monkeypatch.setattr(hardware, "_cpu_flags", lambda: frozenset(flags))
    assert cpu().bf16 is bf16


def test_an_accelerator_is_insisted_on_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "accelerator", lambda: None)
    assert detect("auto").device == detect("cpu").device == "cpu"
    with pytest.raises(HardwareError, match=r"launch\.device: accelerator was asked for, and torch sees none"):
        detect("accelerator")
    monkeypatch.setattr(hardware, "accelerator", lambda: machine("cuda", True))
    assert detect("auto").device == detect("accelerator").device == "cuda"
    assert detect("cpu").device == "cpu"


def test_what_torch_sees_is_believed() -> None:
    found = accelerator()
    assert (found is None) is not (torch.cuda.is_available() or torch.xpu.is_available() or torch.mps.is_available())


@pytest.mark.parametrize(
    ("dtype", "device", "bf16", "expected"),
    [
        ("auto", "cpu", True, "bfloat16"),
        ("auto", "cpu", False, "float32"),
        ("auto", "cuda", True, "bfloat16"),
        ("auto", "cuda", False, "float16"),
        ("auto", "mps", False, "float32"),
        ("float32", "cuda", True, "float32"),
        ("bfloat16", "cpu", False, "bfloat16"),
        ("float16", "cpu", True, "float16"),
    ],
)
def test_the_precision_is_the_one_named_or_the_fastest(dtype: str, device: str, bf16: bool, expected: str) -> None:
    assert compute_dtype(dtype, machine(device, bf16)) == expected
