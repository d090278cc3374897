"""Supervised fine-tuning: learn the assistant's turns (or the completion, or the text) token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.methods.method import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig

    from finetune.run.folder import RunFolder
    from finetune.run.micro_batches import RowCollator, Schedule
    from finetune.run.trainer import Trainer


def trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: SFTConfig,
    train: Schedule,
    validation: Schedule | None,
    collate: RowCollator,
    folder: RunFolder,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The trainer of a run.

    Args:
        model: the base with its adapter, or the base alone for full fine-tuning.
        tokenizer: the base's tokenizer.
        arguments: from `finetune.run.arguments.trainer_arguments`.
        train: prepared rows in their order (finetune.data.order).
        validation: prepared rows, or None.
        collate: makes batches of prepared rows.
        folder: the run's folder.
        callbacks: what watches the run.
    """
    from transformers import PrinterCallback, ProgressCallback

    from finetune.run.trainer import Trainer

    made = Trainer(
        model=model,
        args=arguments,
        train=train,
        validation=validation,
        processing_class=tokenizer,
        collate=collate,
        folder=folder,
        callbacks=callbacks,
    )
    for stock in (PrinterCallback, ProgressCallback):  # our own progress line replaces both
        made.remove_callback(stock)
    return made


METHOD: Any = Method(name="sft", needs=("messages", "prompt_completion", "text"), trainer=trainer)
