"""A host whose memory cannot take the base of each of its processes is refused before any of them loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from tiny import Lab

from finetune.errors import ExitCode
from finetune.model.folder import check
from finetune.model.load import Precision, load_base
from finetune.model.memory import copied_bytes, dtypes, most_bytes
from finetune.plan.hardware import _left_in_groups, memory_left
from finetune.recipe.sections import ModelOptions

MIB = 2**20


def halved(lab: Lab, name: str = "chatml", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A base whose files hold bfloat16, or another dtype of 16 bits."""
    folder = lab.own_base(name)
    path = folder / "model.safetensors"
    weights = {key: value.to(dtype) for key, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def parameters(folder: Path) -> int:
    return sum(one.numel() for one in load_file(folder / "model.safetensors").values())


def test_only_weights_that_are_copied_count(lab: Lab) -> None:
    folder = halved(lab)
    base, numbers = check("chatml", folder), parameters(folder)

    def needed(compute: str, held: str, quantization: str = "none", in_host: bool = True) -> int:
        options = ModelOptions.model_validate({"name_or_path": str(folder), "quantization": quantization})
        return copied_bytes(options, base, Precision(compute=compute, base=held), in_host)

    assert needed("bfloat16", "bfloat16") == 0, "mapped from the files"
    assert needed("float32", "float32") == needed("bfloat16", "float32") == 4 * numbers
    assert needed("float16", "float16") == 2 * numbers
    assert needed("bfloat16", "nf4", "nf4") == numbers // 2
    assert needed("bfloat16", "int8", "int8", in_host=False) == 0, "made on the device"
    assert dtypes(base) == "bfloat16"
    whole = ModelOptions(name_or_path=str(folder))
    kept = Precision(compute="bfloat16", base="float32")
    assert copied_bytes(whole, base, kept, in_host=False, as_stored=True) == 0, "widened when they are laid down"


def test_experts_that_files_hold_one_by_one_are_copied_into_one_weight(tmp_path: Path) -> None:
    folder = zoo.folder(tmp_path / "moe", "moe", dtype=torch.bfloat16)
    names = load_file(folder / "model.safetensors")
    experts = sum(one.numel() for name, one in names.items() if ".experts." in name)
    assert any(".experts.3." in name for name in names)
    base, kept = check("moe", folder), Precision(compute="bfloat16", base="bfloat16")
    options = ModelOptions(name_or_path=str(folder))
    assert copied_bytes(options, base, kept, in_host=True) == 2 * experts
    model = load_base(options, base, kept, "eager")
    made = sum(one.numel() for name, one in model.named_parameters() if ".experts." in name)
    assert made == experts


def test_numbers_in_8_and_4_bits_count_as_what_they_become(lab: Lab) -> None:
    folder = lab.own_base("chatml")
    config = json.loads((folder / "config.json").read_text())
    options = ModelOptions.model_validate({"name_or_path": str(folder)})
    kept = Precision(compute="bfloat16", base="bfloat16")
    pair = {"a.weight": torch.zeros(6, 8, dtype=torch.float8_e4m3fn), "b.blocks": torch.zeros(5, 4, dtype=torch.uint8)}
    save_file(pair, folder / "model.safetensors", metadata={"format": "pt"})
    for method, expected in (("fp8", 48 * 2), ("mxfp4", (48 + 40) * 2)):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        base = check("chatml", folder)
        assert copied_bytes(options, base, kept, in_host=True) == expected
        assert copied_bytes(options, base, kept, in_host=False) == 0


def test_files_that_hold_more_than_is_loaded_are_no_reason(lab: Lab) -> None:
    folder = halved(lab)
    path = folder / "model.safetensors"
    numbers = parameters(folder)
    save_file({**load_file(path), "vision.weight": torch.zeros(MIB, dtype=torch.bfloat16)}, path, {"format": "pt"})
    options = ModelOptions.model_validate({"name_or_path": str(folder)})
    base, kept = check("chatml", folder), Precision(compute="float32", base="float32")
    assert copied_bytes(options, base, kept, in_host=True) == 4 * (numbers + MIB)
    assert most_bytes(options, base, kept) == 4 * numbers


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, "write model.dtype: bfloat16, in which the weights are mapped from their files; or write model.quant"),
        ({"adapter": {"method": "none"}, "training.learning_rate": 1e-4}, "train an adapter (adapter.method: lora)"),
    ],
    ids=["lora", "full"],
)
def test_a_process_without_room_for_its_base_says_what_takes_less(
    lab: Lab, changes: Mapping[str, Any], advice: str
) -> None:
    needed = 4 * parameters(halved(lab))
    refused = lab.train(changes, entry="short_of_memory:main", env={"LEFT": str(needed - 1)})
    assert refused.returncode == ExitCode.ENVIRONMENT
    assert "model.name_or_path: the process loads chatml in float32, a copy of files in bfloat16: " in refused.stderr
    assert advice in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (lab / "run").exists()
    lab.train({**changes, "training.max_steps": 1}, entry="short_of_memory:main", env={"LEFT": str(needed)}).ok()


def test_nothing_is_told_that_the_checks_before_a_launch_would_refuse(lab: Lab) -> None:
    needed = 4 * parameters(halved(lab, dtype=torch.float16))
    changes = {"launch.config": "zero2", "launch.num_processes": 2, "adapter.init_lora_weights": "pissa"}
    refused = lab.warm.ranks(
        2, lab.recipe(changes), cwd=lab.folder, entry="short_of_memory:train",
        env={"LEFT": str(2 * needed - 1)},
    )  # fmt: skip
    assert "GB left; start at most 1 on this host; or take a host with more memory" in refused[0].stderr


def test_ranks_of_a_host_need_room_for_all_of_them_and_all_say_the_same_code(lab: Lab) -> None:
    needed = 4 * parameters(halved(lab))
    changes = {"training.max_steps": 1}
    refused = lab.warm.ranks(
        2, lab.recipe(changes), cwd=lab.folder, entry="short_of_memory:train",
        env={"LEFT": str(2 * needed - 1)},
    )  # fmt: skip
    assert [one.returncode for one in refused] == [ExitCode.ENVIRONMENT] * 2
    assert "each of the 2 processes of this host loads chatml in float32" in refused[0].stderr
    assert "start at most 1 on this host" in refused[0].stderr
    lab.train({**changes, "model.dtype": "bfloat16"}, entry="short_of_memory:main", env={"LEFT": "0"}).ok()


def test_what_is_left_is_what_the_system_says() -> None:
    left = memory_left()
    assert left is not None
    assert left > MIB


def test_a_control_group_with_a_limit_leaves_what_it_does_not_use(tmp_path: Path) -> None:
    group = tmp_path / "group"
    group.mkdir()
    facts = {
        "memory.max": "1000", "memory.current": "700", "memory.swap.max": "0",
        "memory.stat": "anon 500\nactive_file 150\ninactive_file 50\n",
    }  # fmt: skip
    for name, text in facts.items():
        (group / name).write_text(text)
    assert list(_left_in_groups([group, tmp_path], swap=40)) == [500]
    (group / "memory.swap.max").write_text("max\n")
    assert list(_left_in_groups([group], swap=40)) == [540]
    (group / "memory.swap.max").write_text("10\n")
    assert list(_left_in_groups([group], swap=40)) == [510]
    (group / "memory.max").write_text("max\n")
    assert list(_left_in_groups([group], swap=40)) == []
