"""Each remedy is still needed, and works."""

from __future__ import annotations

import copy

import pytest
import torch

from finetune.compat import keep_4bit_unpacked

bnb = pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")


def quantised() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(128, 128), requires_grad=False, quant_type="nf4")
    return torch.nn.Sequential(layer).to("cpu")


def before_and_after_eval(model: torch.nn.Sequential) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    model.train()
    before = model(x.clone().requires_grad_()).detach().clone()
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    return before, model(x.clone().requires_grad_()).detach()


def repacks() -> bool:
    return bool(quantised()[0].support_avx512bf16_for_cpu)


@pytest.mark.skipif(not repacks(), reason="this CPU has no AVX512-BF16, so bitsandbytes does not repack")
def test_bitsandbytes_still_repacks_in_eval_mode() -> None:
    try:
        before, after = before_and_after_eval(quantised())
    except (AssertionError, RuntimeError):
        return  # refusing to go on is the other form of the defect
    assert not torch.equal(before, after)


def test_training_after_an_evaluation_sees_the_same_weights() -> None:
    model = copy.deepcopy(quantised())
    keep_4bit_unpacked(model)
    before, after = before_and_after_eval(model)
    assert torch.equal(before, after)
