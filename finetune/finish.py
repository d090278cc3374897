"""The end of training: measure, save, prove."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.ready import Ready
    from finetune.run.ranks import World
    from finetune.run.trainer import Trainer


def finish(ready: Ready, seconds: float) -> dict[str, Any]:
    """Measure, save, prove; empty on ranks other than 0."""
    from finetune.run.wait import from_main_in_time

    trainer, data = ready.trainer, ready.data
    figures: dict[str, Any] = {"steps": trainer.state.global_step}
    if data.validation is not None:
        figures["validation_loss"] = round(trainer.last_validation_loss(), 4)
    state = _whole_state(trainer, ready.launched, whole=not ready.built.targets)
    seconds = round(seconds, 1)
    if ready.launched.size == 1:
        return _saved(ready, state, figures, seconds)
    # The others stay until the product is saved, and see to it that rank 0 lives.
    facts: dict[str, Any] = from_main_in_time(ready.launched, lambda: _saved(ready, state, figures, seconds))
    return facts if ready.launched.is_main else {}


def _saved(ready: Ready, state: dict[str, Any] | None, figures: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Save and prove, on rank 0; what the run reports."""
    from finetune.run.restart import report

    trainer, checked = ready.trainer, ready.checked
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    speeds = sorted(entry["tokens_per_second"] for entry in history)
    figures |= {
        "final_loss": round(history[-1]["loss"], 4),
        "tokens_per_second": speeds[len(speeds) // 2],
        "seconds": seconds,
    }
    product, proof = _save(ready, state, figures)
    ready.say("saved", f"{product}: {proof['tensors']} tensors, reopened from disk and equal to the trained ones")
    return report(checked.folder, product, checked.adapter.method, figures, proof)


def _whole_state(trainer: Trainer, launched: World, whole: bool) -> dict[str, Any] | None:
    """The weights to save of a model that is spread over the ranks, brought together on rank 0: those of the adapter,
    or with `whole` all. None where each rank holds them.
    """
    from finetune.run.spread import whole_weights

    if not trainer.spreads:
        return None
    trainer.rest()
    named = trainer.model.named_parameters(remove_duplicate=False)
    wanted = [(name, one) for name, one in named if whole or one.requires_grad or "lora_" in name]
    return whole_weights(wanted, keep=launched.is_main)


def _save(ready: Ready, state: dict[str, Any] | None, figures: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Write the product with its card; gives its folder and what was proved of it."""
    from finetune.exports import EXPORTS
    from finetune.model.adapt import adapted_modules
    from finetune.model.auto import class_name
    from finetune.model.earlier import DOUBLED
    from finetune.model.initial import is_doubled, settle
    from finetune.model.tokenizer import NEW_TOKENS, new_ids
    from finetune.registry import resolve
    from finetune.run.card import trained_card
    from finetune.run.folder import read_json

    checked, base, data, built, trainer = ready.checked, ready.base, ready.data, ready.built, ready.trainer
    recipe, folder = ready.loaded.recipe, checked.folder
    loads = class_name(trainer.model.config.model_type)
    text = trained_card(
        folder.root, base.folder, recipe.model, recipe.data, recipe.training, built.trains,
        data.counts(), figures, "peft" if built.targets else "transformers", loads, built.lost,
    )  # fmt: skip
    tokenizer = trainer.processing_class
    added = {key: new_ids(recipe.model, tokenizer, key) for key in NEW_TOKENS}
    if recipe.data.chat_template:
        tokenizer.chat_template = Path(recipe.data.chat_template).expanduser().read_text(encoding="utf-8")
    if not built.targets:
        stops = data.stops.ends if data.stops else ()
        write = resolve("export", "weights", EXPORTS)
        return folder.model, write(trainer.model, tokenizer, folder.model, text, stops, state, figures)
    doubled = is_doubled(checked.adapter.init_lora_weights)
    if doubled:
        settle(adapted_modules(trainer.model))
    hashes = read_json(folder.record).get("base", {}).get("sha256")  # taken when the run began
    facts = {
        "base": {"name": recipe.model.name_or_path, "sha256": hashes or ready.hashes},
        "quantization": built.quantized.facts() if built.quantized else None,
        "stops": data.stops.facts() if data.stops else None,
        **({DOUBLED: checked.adapter.init_lora_weights} if doubled else {}),
        **{key: ids for key, ids in added.items() if ids},
    }
    with_tokenizer = tokenizer if recipe.data.chat_template or any(added.values()) else None
    write = resolve("export", "adapter", EXPORTS)
    return folder.adapter, write(trainer.model, folder.adapter, text, facts, with_tokenizer, state, figures)
