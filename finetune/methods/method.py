"""What a training method is: the rows it needs, and a trainer made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.formats.example import Gives


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        name: the key in METHODS.
        needs: what a format must give ("messages", "prompt_completion", "text") to be trained this way.
        trainer: makes the trainer; see `finetune.methods.sft.trainer` for the arguments.
    """

    name: str
    needs: tuple[Gives, ...]
    trainer: Callable[..., Any]
