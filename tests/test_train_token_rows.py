"""Trained rows of the embedding under ZeRO and FSDP2: those of one process, whole, whoever held which part."""

from __future__ import annotations

from typing import Any

import pytest
from test_train_modes import alone, assert_alike, product, run
from tiny import Lab


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize(
    "changes",
    [{"adapter.trainable_token_indices": [5, 6, 7]}, {"model.new_tokens": ["<query>"]}],
    ids=["rows", "new tokens"],
)
def test_token_rows_train_in_parts_as_in_one_process(lab: Lab, mode: str, changes: dict[str, Any]) -> None:
    changes = {**changes, "model.name_or_path": "llama3"}
    alone(lab, changes)
    run(lab, mode, changes)
    assert_alike(lab, mode, 1e-6)
    rows = [tensor for name, tensor in product(lab, mode).items() if "trainable_tokens_delta" in name]
    assert {len(one) for one in rows} == {len(next(iter(changes.values())))}, "of the head too, where it is its own"
