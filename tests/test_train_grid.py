"""One run, however it is cut up: micro-batches, accumulation, packing and processes change neither losses nor weights.

Each run of a grid trains the same rows in the same steps, the short last step of each epoch included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import Lab, chats, lab_in, write_rows
from warm import Warm

# 10 rows in steps of 4, 4 and 2, for two epochs: rows of unequal length, so that a mean over batches would show.
SHORT = {
    "data.train": "ten.jsonl",
    "data.validation": "held.jsonl",
    "training.global_batch_size": 4,
    "training.max_steps": None,
    "training.num_train_epochs": 2,
    "training.eval_steps": 3,
    "training.learning_rate": 1e-3,
}
# All rows in every step, so that packed and unpacked runs train alike.
WHOLE = {**SHORT, "training.global_batch_size": 16, "training.num_train_epochs": 4, "training.eval_steps": 4}
PACKED = {"data.packing": True, "data.max_length": 512}


def run(lab: Lab, name: str, ranks: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Train; the figures of the run and its weights."""
    from safetensors.torch import load_file

    recipe = lab.recipe({**changes, "output_dir": name}, f"{name}.yaml")
    if ranks == 1:
        lab.warm.run("train", recipe, cwd=lab.folder).ok()
    else:
        for outcome in lab.warm.ranks(ranks, recipe, cwd=lab.folder):
            outcome.ok()
    lines = lab.metrics(name)
    return {
        "losses": lab.losses(name),
        "validation": [line["eval_loss"] for line in lines if "eval_loss" in line],
        "trained_tokens": [line["trained_tokens"] for line in lines if "loss" in line],
        "grad_norm": [line["grad_norm"] for line in lines if "loss" in line],
        "weights": load_file(lab / name / "adapter/adapter_model.safetensors"),
    }


