"""Rows made while they are trained: the prepared ones, in an order that neither ranks nor interruptions change."""

from __future__ import annotations

import json
import os
import signal
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import Lab, chats, lab_in, write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from warm import Warm

from finetune.data import inflow, stream
from finetune.data.cache import Cache
from finetune.data.engine import Settings
from finetune.data.examples import examples
from finetune.data.feed import feed
from finetune.data.inflow import Inflow
from finetune.data.order import Document
from finetune.data.stream import Length, StreamFeed, StreamSchedule, stream_feed
from finetune.data.tokenizer import Vocabulary
from finetune.errors import DataError
from finetune.files import manifest_faults
from finetune.recipe.load import load_recipe
from finetune.recipe.problems import RecipeProblems
from finetune.recipe.sections import AuditOptions, DataOptions, Source

TOKENIZERS = Path(__file__).parent / "tokenizers"
Shape = tuple[int, int, int]  # ranks, accumulation, most


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TOKENIZERS / "chatml")


def of(tokenizer: PreTrainedTokenizerBase, *sources: Any, **options: Any) -> Settings:
    chosen = DataOptions.model_validate({"train": list(sources), "max_length": 256, "streaming": True, **options})
    return Settings(Vocabulary.of(tokenizer), frozenset({tokenizer.eos_token_id}), chosen)


def schedule(settings: Settings, steps: int, batch: int, seed: int = 1, **more: Any) -> StreamSchedule:
    return StreamSchedule(Inflow(settings, **more), Length(steps, batch), seed, 100.0, False, Path("quarantine.jsonl"))


def trained(made: StreamSchedule, rank: int, shape: Shape) -> Iterator[list[Document]]:
    """The documents of each micro-batch of a rank."""
    return (made.documents(units) for units in made.micro_batches(0, rank, *shape))


def names(documents: list[Document]) -> list[tuple[str, int, int, int]]:
    return sorted((row["source"], row["row"], int(row["input_ids"][0]), len(row["input_ids"])) for row in documents)


def steps_of(settings: Settings, count: int, shape: Shape, **how: Any) -> list[list[Any]]:
    """What each step holds, all ranks together."""
    ranks, accumulation, most = shape
    batch = ranks * accumulation * most
    shares = [list(trained(schedule(settings, count, batch, **how), rank, shape)) for rank in range(ranks)]
    assert [len(own) for own in shares] == [count * accumulation] * ranks
    mine = [slice(step * accumulation, (step + 1) * accumulation) for step in range(count)]
    return [names([row for own in shares for part in own[at] for row in part]) for at in mine]


PACKINGS = ({}, {"packing": True}, {"packing": True, "packing_strategy": "wrapped"})


