"""What every test gets: no network, no tokens, caches of its own, one thread, and two ways to run a command.

`cli` starts a fresh process, for what needs no torch. `warm` forks from a process that has imported the stack, for
whole runs (see warm.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ROOT / "tests" / "offline"
sys.path.insert(0, str(OFFLINE))

import network  # noqa: E402 - lies in the folder just added
from tiny import Lab, lab_in  # noqa: E402
from warm import Outcome, Warm  # noqa: E402

_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# A test that is slow because the machine is busy has found nothing.
hypothesis.settings.register_profile("finetune", deadline=None)
hypothesis.settings.load_profile("finetune")


def _settings(home: Path) -> dict[str, str]:
    """The environment of all tests. Some of it is read at import, so it is set before any test file is."""
    return {
        "PYTHONPATH": os.pathsep.join([str(OFFLINE), str(ROOT)]),
        "FINETUNE_ROOT": str(ROOT),
        network.RECORD: str(home / "refused"),
        "HF_HOME": str(home / "hf"),
        "TRACKIO_DIR": str(home / "trackio"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "WANDB_DIR": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "120",
        "NO_COLOR": "1",
    }


def pytest_configure(config: pytest.Config) -> None:
    home = tempfile.TemporaryDirectory(prefix="finetune-tests-")
    config.add_cleanup(home.cleanup)
    for name in (*_SECRETS, *_LAUNCHED):
        os.environ.pop(name, None)
    os.environ.update(_settings(Path(home.name)))
    network.block()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Outcome]:
    """Run `finetune WORDS...` in a fresh process, in tmp_path unless told otherwise."""

    def run(*words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 60) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "finetune", *words],
            cwd=cwd or tmp_path,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """The warm fork server; the first test that asks for it pays for the imports."""
    server = Warm(os.environ)
    yield server
    server.close()


@pytest.fixture(scope="session")
def bases(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny bases of tiny.py; not to be changed."""
    folder = tmp_path_factory.mktemp("bases")
    warm.run(str(folder), cwd=folder, entry="tiny:main", env={"FINETUNE_ROOT": str(ROOT / "tests")}).ok()
    return folder


@pytest.fixture
def lab(tmp_path: Path, bases: Path, warm: Warm) -> Lab:
    """A folder with bases and data, and the command line run in it."""
    return lab_in(tmp_path, bases, warm)


@pytest.fixture
def refused() -> Callable[[], list[str]]:
    """What this test's processes have tried to reach beyond this machine, from now on."""
    record = Path(os.environ[network.RECORD])
    before = len(record.read_text().splitlines()) if record.exists() else 0
    return lambda: record.read_text().splitlines()[before:] if record.exists() else []