def agree(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses to 1e-6 of their size, and weights to 1e-6 of the largest of their matrix."""
    assert found["trained_tokens"] == expected["trained_tokens"]
    for figure, exact in (("losses", 1e-6), ("validation", 1e-6), ("grad_norm", 1e-5)):
        assert found[figure] == pytest.approx(expected[figure], rel=exact), figure
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert float((found["weights"][name] - weight).abs().max()) <= 1e-6 * max(1.0, float(weight.abs().max())), name


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, bases: Path, warm: Warm) -> Lab:
    lab = lab_in(tmp_path_factory.mktemp("grid"), bases, warm)
    write_rows(lab / "ten.jsonl", chats(10))
    return lab


@pytest.fixture(scope="module")
def short(place: Lab) -> dict[str, Any]:
    """One process, one micro-batch a step."""
    return run(place, "short", 1, {**SHORT, "training.per_device_train_batch_size": 4})


@pytest.fixture(scope="module")
def whole(place: Lab) -> dict[str, Any]:
    """One process, one micro-batch a step."""
    return run(place, "whole", 1, {**WHOLE, "training.per_device_train_batch_size": 16})


def test_the_reference_has_a_short_last_step_and_moves(short: dict[str, Any], whole: dict[str, Any]) -> None:
    assert len(short["losses"]) == 6
    assert short["trained_tokens"][2] < 0.75 * min(short["trained_tokens"][:2])
    assert len(short["validation"]) == 2
    assert len(whole["losses"]) == 4
    assert whole["trained_tokens"][0] == sum(short["trained_tokens"][:3])
    assert whole["losses"][-1] < whole["losses"][0]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (1, 1), (2, 2), (2, 1)])
def test_micro_batches_and_ranks_change_nothing(place: Lab, short: dict[str, Any], ranks: int, micro: int) -> None:
    changes = {**SHORT, "training.per_device_train_batch_size": micro}
    agree(run(place, f"short-{ranks}-{micro}", ranks, changes), short)


@pytest.mark.parametrize(("ranks", "bins", "micro"), [(1, 4, 4), (1, 4, 1), (2, 4, 2), (2, 4, 1)])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packing_changes_nothing(
    place: Lab, whole: dict[str, Any], ranks: int, bins: int, micro: int, attention: str
) -> None:
    """The ten rows fill fewer than `bins` sequences, so some micro-batches and ranks of every step have nothing."""
    changes = {
        **WHOLE,
        **PACKED,
        "model.attn_implementation": attention,
        "training.global_batch_size": bins,
        "training.per_device_train_batch_size": micro,
    }
    agree(run(place, f"packed-{ranks}-{micro}-{attention}", ranks, changes), whole)


def test_a_rank_and_micro_batches_without_rows_take_their_turn(place: Lab, short: dict[str, Any]) -> None:
    """Steps of 8: the last one of an epoch has two rows for eight places on two ranks."""
    changes = {**SHORT, "training.global_batch_size": 8}
    one = run(place, "one", 1, {**changes, "training.per_device_train_batch_size": 8})
    assert len(one["losses"]) == 4
    agree(run(place, "two", 2, {**changes, "training.per_device_train_batch_size": 1}), one)


def test_every_weight_of_the_base_trains_alike_too(place: Lab) -> None:
    changes = {**SHORT, "adapter": {"method": "none"}, "training.learning_rate": 1e-4}
    for name, ranks, micro in (("full-1", 1, 4), ("full-2", 2, 1)):
        recipe = place.recipe(
            {**changes, "training.per_device_train_batch_size": micro, "output_dir": name}, f"{name}.yaml"
        )
        outcomes = place.warm.ranks(ranks, recipe, cwd=place.folder)
        assert [outcome.returncode for outcome in outcomes] == [0] * ranks, outcomes
    assert place.losses("full-2") == pytest.approx(place.losses("full-1"), rel=1e-6)


def test_the_wrapped_stream_trains_every_token_of_text(place: Lab) -> None:
    rows = [{"text": f"row {n} of the manual says that the server is slow. " * (n + 1)} for n in range(9)]
    write_rows(place / "text.jsonl", rows)
    changes = {
        "data.train": "text.jsonl",
        "data.packing": True,
        "data.packing_strategy": "wrapped",
        "data.max_length": 256,
        "training.max_steps": None,
        "training.num_train_epochs": 1,
    }
    trained = sum(run(place, "wrapped", 1, changes)["trained_tokens"])
    counted = json.loads((place / "wrapped/run.json").read_text())["data"]["train"]
    bins = -(-counted["tokens"] // 256)
    assert bins >= 3
    # A cut leaves one token with nothing before it.
    assert counted["trained_tokens"] - (bins - 1) <= trained < counted["trained_tokens"]


def test_a_model_whose_state_runs_on_is_padded_and_says_so(place: Lab) -> None:
    import torch
    import zoo
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    vocabulary = len(AutoTokenizer.from_pretrained(zoo.TOKENIZER))
    config = AutoConfig.for_model(
        "mamba", vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, initializer_range=0.5,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "mamba")
    for file in zoo.TOKENIZER.iterdir():
        (place / "mamba" / file.name).write_bytes(file.read_bytes())
    changes = {**SHORT, "model.name_or_path": "mamba", "adapter.target_modules": ["in_proj", "x_proj"]}
    said = []
    for micro in (4, 1):
        recipe = place.recipe(
            {**changes, "training.per_device_train_batch_size": micro, "output_dir": f"mamba-{micro}"}, "mamba.yaml"
        )
        said.append(place.warm.run("train", recipe, cwd=place.folder).ok().stderr)
    assert place.losses("mamba-1") == pytest.approx(place.losses("mamba-4"), rel=1e-6)
    assert len([line for line in said[0].splitlines() if "rows are padded, in batches of like length" in line]) == 1
    refused = place.warm.run("train", place.recipe({**changes, **PACKED, "output_dir": "no"}), cwd=place.folder)
    assert refused.returncode == 5
    assert "data.packing: this model cannot take several rows in one sequence: documents see each" in refused.stderr
    assert not (place / "no").exists()
