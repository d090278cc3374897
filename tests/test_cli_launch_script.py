"""Job files for clusters: filled in, well-formed, and queued again on exit code 75."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny import Lab
from warm import Outcome

from finetune.run.launch import free_port

RECIPE = """
model: {name_or_path: base}
data: {train: rows.jsonl}
training: {global_batch_size: 32}
launch: {config: zero3}
output_dir: runs/My_Run
"""


@pytest.fixture
def script(cli: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Outcome]:
    """Run the verb on a recipe in a folder of its own."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return lambda *words: cli("launch-script", "recipe.yaml", *words)


def test_a_slurm_job_starts_a_task_per_process_and_queues_itself_again(
    script: Callable[..., Outcome], tmp_path: Path
) -> None:
    text = script("--for", "slurm", "--nodes", "2", "--gpus", "4", "training.learning_rate=1e-4").ok().stdout
    subprocess.run(["bash", "-n", "-c", text], check=True)
    options = dict(
        line[8:].split("=", 1) for line in text.splitlines() if line.startswith("#SBATCH --") and "=" in line
    )
    assert options["--nodes"] == "2"
    assert options["--ntasks-per-node"] == options["--gpus-per-node"] == "4"
    assert options["--job-name"] == "my-run"
    assert "exec python -m finetune.train recipe.yaml training.learning_rate=1e-4'" in text
    # The script itself, with stand-ins for Slurm's commands and for Python.
    tell = 'echo "{\\"exit_code\\": 75}" > "$FINETUNE_LAUNCH_REPORT"'
    done = in_job(tmp_path, text, SLURM | {
        "srun": 'shift; SLURM_PROCID=3 SLURM_LOCALID=1 "$@"',
        "python": f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*"; {tell}; exit 75',
    })  # fmt: skip
    assert done.returncode == 75
    assert done.stdout.splitlines() == [
        "3 1 8 first -m finetune.train recipe.yaml training.learning_rate=1e-4",
        "requeue 7",
    ]
    # srun kills the second task over the first one's end, and tells of that.
    killing = {"srun": 'shift; "$@"; exit 137', "python": f"{tell}; exit 75"}
    assert in_job(tmp_path, text, SLURM | killing).stdout.splitlines() == ["requeue 7"]
    # A job that is queued again has the number of the earlier one, whose words must not stand for it.
    for code in (1, 0):
        done = in_job(tmp_path, text, SLURM | {"srun": f"exit {code}", "python": ""})
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    (tmp_path / "my-run-7.ended").write_text('{"exit_code": 75}')
    assert in_job(tmp_path, text, SLURM | {"srun": "exit 1", "python": ""}).returncode == 1
    assert not (tmp_path / "my-run-7.ended").exists()


SLURM = {"scontrol": 'case $1 in show) echo first; echo second;; *) echo "$@";; esac'}


