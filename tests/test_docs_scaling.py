"""Every command of docs/scaling.md is run here, or says which hardware it needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml
from test_docs import ROOT, blocks
from test_train_modes import stopped_after
from tiny import Lab
from warm import Outcome

from finetune.recipe.load import load_recipe
from finetune.run.batch import batch_shape
from finetune.run.modes import config_file, read_mode, refuse

PAGE = ROOT / "docs/scaling.md"
LINES = [line for block in blocks(PAGE, "sh") for line in block.splitlines() if line.strip()]
NEEDS = re.compile(r"#.*\bneeds (one GPU|(?:two|four|eight) GPUs)")
HERE = [line for line in LINES if not NEEDS.search(line)]
SCRIPTS = [line for line in HERE if line.startswith("finetune launch-script ")]
RUNS = [line for line in HERE if line not in SCRIPTS]


def words(line: str) -> list[str]:
    return line.split("#")[0].split()


def test_commands_are_found_and_those_for_gpus_are_marked() -> None:
    assert len(SCRIPTS) >= 3
    assert len(RUNS) >= 3
    assert len(LINES) - len(HERE) >= 8
    for line in RUNS:
        assert line.endswith("# two CPU processes do"), f"{line!r} runs on a CPU, or must say which hardware it needs"


@pytest.mark.parametrize("line", [line for line in LINES if line not in SCRIPTS])
def test_the_recipe_can_be_shared_by_as_many_processes_as_the_command_starts(line: str) -> None:
    """What a launcher would refuse before anything is loaded, for a machine with as many GPUs as the line says."""
    given, count = words(line), machines_and_processes(line)
    recipe = next(word for word in given if word.startswith("recipes/"))
    options = load_recipe(ROOT / recipe, [word for word in given if re.fullmatch(r"[\w.]+=\S+", word)]).recipe
    shape = batch_shape(options.training, count)
    named = given[given.index("--config_file") + 1] if "--config_file" in given else options.launch.config
    device = "cpu" if line in RUNS else "cuda"
    if named is not None:
        file = config_file(named, ROOT / "configs")
        refuse(read_mode(file, ROOT / "configs"), options.model, options.training, shape, device)
    assert shape.per_device * shape.accumulation * count == options.training.global_batch_size


def machines_and_processes(line: str) -> int:
    """How many processes a command starts on all its machines together."""
    given = words(line)
    if found := re.search(r"launch\.num_processes=(\d+)", line):
        return int(found[1])
    if "--nproc-per-node" in given:
        hosts = int(given[given.index("--nnodes") + 1].split(":")[-1]) if "--nnodes" in given else 1
        return hosts * int(given[given.index("--nproc-per-node") + 1])
    if "--config_file" in given:
        return int(yaml.safe_load((ROOT / given[given.index("--config_file") + 1]).read_text())["num_processes"])
    marked = NEEDS.search(line)
    assert marked, line
    return {"one": 1, "two": 2, "four": 4, "eight": 8}[marked[1].split()[0]]


@pytest.mark.parametrize("line", SCRIPTS)
def test_a_job_file_is_printed(cli: Callable[..., Outcome], line: str) -> None:
    outcome = cli(*words(line)[1:], cwd=ROOT).ok()
    assert "finetune.train recipes/qwen3/8b-lora.yaml" in outcome.stdout
    assert "{{" not in outcome.stdout


@pytest.mark.slow
@pytest.mark.parametrize("line", RUNS)
def test_a_run_of_two_cpu_processes_does_what_it_says(lab: Lab, line: str) -> None:
    """On a tiny base, for two steps, in a folder of its own; all else as the page says."""
    named = [word for word in words(line) if not word.startswith("output_dir=")]
    assert len(named) == len(words(line)) - 1
    launcher = {"finetune": ["-m", "finetune"], "torchrun": ["-m", "torch.distributed.run"]}[named[0]]
    small = [f"model.name_or_path={lab / 'chatml'}", "training.max_steps=2", f"output_dir={lab / 'run'}"]
    moves = "parallelism" in line
    if moves:
        small.append("training.save_steps=1")
        begun = ["train", named[2], *small, "launch.num_processes=1", "launch.device=cpu"]
        lab.warm.run(*begun, cwd=ROOT).ok()
        stopped_after(lab, "run", 1)
    done = subprocess.run(
        [sys.executable, *launcher, *named[1:], *small, "launch.device=cpu"],
        cwd=ROOT, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "x 2 processes = 8 rows a step" in done.stderr
    assert moves == ("checkpoint-1" in done.stderr)
    assert len(lab.losses()) == 2
    assert (lab / "run/adapter/adapter_model.safetensors").is_file()
