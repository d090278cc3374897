"""The order of rows and how processes share them: from the seed alone, complete, and balanced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.order import Schedule, share, share_alike
from finetune.data.pack import best_fit, singles, wrapped

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))  # ranks, accumulation, most


class Rows:
    """Rows whose ids name them."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, at: int) -> dict[str, Any]:
        ids = np.arange(self.lengths[at], dtype=np.int32) + 100 * at
        return {"input_ids": ids, "labels": ids, "source": "s", "row": at}


def schedule(lengths: list[int], alike: bool = False, seed: int = 1) -> Schedule:
    return Schedule(Rows(lengths), singles(np.array(lengths)), seed, 100.0, alike)


@given(LENGTHS, SHAPES, st.booleans(), st.integers(0, 2))
def test_ranks_share_each_step_of_one_order(
    lengths: list[int], shape: tuple[int, int, int], alike: bool, epoch: int
) -> None:
    ranks, accumulation, most = shape
    batch = ranks * accumulation * most
    whole = schedule(lengths, alike)
    shares = [list(whole.micro_batches(epoch, rank, ranks, accumulation, most)) for rank in range(ranks)]
    assert {len(own) for own in shares} == {whole.steps(batch) * accumulation}
    assert all(len(units) <= most for own in shares for units in own)
    order = whole.epoch(epoch, batch)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    for step in range(whole.steps(batch)):
        mine = slice(step * accumulation, (step + 1) * accumulation)
        taken = [unit for own in shares for units in own[mine] for unit in units]
        assert sorted(taken) == sorted(order[step * batch : (step + 1) * batch].tolist())


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    lengths = list(range(1, 101))
    one = schedule(lengths)
    assert one.epoch(0, 8).tolist() == one.epoch(0, 16).tolist() == schedule(lengths[::-1]).epoch(0, 8).tolist()
    assert one.epoch(0, 8).tolist() != one.epoch(1, 8).tolist()
    assert one.epoch(0, 8).tolist() != schedule(lengths, seed=2).epoch(0, 8).tolist()


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=64), SHAPES)
def test_shares_are_complete_and_no_rank_has_more_than_its_part_and_one_unit(
    costs: list[int], shape: tuple[int, int, int]
) -> None:
    ranks, accumulation, most = shape
    if len(costs) > ranks * accumulation * most:
        with pytest.raises(ValueError, match=f"a step of {len(costs)} units"):
            share(costs, *shape)
        return
    shares = share(costs, *shape)
    assert [len(own) for own in shares] == [accumulation] * ranks
    assert sorted(at for own in shares for units in own for at in units) == list(range(len(costs)))
    assert max(len(units) for own in shares for units in own) <= most
    again = share(costs, *shape)
    assert again == shares


def test_ranks_have_about_the_same_to_do() -> None:
    draw = np.random.default_rng(3)
    lengths = np.minimum(np.exp(draw.normal(5.5, 0.8, 4096)), 2048).astype(np.int64)
    dealt, shared = [], []
    for step in schedule(lengths.tolist()).epoch(0, 64).reshape(-1, 64):
        cost = lengths[step] * 2048.0 + lengths[step] ** 2
        least = max(cost.sum() / 8, cost.max())  # what no sharing out can better
        shared.append(
            max(sum(cost[at] for units in own for at in units) for own in share(cost.tolist(), 8, 2, 4)) / least
        )
        dealt.append(cost.reshape(8, 8).sum(1).max() / least)  # as rows come
    assert np.mean(shared) < 1.08
    assert np.mean(dealt) > 1.4


@given(LENGTHS, SHAPES)
def test_micro_batches_that_are_padded_are_of_like_length(lengths: list[int], shape: tuple[int, int, int]) -> None:
    ranks, accumulation, _ = shape
    shares = share_alike(lengths, ranks, accumulation)
    assert [len(own) for own in shares] == [accumulation] * ranks
    batches = sorted(
        ([lengths[at] for at in units] for own in shares for units in own if units), key=lambda b: (-max(b), -min(b))
    )
    flat = [length for batch in batches for length in batch]
    assert flat == sorted(lengths, reverse=True)
    sizes = [len(units) for own in shares for units in own]
    assert max(sizes) - min(sizes) <= 1


def test_rows_of_like_length_share_steps_where_batches_are_padded() -> None:
    draw = np.random.default_rng(5)
    lengths = np.minimum(np.exp(draw.normal(5.2, 0.9, 2050)), 1024).astype(np.int64)
    wasted = []
    for alike in (False, True):
        order = schedule(lengths.tolist(), alike).epoch(0, 8)
        steps = lengths[order[:2048]].reshape(-1, 8)
        wasted.append(1 - steps.sum() / (steps.max(1) * 8).sum())
        assert sorted(order.tolist()) == list(range(2050))
    assert wasted[0] > 0.4
    assert wasted[1] < 0.1


def test_a_piece_of_a_row_begins_with_an_untrained_token() -> None:
    units = wrapped(np.array([7]), 4, seed=0)
    pieces = Schedule(Rows([7]), units, 0, 1.0).documents([0, 1])
    assert [piece["input_ids"].tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6]]
    assert [piece["labels"].tolist() for piece in pieces] == [[-100, 1, 2, 3], [-100, 5, 6]]
    assert [piece["row"] for piece in pieces] == [0, 0]


def test_packed_units_come_with_all_their_documents() -> None:
    lengths = [5, 3, 2, 6]
    packed = Schedule(Rows(lengths), best_fit(np.array(lengths), 8), 0, 1.0)
    found = [[document["row"] for document in packed.documents([unit])] for unit in range(len(packed))]
    assert sorted(map(sorted, found)) == [[0, 1], [2, 3]]
    assert packed.documents([]) == []