def in_job(folder: Path, text: str, stand_ins: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a job's script with stand-ins for commands; what Python is given by `-c` it does itself."""
    place = folder / "bin"
    place.mkdir(exist_ok=True)
    for name, body in stand_ins.items():
        own = f'[ "$1" = -c ] && exec {sys.executable} "$@"\n' if name == "python" else ""
        (place / name).write_text(f"#!/bin/bash\n{own}{body}\n")
        (place / name).chmod(0o755)
    variables = {"PATH": f"{place}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "x",
                 "HOME": "/home/me", "JOB_COMPLETION_INDEX": "0"}  # fmt: skip
    return subprocess.run(["bash", "-c", text], cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_a_kubernetes_job_goes_on_after_75_and_ends_on_faults(script: Callable[..., Outcome]) -> None:
    found = yaml.safe_load(script("--for", "kubernetes", "--nodes", "2", "--image", "mine:1").ok().stdout)
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 2
    again, ends = job["podFailurePolicy"]["rules"]
    assert (again["action"], again["onExitCodes"]["values"]) == ("Ignore", [75])
    assert (ends["action"], 75 in ends["onExitCodes"]["values"]) == ("FailJob", False)
    (container,) = job["template"]["spec"]["containers"]
    assert container["image"] == "mine:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert "--nnodes 2 --nproc-per-node 8" in container["command"][2]
    assert "-m finetune.train recipe.yaml &" in container["command"][2]


@pytest.mark.parametrize(("told", "code"), [(3, 3), (75, 75), (None, 1)])
def test_a_kubernetes_pod_ends_with_what_a_process_told(
    script: Callable[..., Outcome], tmp_path: Path, told: int | None, code: int
) -> None:
    tell = f"echo '{{\"exit_code\": {told}}}' > $FINETUNE_LAUNCH_REPORT" if told else ":"
    text = container_script(script("--for", "kubernetes").ok().stdout)
    done = in_job(tmp_path, text, {"torchrun": f"{tell}; exit 1", "python": ""})
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
    assert in_job(tmp_path, text, {"torchrun": "exit 0", "python": ""}).returncode == 0


@pytest.mark.slow
def test_a_kubernetes_pod_whose_rows_are_broken_ends_with_3(lab: Lab, cli: Callable[..., Outcome]) -> None:
    (lab / "rows.jsonl").write_text("no json\n")
    recipe = lab.recipe({"data.train": "rows.jsonl", "data.validation": [], "launch.device": None})
    printed = cli("launch-script", recipe, "--for", "kubernetes", "--gpus", "2", cwd=lab.folder).ok().stdout
    text = container_script(printed).replace("run-node-0-0.run", "127.0.0.1").replace("29500", str(free_port()))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", text], cwd=lab.folder, env={**os.environ, "PATH": path, "JOB_COMPLETION_INDEX": "0"},
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert not (lab / "run").exists()


def container_script(printed: str) -> str:
    """What the container of a Kubernetes job runs."""
    job = yaml.safe_load(printed)["spec"]["replicatedJobs"][0]["template"]["spec"]
    text: str = job["template"]["spec"]["containers"][0]["command"][2]
    return text


def test_a_job_hands_each_word_on_as_it_was_given(script: Callable[..., Outcome], tmp_path: Path) -> None:
    words = (
        'tracking.trackers=["wandb"]', 'model.new_special_tokens=["<|a|>"]', 'data.train=[{"path": "a b.jsonl"}]',
        "tracking.run_name=$HOME `id` \\", "output_dir=~/runs/" + "x" * 39 + "-y",
    )  # fmt: skip
    text = script("--for", "slurm", *words).ok().stdout
    stand_ins = {"srun": 'shift; "$@"', "scontrol": "echo first", "python": "printf '%s\\n' \"$@\""}
    done = in_job(tmp_path, text, stand_ins)
    assert done.stdout.splitlines()[3:] == list(words)
    found = yaml.safe_load(script("--for", "kubernetes", *words).ok().stdout)
    assert found["metadata"]["name"] == "x" * 39


@pytest.mark.parametrize("time", ["90", "12:00", "12:00:00", "2-12", "2-00:00:00", "UNLIMITED"])
def test_a_slurm_job_takes_a_time_as_slurm_writes_it(script: Callable[..., Outcome], time: str) -> None:
    assert f"#SBATCH --time={time}\n" in script("--time", time).ok().stdout


def test_words_of_a_job_that_look_like_numbers_stay_text(script: Callable[..., Outcome]) -> None:
    printed = script("--for", "skypilot", "--accelerator", "80", "--gpus", "8").ok().stdout
    assert yaml.safe_load(printed)["resources"]["accelerators"] == "80:8"
    printed = script("--for", "kubernetes", "output_dir=runs/2").ok().stdout
    assert yaml.safe_load(printed)["metadata"]["name"] == "2"


def test_a_skypilot_job_installs_what_the_recipe_uses(script: Callable[..., Outcome]) -> None:
    assert "[quant,deepspeed]" in script("--for", "skypilot").ok().stdout
    plain = script("--for", "skypilot", "launch.config=ddp", "tracking.trackers=[wandb]").ok().stdout
    assert "[quant,tracking]" in plain


def test_a_skypilot_job_names_nodes_and_accelerators(script: Callable[..., Outcome]) -> None:
    found = yaml.safe_load(script("--for", "skypilot", "--nodes", "4", "--accelerator", "A100").ok().stdout)
    assert found["num_nodes"] == 4
    assert found["resources"]["accelerators"] == "A100:8"
    subprocess.run(["bash", "-n", "-c", found["run"]], check=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--for", "pbs"), "there are slurm, kubernetes, skypilot"),
        (("--gpus", "5"), "32 rows cannot be shared evenly by 5 processes"),
        (("launch.num_processes=4",), "the recipe asks for 4 processes and 1 x 8 are 8"),
        (("launch.config=zero9",), "launch.config: zero9 does not exist"),
        (("adapter.init_lora_weights=pissa",), "adapter.init_lora_weights: "),
        (("launch.device=cpu",), "launch.device: cpu: a job file asks for accelerators"),
        (("--image", "mine:1"), "--image: has no effect on a job for slurm, only for kubernetes"),
        (("--for", "kubernetes", "--accelerator", "A100"), "--accelerator: has no effect on a job for kubernetes"),
        (("--for", "skypilot", "--time", "1:00:00"), "--time: has no effect on a job for skypilot, only for slurm"),
        (("--for", "kubernetes", "--image", "a: b"), "--image: expected an image as registry.example/finetune:1.0"),
        (("--for", "skypilot", "--accelerator", "H100: 3"), "--accelerator: expected a name as H100 or A100-80GB"),
        (("--time", "x y"), "--time: expected a time as 90, 12:00:00 or 2-00:00:00, not 'x y'"),
    ],
)
def test_what_could_not_run_is_refused(script: Callable[..., Outcome], words: tuple[str, ...], said: str) -> None:
    outcome = script(*words)
    assert outcome.returncode == 2
    assert said in outcome.stderr
    assert outcome.stdout == ""
