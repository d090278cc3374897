"""What each rank alone knows between two steps: its random numbers, and the figures it has not logged yet.

Every checkpoint holds it rank by rank: in state.json where each rank holds the whole state, else in part-R.json.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.run.checkpoint_state import TRAINER_STATE, read_state
from finetune.run.checkpoint_tree import rebuild

_WINDOW = "window"  # beside the names of generators


@dataclass(frozen=True)
class Window:
    """What a rank has counted since the last line of the log.

    Attributes:
        since: the step of that line.
        loss: of all steps since, added up; a tensor where it is taken, since reading it makes the host wait.
        seen: tokens, and trained tokens.
        seconds: time trained.
    """

    since: int
    loss: float | Tensor
    seen: tuple[float, float]
    seconds: float


def own_state(numbers: dict[str, Any], window: Window) -> dict[str, Any]:
    """What this rank alone knows, for a checkpoint; `numbers` are those of `rng_state`."""
    return {**numbers, _WINDOW: asdict(replace(window, loss=float(window.loss)))}


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator of this process that training draws from."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tobytes(), *rest),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device).cpu().numpy().tobytes()
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put `rng_state` back."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if device.type in state:
        torch.get_device_module(device).set_rng_state(_bytes(state[device.type]), device)


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def own_states(checkpoint: Path) -> list[dict[str, Any]]:
    """What every rank alone knew, rank 0 first."""
    stated = read_state(checkpoint)
    if "parts" not in stated:
        ranks: list[dict[str, Any]] = rebuild(stated["ranks"], {})
        return ranks
    files = [checkpoint / f"part-{rank}.json" for rank in range(stated["parts"])]
    return [rebuild(json.loads(path.read_text(encoding="utf-8"))["random"], {}) for path in files]


def restore_rng(checkpoint: Path, ranks: Sequence[dict[str, Any]], rank: int, seed: int, device: torch.device) -> None:
    """Put back the random numbers of a rank; a rank that was not there before gets its own, by seed and step."""
    if rank < len(ranks):
        set_rng_state(ranks[rank], device)
        return
    step = int(json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"])
    own = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def window_of(ranks: Sequence[dict[str, Any]], rank: int, count: int) -> tuple[Window, float] | None:
    """Where the log of a rank goes on, and the mean of all ranks' losses.

    Args:
        ranks: from `own_states`.
        rank: this one.
        count: how many there are now. Where there were as many each goes on with its own; else all have the mean loss,
            and rank 0 has counted every token.
    """
    told = [state[_WINDOW] for state in ranks if _WINDOW in state]
    if len(told) < len(ranks):  # written before this was kept
        return None
    windows = [Window(**{**one, "seen": tuple(one["seen"])}) for one in told]
    mean = sum(float(one.loss) for one in windows) / len(windows)
    if len(windows) == count:
        return windows[rank], mean
    tokens, trained = (sum(one.seen[place] for one in windows) if rank == 0 else 0.0 for place in (0, 1))
    return Window(windows[0].since, mean, (tokens, trained), windows[0].seconds), mean
