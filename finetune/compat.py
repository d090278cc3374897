"""Remedies for defects of other packages, each with its versions and a test that fails once it is not needed."""

from __future__ import annotations

from typing import Any


def keep_4bit_unpacked(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on a CPU.

    bitsandbytes 0.50.2, on CPUs with AVX512-BF16: the first forward in eval mode rewrites a Linear4bit's weight into
    another layout, in place. A forward in training mode, or a dequantisation, then reads it in the old layout: one
    validation, and the rest of the training sees random weights without a word.

    Remove when tests/test_compat.py::test_bitsandbytes_still_repacks_in_eval_mode fails.

    Args:
        model: a model with bitsandbytes' Linear4bit layers, or none.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
