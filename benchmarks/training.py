"""Training speed beside TRL's own trainer: same base, rows, batches, adapter and optimizer, one process each in turn.

    python benchmarks/training.py                 # needs `finetune base smollm2`; about three minutes on two CPU cores

Variants:
    trl            SFTTrainer as it comes (activation checkpointing on, attention as transformers chooses)
    trl-lean       SFTTrainer with checkpointing off and the attention kernel that we choose
    ours           finetune's trainer with what `auto` gives: rows end to end, no padding

Each is run `--rounds` times, turn by turn, so that a machine whose speed drifts treats all alike. A run's figure is the
median over its steps but the first two. Quote the ratio, not the absolute figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "smollm2-135m-instruct"
VARIANTS = ("trl", "trl-lean", "ours")


def measure(variant: str, steps: int, rows_a_step: int) -> dict[str, Any]:
    """Train in this process; tokens per second (padding not counted), and the losses."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    from finetune.data.cache import Cache
    from finetune.data.collate import FlatCollator, PaddedCollator
    from finetune.data.engine import Settings
    from finetune.data.feed import feed
    from finetune.data.vocabulary import load
    from finetune.families import match
    from finetune.methods.sft import trainer as our_trainer
    from finetune.model.attention import attention_width, isolate
    from finetune.model.build import build
    from finetune.model.folder import find
    from finetune.model.load import attention, load_tokenizer, precision, stop_ids
    from finetune.plan.hardware import compute_dtype, detect
    from finetune.recipe.sections import (
        AdapterOptions,
        AuditOptions,
        DataOptions,
        LaunchOptions,
        ModelOptions,
        TrainingOptions,
    )
    from finetune.run.arguments import BatchShape, trainer_arguments
    from finetune.run.folder import RunFolder
    from finetune.run.micro_batches import RowCollator

    model_options = ModelOptions(name_or_path=str(BASE))
    data_options = DataOptions.model_validate({"train": str(ROOT / "data" / "tickets" / "train.jsonl")})
    training = TrainingOptions(
        learning_rate=1e-3, max_steps=steps, global_batch_size=rows_a_step, lr_scheduler_type="linear", warmup_steps=0.0
    )
    base = find(model_options.name_or_path)
    tokenizer = load_tokenizer(model_options, base)
    cache = Cache(tempfile.mkdtemp())
    assert base.folder is not None, "the quickstart's base is a folder"
    settings = Settings(load(base.folder, cache, lambda: tokenizer), stop_ids(tokenizer, base), data_options)
    fed = feed(settings, AuditOptions(), cache, training.seed)
    hardware = detect()
    compute = compute_dtype("auto", hardware)
    ours = attention(model_options, hardware.device, fed.longest)
    attn = "sdpa" if variant == "trl" else ours.own
    set_seed(training.seed)
    device = None if hardware.device == "cpu" else torch.device(hardware.device)
    built = build(
        model_options, AdapterOptions(), base, match("auto", base.model_type),
        precision(model_options, "lora", compute), attn, device,
    )  # fmt: skip
    shape = BatchShape(rows_a_step, 1, 1)
    arguments = trainer_arguments(
        training, LaunchOptions(), shape, Path(tempfile.mkdtemp()), compute, hardware.device, False
    )

    class Clock(TrainerCallback):
        """Seconds of each step."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    clock = Clock()
    if variant == "ours":
        folder = RunFolder(Path(arguments.output_dir))
        isolate(built.model, ours.inside, fed.longest)
        train, _ = fed.schedules(attention_width(built.model), alike=False)
        trainer = our_trainer(
            model=built.model, tokenizer=tokenizer, arguments=arguments, train=train, validation=None,
            collate=RowCollator(FlatCollator()), folder=folder, callbacks=[clock],
        )  # fmt: skip
    else:
        lean = {} if variant == "trl" else {"activation_checkpointing": False, "gradient_checkpointing": False}
        config = SFTConfig(
            output_dir=arguments.output_dir,
            per_device_train_batch_size=rows_a_step,
            max_steps=steps,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            seed=training.seed,
            bf16=compute == "bfloat16",
            use_cpu=hardware.device == "cpu",
            dataloader_pin_memory=hardware.device != "cpu",
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            max_length=None,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            **lean,
        )
        rows = fed.train.rows
        padded = Dataset.from_list([{key: rows[at][key] for key in ("input_ids", "labels")} for at in range(len(rows))])
        trainer = SFTTrainer(
            model=built.model, args=config, train_dataset=padded, processing_class=tokenizer,
            data_collator=PaddedCollator(tokenizer.pad_token_id), callbacks=[clock],
        )  # fmt: skip
    trainer.train()
    tokens = float(fed.train.rows.lengths.mean()) * rows_a_step
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"tokens_per_second": tokens / statistics.median(clock.seconds[2:]), "losses": losses, "attention": attn}


def main() -> None:
    """Run every variant in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if asked.variant:
        print(json.dumps(measure(asked.variant, asked.steps, asked.rows)))
        return
    if not BASE.is_dir():
        sys.exit("run `finetune base smollm2` first")
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
    for _ in range(asked.rounds):
        for variant in VARIANTS:
            words = [
                sys.executable,
                __file__,
                "--variant",
                variant,
                "--steps",
                str(asked.steps),
                "--rows",
                str(asked.rows),
            ]
            done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
            lines = [line for line in done.stdout.splitlines() if line.startswith('{"tokens_per_second"')]
            found[variant].append(json.loads(lines[-1]))
    base = statistics.median(run["tokens_per_second"] for run in found["trl"])
    print(f"{asked.rows} rows a step, {asked.steps} steps, median of {asked.rounds} runs")
    print(f"{'variant':<10} {'attention':<10} {'tokens/s':>9} {'min':>6} {'max':>6} {'x trl':>6}  first and last loss")
    for variant, runs in found.items():
        speeds = [run["tokens_per_second"] for run in runs]
        middle = statistics.median(speeds)
        losses = runs[0]["losses"]
        print(
            f"{variant:<10} {runs[0]['attention']:<10} {middle:>9.0f} {min(speeds):>6.0f} {max(speeds):>6.0f} "
            f"{middle / base:>6.2f}  {losses[0]:.4f} {losses[-1]:.4f}"
        )


if __name__ == "__main__":
    main()
