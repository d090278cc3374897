"""From the command to the end of one optimizer step, beside TRL's own `trl sft`: CPU-seconds and peak memory.

    python benchmarks/startup.py                          # 8 and 50,000 rows; needs `finetune base smollm2`
    python benchmarks/startup.py --rows 8 --rounds 1      # a minute

Both train the same rows (benchmarks/chats.py) with the same random Llama of 28 million parameters, LoRA r=16 on all
linear layers, one step of one row, one thread, no tracker, and save the adapter. The loss is on the assistant's
turns alone; the base's chat template holds the `{% generation %}` marks that TRL wants for that. A first start finds
empty caches, a second one what the first has left there.

Variants:
    trl        `trl sft`, which starts its training script through accelerate's launcher
    script     that script alone, `python -m trl.scripts.sft`
    ours       `finetune train`

Variants take turns. CPU-seconds are user and system time of the command and all processes it waited for; memory is the
largest resident set of any one of them. Quote the ratio, not the absolute figure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chats
import yaml

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "data" / "smollm2-135m-instruct"
VARIANTS = ("trl", "script", "ours")
MAX_LENGTH = 1024  # tokens
R = 16
BATCH = 1  # row: the step itself is not what is measured
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Cost:
    """What one start took: CPU-seconds, seconds, and MiB of the largest process."""

    cpu: float
    wall: float
    memory: float


def make_base(folder: Path) -> None:
    """Write the random base; in a child process, so that this one stays small."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = TEMPLATE
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(1)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            **special,
        )
    )
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def command(variant: str, folder: Path, rows: Path) -> list[str]:
    """The words of one start in `folder`, where `base` lies."""
    if variant == "ours":
        recipe: dict[str, Any] = {
            "model": {"name_or_path": str(folder / "base"), "dtype": "float32"},
            "adapter": {"r": R, "lora_alpha": 2 * R},
            "data": {"train": str(rows), "max_length": MAX_LENGTH, "on_long_row": "truncate"},
            "training": {"max_steps": 1, "global_batch_size": BATCH, "warmup_steps": 0},
            "launch": {"device": "cpu"},
            "output_dir": str(folder / "ours"),
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return [sys.executable, "-m", "finetune", "train", str(folder / "recipe.yaml"), "--overwrite"]
    start = [sys.executable, "-m", "trl.scripts.sft"]
    if variant == "trl":
        start = [str(Path(sys.executable).parent / "trl"), "sft"]
    settings = {
        "model_name_or_path": folder / "base",
        "dtype": "float32",
        "dataset_name": rows.parent,
        "max_length": MAX_LENGTH,
        "max_steps": 1,
        "per_device_train_batch_size": BATCH,
        "lora_r": R,
        "lora_alpha": 2 * R,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "output_dir": folder / variant,
    }
    flags = ["--use_cpu", "--use_peft", "--assistant_only_loss", "--lora_target_modules", "all-linear"]
    return [*start, *flags, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def start(words: list[str], caches: Path) -> Cost:
    """Run one command to its end; what it and its processes took."""
    environment = {
        **os.environ,
        "HF_HOME": str(caches / "hf"),
        "XDG_CACHE_HOME": str(caches / "xdg"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=caches)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(words)}\nended with {process.returncode}:\n{output.read()[-3000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, time.monotonic() - began, usage.ru_maxrss / 1024)


def measure(variant: str, folder: Path, rows: Path, starts: int) -> list[Cost]:
    """The first start with empty caches, then the others."""
    caches = folder / "caches"
    shutil.rmtree(caches, ignore_errors=True)
    caches.mkdir()
    words = command(variant, folder, rows)
    found = []
    for _ in range(starts):
        shutil.rmtree(folder / variant, ignore_errors=True)
        found.append(start(words, caches))
    return found


def table(count: int, found: dict[str, list[list[Cost]]], starts: int) -> None:
    """One line a variant and start: medians over the rounds, and the ratio to TRL's script."""
    for number in range(starts):
        reference = statistics.median(costs[number].cpu for costs in found["script"]) if "script" in found else None
        for variant, rounds in found.items():
            costs = [costs[number] for costs in rounds]
            cpu = statistics.median(cost.cpu for cost in costs)
            spread = f"{min(cost.cpu for cost in costs):.1f}-{max(cost.cpu for cost in costs):.1f}"
            ratio = f"{cpu / reference:.3f}" if reference else ""
            print(
                f"{count:>8,} {number + 1:>6} {variant:<8} {cpu:>8.1f} {spread:>13} "
                f"{statistics.median(cost.wall for cost in costs):>8.1f} {max(cost.memory for cost in costs):>8.0f} "
                f"{ratio:>9}",
                flush=True,
            )


def main() -> None:
    """Measure every variant in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 50_000])
    parser.add_argument("--rounds", type=int, default=3, help="of the smallest data set; others are measured once")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--make-base", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make_base:
        make_base(asked.make_base)
        return
    if not TOKENIZER.is_dir():
        sys.exit("run `finetune base smollm2` first")
    with tempfile.TemporaryDirectory(prefix="finetune-startup-") as place:
        folder = Path(place)
        subprocess.run([sys.executable, __file__, "--make-base", str(folder / "base")], check=True, capture_output=True)
        heads = f"{'rows':>8} {'start':>6} {'variant':<8} {'CPU-s':>8} {'range':>13}"
        print(f"{heads} {'seconds':>8} {'MiB':>8} {'x script':>9}", flush=True)
        for count in asked.rows:
            (folder / str(count)).mkdir()
            rows = chats.write(folder / str(count) / "train.jsonl", count)
            rounds = asked.rounds if count == min(asked.rows) else 1
            found: dict[str, list[list[Cost]]] = {variant: [] for variant in asked.variants}
            for _ in range(rounds):
                for variant in asked.variants:
                    found[variant].append(measure(variant, folder, rows, asked.starts))
            table(count, found, asked.starts)


if __name__ == "__main__":
    main()
