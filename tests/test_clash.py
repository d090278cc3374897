"""The unrelated project of the same import name is noticed before anything runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from finetune.clash import refuse_namesake
from finetune.errors import EnvironmentFault, ExitCode


def install(folder: Path, name: str) -> None:
    """What pip leaves of a distribution: a folder with its name and version."""
    facts = folder / f"{name.replace('-', '_')}-0.10.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.10.0\n")


def test_the_namesake_is_refused_with_the_two_commands_that_mend_it(tmp_path, monkeypatch) -> None:
    install(tmp_path, "finetune")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EnvironmentFault) as fault:
        refuse_namesake()
    message = str(fault.value)
    assert str(tmp_path) in message
    assert "python -m pip uninstall -y finetune\n" in message
    assert "python -m pip install --force-reinstall --no-deps finetune-recipes\n" in message


def test_others_whose_names_begin_alike_are_welcome(tmp_path, monkeypatch) -> None:
    for name in ("finetune-recipes", "finetune-eval", "finetuner"):
        install(tmp_path, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    refuse_namesake()


def test_the_command_ends_with_exit_code_four(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    install(tmp_path / "site", "finetune")
    environment = {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path / "site")])}
    outcome = cli("families", "--json", env=environment)
    assert outcome.returncode == ExitCode.ENVIRONMENT
    assert outcome.json["error"]["kind"] == "EnvironmentFault"
    assert "Traceback" not in outcome.stderr


def test_looking_takes_less_than_thirty_milliseconds() -> None:
    def once() -> float:
        began = time.process_time()
        refuse_namesake()
        return time.process_time() - began

    assert min(once() for _ in range(5)) < 0.03
