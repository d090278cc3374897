"""Batches: padding never decides what is trained, and packed rows never see each other."""

from __future__ import annotations

import random
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from finetune.data.collate import Collator, PackedCollator, isolation_gap, mask_kind
from finetune.data.pack import density, join, pack, packed


@given(
    st.integers(1, 64).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room)))), st.integers(0, 3)
)
def test_every_row_stands_in_one_bin_and_no_bin_overflows(case: tuple[int, list[int]], seed: int) -> None:
    room, lengths = case
    bins = pack(lengths, room, seed)
    assert sorted(index for content in bins for index in content) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in content) <= room for content in bins)
    assert bins == pack(lengths, room, seed)
    # Two bins that fit into one would mean that the second was opened for nothing.
    loads = sorted(sum(lengths[index] for index in content) for content in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > room


def test_twenty_thousand_rows_fill_their_bins() -> None:
    draw = random.Random(1)
    lengths = [max(1, min(2048, round(draw.lognormvariate(5.5, 0.8)))) for _ in range(20_000)]
    bins = pack(lengths, 2048)
    assert density(lengths, bins, 2048) >= 0.999


def test_row_goes_where_it_leaves_least_room() -> None:
    assert sorted(map(sorted, pack([7, 5, 3], 10))) == [[0, 2], [1]]


def test_seed_orders_the_bins_and_nothing_else() -> None:
    lengths = [random.Random(2).randint(1, 50) for _ in range(200)]
    one, other = pack(lengths, 100, seed=1), pack(lengths, 100, seed=2)
    assert one != other
    assert sorted(map(sorted, one)) == sorted(map(sorted, other))


@pytest.mark.parametrize("length", [0, 11])
def test_row_that_fits_no_bin_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"row 1 has {length} tokens; a bin holds 1 to 10"):
        pack([3, length], 10)


def token_rows(*lengths: int, vocabulary: int = 100) -> list[dict[str, Any]]:
    draw = random.Random(3)
    found = []
    for length in lengths:
        ids = [draw.randrange(vocabulary) for _ in range(length)]
        found.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return found


def test_padding_is_neither_attended_nor_trained_whatever_the_pad_token_is() -> None:
    rows = token_rows(3, 5)
    end = rows[0]["labels"][-1]
    batch = Collator(pad_token_id=end)(rows)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (torch.Size([2, 5]), torch.int64)
    )
    assert batch["input_ids"].tolist() == [rows[0]["input_ids"] + [end, end], rows[1]["input_ids"]]
    assert batch["labels"].tolist() == [rows[0]["labels"] + [-100, -100], rows[1]["labels"]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]


def test_padding_rounds_up_to_a_multiple() -> None:
    assert Collator(0, pad_to_multiple_of=8)(token_rows(3, 9))["input_ids"].shape == (2, 16)
    assert Collator(0, pad_to_multiple_of=8)(token_rows(8))["input_ids"].shape == (1, 8)
    assert PackedCollator(0, pad_to_multiple_of=8)([join(token_rows(3, 4))])["attention_mask"].shape == (1, 1, 8, 8)


def test_packed_batch_restarts_positions_and_hides_other_rows() -> None:
    rows = token_rows(2, 3)
    batch = PackedCollator(pad_token_id=7)([join(rows), join(token_rows(6))])
    assert batch["position_ids"][0].tolist() == [0, 1, 0, 1, 2, 0]
    assert batch["input_ids"][0].tolist() == rows[0]["input_ids"] + rows[1]["input_ids"] + [7]
    assert batch["labels"][0].tolist() == [-100, rows[0]["labels"][1], -100, *rows[1]["labels"][1:], -100]
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    additive = PackedCollator(7, mask="additive", dtype=torch.bfloat16)([join(rows)])["attention_mask"]
    assert additive.dtype == torch.bfloat16
    assert ((additive == 0) == batch["attention_mask"][:1, :, :5, :5]).all()
    assert "attention_mask" not in PackedCollator(7, mask="none")([join(rows)])


def test_first_token_of_a_row_is_never_trained_even_if_it_had_a_label() -> None:
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}]
    assert join(rows)["labels"] == [-100, 2, -100, 4]


def test_packed_data_set_holds_every_row_and_where_it_came_from() -> None:
    lengths = [random.Random(5).randint(2, 30) for _ in range(50)]
    rows = [{**row, "source": f"s{at % 3}", "row": at, "turn": -1} for at, row in enumerate(token_rows(*lengths))]
    whole = packed(datasets.Dataset.from_list(rows), max_length=64)
    assert sorted(index for value in whole for index in value["row"]) == list(range(50))
    assert len(whole) < 50
    for value in whole:
        assert len(value["input_ids"]) == len(value["labels"]) == sum(value["seq_lengths"]) <= 64
        assert value["seq_lengths"] == [lengths[index] for index in value["row"]]
        assert value["source"] == [f"s{index % 3}" for index in value["row"]]


SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,  # large weights, so that rows which do see each other differ by far
}


def tiny(kind: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=attention))
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, attn_implementation=attention))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_packed_rows_are_answered_as_if_alone(kind: str, attention: str) -> None:
    model = tiny(kind, attention)
    model.train()
    rows = token_rows(5, 9, 1, 14)
    collator = PackedCollator(pad_token_id=0, mask=mask_kind(attention), pad_to_multiple_of=8)
    assert isolation_gap(model, collator, rows) < 1e-5
    assert model.training


def test_isolation_gap_finds_rows_that_see_each_other() -> None:
    class Leaky(PackedCollator):
        """The usual mistake: a mask of ones over the packed sequence."""

        def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
            batch = super().__call__(rows)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            return batch

    assert isolation_gap(tiny("qwen3", "sdpa"), Leaky(pad_token_id=0), token_rows(5, 9)) > 1e-2


def test_packed_loss_is_the_loss_of_the_rows_alone() -> None:
    model = tiny("llama", "sdpa").eval()
    rows = token_rows(5, 9, 14)
    rows[0]["labels"] = list(rows[0]["input_ids"])

    def summed(batch: dict[str, torch.Tensor]) -> float:
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).item()

    with torch.no_grad():
        together = summed(PackedCollator(0)([join(rows)]))
        apart = summed(Collator(0)(rows))
    assert together == pytest.approx(apart, rel=1e-5)