@pytest.mark.parametrize("packing", PACKINGS, ids=["single", "bfd", "wrapped"])
def test_a_step_holds_the_same_rows_on_any_number_of_ranks(
    tokenizer: PreTrainedTokenizerBase, packing: dict[str, Any]
) -> None:
    write_rows(Path("a.jsonl"), chats(90))
    write_rows(Path("b.jsonl"), chats(7, seed=3))
    found = of(tokenizer, "a.jsonl", {"path": "b.jsonl", "weight": 0.5}, **packing)
    one = steps_of(found, 12, (1, 2, 4))
    assert one == steps_of(found, 12, (2, 1, 4)) == steps_of(found, 12, (4, 2, 1))
    assert one != steps_of(found, 12, (1, 2, 4), seed=2)
    assert {name for step in one for name, *_ in step} == {"a.jsonl", "b.jsonl"}
    assert all(len(step) == 8 for step in one) or packing


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 60), batch=st.integers(1, 9))
def test_a_pass_gives_each_prepared_row_once(tokenizer: PreTrainedTokenizerBase, count: int, batch: int) -> None:
    write_rows(Path("a.jsonl"), chats(count))
    found = of(tokenizer, "a.jsonl")
    prepared = feed(found, AuditOptions(), Cache("cache"), 1).train.rows
    whole = [(row["row"], row["input_ids"].tolist(), row["labels"].tolist()) for row in prepared]
    steps = 3 * count // batch or 1
    seen = [row for part in trained(schedule(found, steps, batch), 0, (1, 1, batch)) for row in part]
    got = [(row["row"], row["input_ids"].tolist(), row["labels"].tolist()) for row in seen]
    assert all(row in whole for row in got)
    once = got[: count // batch * batch]
    assert len({row for row, _, _ in once}) == len(once)
    if count % batch == 0:
        assert sorted(got[:count]) == sorted(whole)
        assert len(got) == 3 * count
        assert Counter(row for row, _, _ in got) == Counter({row: 3 for row, _, _ in whole})
    if count >= 20 and batch <= 4:
        order = [row for row, _, _ in got]
        assert order[:count] != order[count : 2 * count]  # another order in the next pass


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing_loses_no_token_and_repeats_none(tokenizer: PreTrainedTokenizerBase, strategy: str) -> None:
    write_rows(Path("a.jsonl"), chats(400))
    found = of(tokenizer, "a.jsonl", packing=True, packing_strategy=strategy)
    whole = {row["row"]: row["input_ids"].tolist() for row in feed(found, AuditOptions(), Cache("cache"), 1).train.rows}
    batch = 3
    made = schedule(found, 1000, batch)
    pieces: dict[int, list[list[int]]] = {}
    full = []
    for documents in trained(made, 0, (1, batch, 1)):
        if made._inflow.flows[0].passes:  # the next pass has begun: its rows are in the window
            break
        full.append(sum(len(document["input_ids"]) for document in documents))
        for document in documents:
            pieces.setdefault(document["row"], []).append(document["input_ids"].tolist())
            assert document["labels"][0] == -100
    assert max(full) <= 256
    if strategy == "wrapped":
        assert set(full) == {256}
        given = Counter(token for row in pieces.values() for piece in row for token in piece)
        assert not given - Counter(token for row in whole.values() for token in row)
    else:
        assert all(found == [whole[row]] for row, found in pieces.items())
    assert len(pieces) > 100


def test_the_first_step_needs_only_the_beginning_of_a_file(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(Path("a.jsonl"), ({"text": f"row {number}. " + "word " * 40} for number in range(100_000)))
    read = Counter[str]()
    own = examples

    def counting(source: Source, streaming: bool = False) -> Iterator[Any]:
        for item in own(source, streaming):
            read["rows"] += 1
            yield item

    monkeypatch.setattr(inflow, "examples", counting)
    made = trained(schedule(of(tokenizer, "a.jsonl"), 10, 8), 0, (1, 1, 8))
    before = _bytes_read()
    assert len(next(made)) == 8
    assert read["rows"] == 8
    assert _bytes_read() - before < Path("a.jsonl").stat().st_size / 2  # a piece, twice: to find its end, and its rows


def _bytes_read() -> int:
    """Bytes that this process has read so far."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def test_memory_does_not_grow_with_the_rows(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WINDOW", 64)
    monkeypatch.setattr(inflow, "CHUNK", 32)
    monkeypatch.setattr("finetune.data.read.PIECE", 2**15)
    monkeypatch.setattr("finetune.data.opened.HEAD", 2**15)

    def peak(count: int) -> int:
        write_rows(Path("a.jsonl"), ({"text": f"row {number}. " + "word " * 30} for number in range(count)))
        found = of(tokenizer, "a.jsonl")
        found = replace(found, vocabulary=found.vocabulary.without_fast())  # loaded once, after so many rows
        made = schedule(found, count // 8, 8)
        seen = 0
        tracemalloc.start()
        try:
            for documents in trained(made, 0, (1, 1, 8)):
                seen += len(documents)
            assert seen == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(800)  # what is only made once
    small, large = peak(800), peak(4000)
    assert large - small < Path("a.jsonl").stat().st_size / 10


def test_sources_come_in_proportion_to_their_weights(tokenizer: PreTrainedTokenizerBase) -> None:
    write_rows(Path("a.jsonl"), ({"text": f"{number} short"} for number in range(50)))
    write_rows(Path("b.jsonl"), ({"text": f"{number} " + "long " * 20} for number in range(500)))
    sources = [{"path": "a.jsonl", "name": "small", "weight": 1}, {"path": "b.jsonl", "weight": 3}]
    for by in ("rows", "epochs", "tokens"):
        seen = Counter[str]()
        for documents in trained(schedule(of(tokenizer, *sources, weight_by=by), 40, 10), 0, (1, 1, 10)):
            for row in documents:
                seen[row["source"]] += len(row["input_ids"]) if by == "tokens" else 1
        assert seen["b.jsonl"] / seen["small"] == pytest.approx(3, rel=0.1)


def test_a_source_of_several_files_counts_its_rows_on(tokenizer: PreTrainedTokenizerBase) -> None:
    Path("parts").mkdir()
    write_rows(Path("parts/1.jsonl"), [{"text": f"row {number}"} for number in range(5)]).open("a").write("\n\n")
    write_rows(Path("parts/2.json"), [{"text": f"row {number}"} for number in range(7, 10)])
    write_rows(Path("parts/3.jsonl"), [{"text": f"row {number}"} for number in range(10, 12)])
    seen = [row for part in trained(schedule(of(tokenizer, "parts"), 5, 2), 0, (1, 1, 2)) for row in part]
    told = [(row["row"], tokenizer.decode(row["input_ids"][:-1])) for row in seen]
    assert sorted(told) == [(number, f"row {number}") for number in (*range(5), *range(7, 12))]


def test_rows_of_validation_are_not_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = chats(40)
    write_rows(Path("a.jsonl"), rows)
    write_rows(Path("held.jsonl"), rows[10:20])
    for on_leak, times in (("error", 0), ("drop", 0), ("warn", 1)):
        found = of(tokenizer, "a.jsonl", validation=["held.jsonl"], on_leak=on_leak)
        made = fed(found, 30)
        train, validation = made.schedules(100.0, alike=False)
        assert validation is not None
        assert len(validation) == 10
        seen = Counter(row["row"] for part in trained(train, 0, (1, 1, 1)) for row in part)
        assert {seen[row] for row in range(10, 20)} <= {times, 0}
        if not times:
            assert sorted(seen) == [*range(10), *range(20, 40)]
        told = "trained all the same" if times else "left out of training"
        assert f"a.jsonl: 10 rows that validation holds too were {told}" in made.closing()


def fed(found: Settings, steps: int, batch: int = 1) -> StreamFeed:
    return stream_feed(found, AuditOptions(), Cache("cache"), 1, Length(steps, batch), Path("quarantine.jsonl"))


def test_bad_rows_stop_the_stream_or_are_set_aside_once(tokenizer: PreTrainedTokenizerBase) -> None:
    bad = [{"messages": []}, {"messages": [{"role": "user", "content": "never answered"}]}]
    write_rows(Path("a.jsonl"), [*chats(300), *bad, *chats(20, seed=1)])
    stops = fed(of(tokenizer, "a.jsonl"), 400).schedules(1.0, alike=False)[0]
    before: list[list[Document]] = []
    with pytest.raises(DataError, match=r"a\.jsonl:301"):
        before.extend(trained(stops, 0, (1, 1, 1)))
    assert 0 < len(before) <= 300
    made = fed(of(tokenizer, "a.jsonl", on_bad_row="quarantine"), 700)
    for rank in (1, 0):
        share = trained(StreamSchedule(made.inflow, Length(350, 2), 1, 1.0, False, made.bad), rank, (2, 1, 1))
        assert sum(map(len, share)) == 350
        assert made.bad.exists() == (rank == 0)
    entries = [json.loads(line) for line in made.bad.read_text().splitlines()]
    assert [entry["index"] for entry in entries] == [300, 301]
    assert any("2 rows that cannot be used are in quarantine.jsonl" in line for line in made.closing())
    assert "a.jsonl: read to its end 3 times" in made.closing()


def test_long_rows_stop_the_stream_when_they_are_met(tokenizer: PreTrainedTokenizerBase) -> None:
    write_rows(Path("a.jsonl"), [*({"text": "short"} for _ in range(400)), {"text": "long " * 400}])
    made = fed(of(tokenizer, "a.jsonl"), 401).schedules(1.0, alike=False)[0]
    with pytest.raises(DataError, match=r"longer than data.max_length \(256 tokens\).*\(a.jsonl:401\)"):
        list(trained(made, 0, (1, 1, 1)))
    for treated, line in (("truncate", "1 row over max_length 256"), ("drop", "1 row left out")):
        found = fed(of(tokenizer, "a.jsonl", on_long_row=treated), 401)
        list(trained(found.schedules(1.0, alike=False)[0], 0, (1, 1, 1)))
        assert any(line in told for told in found.closing())


def test_a_source_of_which_nothing_can_be_trained_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    write_rows(Path("a.jsonl"), chats(3))
    write_rows(Path("held.jsonl"), chats(3))
    with pytest.raises(DataError, match=r"a\.jsonl: no row is left to train on"):
        list(
            trained(fed(of(tokenizer, "a.jsonl", validation=["held.jsonl"]), 3).schedules(1.0, False)[0], 0, (1, 1, 1))
        )
    Path("b.jsonl").write_text("")
    with pytest.raises(DataError, match=r"b.jsonl: found no rows"):
        fed(of(tokenizer, "b.jsonl"), 3)


def test_a_renamed_column_is_looked_for_in_the_beginning(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.data.examples.STREAMED_SAMPLE", 200)
    write_rows(Path("a.jsonl"), ({"text": "x"} for _ in range(1000)))
    with pytest.raises(DataError, match=r"no column 'txt' in the first 300 rows.*did you mean 'text'"):
        fed(of(tokenizer, {"path": "a.jsonl", "columns": {"text": "txt"}}), 3)


def test_a_stream_says_what_its_figures_are_of(tokenizer: PreTrainedTokenizerBase) -> None:
    write_rows(Path("a.jsonl"), chats(600))
    write_rows(Path("b.jsonl"), chats(10, seed=2))
    made = fed(of(tokenizer, "a.jsonl", "b.jsonl"), 3, 8)
    first, weights, counted, *_ = made.lines()
    assert first == "streaming: rows are made while they are trained; figures are those of the first 256 of each source"
    assert weights.startswith("streaming: weights are shares of the rows")
    assert counted.startswith("266 rows read, 266 kept")
    assert made.train.facts()["streaming"] is True
    assert made.longest == 256
    assert len(made.probe()) == 8
    before = made.train.fingerprint
    with open("a.jsonl", "a") as file:
        file.write(json.dumps(chats(1, seed=9)[0]) + "\n")
    assert fed(of(tokenizer, "a.jsonl", "b.jsonl"), 3, 8).train.fingerprint != before


def test_rows_beyond_the_head_that_change_are_told_and_files_that_move_are_not(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = chats(300)
    write_rows(Path("a.jsonl"), rows)
    before = fed(of(tokenizer, "a.jsonl"), 3, 8).train
    fingerprint, states = before.fingerprint, before.states()
    Path("a.jsonl").rename("b.jsonl")
    moved = fed(of(tokenizer, "b.jsonl"), 3, 8).train
    assert (moved.fingerprint, moved.states()) == (fingerprint, states)
    write_rows(Path("b.jsonl"), [*rows[:280], *reversed(rows[280:])])
    os.utime("b.jsonl", (time.time() + 60,) * 2)  # as a change a minute later has it
    changed = fed(of(tokenizer, "b.jsonl"), 3, 8).train
    assert changed.fingerprint == fingerprint  # as many bytes, and the same head
    assert changed.states() != states
    assert list(changed.states()) == ["data.train[0].state"]


# -- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "validation_split", 0.1),
        ("data", "deduplicate", "exact"),
        ("data", "stopping_strategy", "all_exhausted"),
        ("audit", "max_duplicate_share", 0.5),
        ("training", "extra", {"dataloader_num_workers": 2}),
        ("training", "max_steps", None),
    ],
)
def test_what_needs_all_rows_is_refused_by_key(section: str, key: str, value: Any) -> None:
    recipe: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": "base"},
        "data": {"train": "a.jsonl", "streaming": True},
        "training": {"max_steps": 3},
        "audit": {},
    }
    text = {**recipe, "output_dir": "run"}
    Path("r.json").write_text(json.dumps(text))
    load_recipe("r.json")
    recipe[section][key] = value
    Path("r.json").write_text(json.dumps(text))
    name = "training.extra.dataloader_num_workers" if key == "extra" else f"{section}.{key}"
    with pytest.raises(RecipeProblems, match=rf"{name}: .*data\.streaming"):
        load_recipe("r.json")


# -- whole runs ----------------------------------------------------------------------------------------------------

CHANGES = {
    "adapter.lora_dropout": 0.1,
    "data.train": ["train.jsonl", {"path": "more.jsonl", "weight": 0.5}],
    "data.streaming": True,
    "data.packing": True,
    "data.on_bad_row": "quarantine",
    "data.validation": "held.jsonl",
    "training.max_steps": 60,
    "training.eval_steps": 30,
    "training.save_steps": 20,
}


def streaming_lab(folder: Path, bases: Path, warm: Warm) -> Lab:
    lab = lab_in(folder, bases, warm)
    rows = chats(150, seed=5)
    write_rows(folder / "train.jsonl", [*rows[:40], {"messages": []}, *rows[40:]])
    write_rows(folder / "more.jsonl", chats(30, seed=6))
    return lab


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, bases: Path, warm: Warm) -> Lab:
    lab = streaming_lab(tmp_path_factory.mktemp("undisturbed"), bases, warm)
    outcome = lab.train(CHANGES).ok()
    assert "streaming: rows are made while they are trained" in outcome.stderr
    assert "1 row that cannot be used is in quarantine.jsonl" in outcome.stderr
    return lab


def test_a_streamed_run_says_in_its_folder_what_was_trained(undisturbed: Lab) -> None:
    facts = json.loads((undisturbed / "run/run.json").read_text())["data"]["train"]
    assert facts["streaming"] is True
    bad = [json.loads(line) for line in (undisturbed / "run/quarantine.jsonl").read_text().splitlines()]
    assert [entry["place"] for entry in bad] == ["train.jsonl:41"]
    assert "| rows | 0 |" not in (undisturbed / "run/adapter/README.md").read_text()
    assert undisturbed.losses()[-1] < undisturbed.losses()[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_streamed_run_goes_on_to_the_very_bits(
    tmp_path: Path, bases: Path, warm: Warm, undisturbed: Lab, number: signal.Signals
) -> None:
    lab = streaming_lab(tmp_path, bases, warm)
    child = warm.start("train", lab.recipe(CHANGES), cwd=lab.folder)
    metrics, deadline = lab / "run/metrics.jsonl", time.monotonic() + 60
    while not metrics.is_file() or '"step": 25,' not in metrics.read_text():
        assert time.monotonic() < deadline, child.output
        time.sleep(0.005)
    child.send_signal(number)
    child.wait(30)
    assert all(manifest_faults(path) == [] for path in (lab / "run/checkpoints").iterdir())
    again = lab.train(CHANGES).ok()
    assert "resume   from run/checkpoints/checkpoint-" in again.stderr
    assert lab.losses() == undisturbed.losses()
    assert lab.adapter() == undisturbed.adapter()
    assert (lab / "run/quarantine.jsonl").read_bytes() == (undisturbed / "run/quarantine.jsonl").read_bytes()
    ours, theirs = ((one / "run/adapter/README.md").read_text().splitlines() for one in (lab, undisturbed))
    counts = [line for line in theirs if line.startswith(("| rows |", "| trained tokens |"))]
    assert len(counts) == 2
    assert all(line in ours for line in counts)


def test_a_row_that_is_met_late_ends_a_streamed_run_with_its_place(lab: Lab) -> None:
    write_rows(lab / "train.jsonl", [*chats(300), {"messages": []}])
    outcome = lab.train({"data.streaming": True, "training.max_steps": 100})
    assert outcome.returncode == 3
    assert "train.jsonl:301" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    ended = lab.ended()
    assert ended["exit_code"] == 3
    assert "train.jsonl:301" in ended["reason"]
    assert 0 < ended["step"] < 100
    write_rows(lab / "train.jsonl", [*chats(299), {"messages": []}, *chats(300)[299:]])
    os.utime(lab / "train.jsonl", (time.time() + 60,) * 2)
    again = lab.train({"data.streaming": True, "training.max_steps": 100})
    assert again.returncode == 5
    assert "data.train[0].state: " in again.stderr
    assert "data.rows: " not in again.stderr


def test_two_processes_train_a_streamed_run_as_one_does(tmp_path: Path, bases: Path, warm: Warm) -> None:
    changes = {**CHANGES, "adapter.lora_dropout": 0.0, "training.max_steps": 12, "training.save_steps": None}
    changes |= {"training.eval_steps": None, "data.validation": None}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (streaming_lab(tmp_path / name, bases, warm) for name in ("one", "two"))
    one.train(changes).ok()
    outcomes = warm.ranks(2, two.recipe({**changes, "launch.num_processes": 2}), cwd=two.folder)
    assert [outcome.ok().returncode for outcome in outcomes] == [0, 0]
    assert two.losses() == pytest.approx(one.losses(), rel=1e-4)
    assert len((two / "run/quarantine.jsonl").read_text().splitlines()) == 1
    write_rows(two / "train.jsonl", [*chats(300), {"messages": []}])
    late = {**changes, "data.on_bad_row": "error", "training.max_steps": 200, "output_dir": "late"}
    outcomes = warm.ranks(2, two.recipe({**late, "launch.num_processes": 2}), cwd=two.folder)
    assert {outcome.returncode for outcome in outcomes} == {3}
    assert "train.jsonl:301" in two.ended("late")["reason"]
