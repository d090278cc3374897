"""What a save costs the training loop, beside the stock Trainer's save of the same state.

    python benchmarks/checkpoint.py                  # a few minutes on two CPU cores
    python benchmarks/checkpoint.py --r 64 --rounds 1
    python benchmarks/checkpoint.py --mode zero2     # two processes; stock is DeepSpeed's own save then

A random Llama of 9 million parameters, LoRA of rank `--r` on all linear layers, `--steps` steps with a save every
`--every`. All variants run the same loop, finetune's, on the same rows (data/tickets); they differ in the saves alone:

    none     no saves
    stock    transformers' own `_save_checkpoint` into the same file system: pickled, in place, not fsynced
    ours     finetune's: copied, then hashed, fsynced and opened again beside the training

`blocked` is the time that the loop stands in a save, and after the following steps to ask how far it is, the median
over saves; with `--mode` that of rank 0. And `CPU` is how much of it its thread
computes, which is the better figure on a busy machine. `lost` is what the whole loop takes longer than without saves,
for each save: it also holds what the writing takes from the training's share of the cores and the disk. `hash`, `fsync`
and `write` are milliseconds of the thread that writes, for each save. Variants take turns, so that a machine whose
speed drifts treats all alike; quote ratios.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from finetune.run.launch import free_port

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "tests" / "tokenizers" / "chatml"
VARIANTS = ("none", "stock", "ours")
BATCH = 1


def make_base(folder: Path) -> None:
    """Write the random base."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True, **special,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(variant: str, folder: Path, r: int, steps: int, every: int, mode: str) -> dict[str, Any]:
    """One run in this process."""
    import shutil

    import torch
    from transformers import Trainer as Stock

    import finetune.run.trainer as module
    from finetune import files
    from finetune.train import run

    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    spent = {"hash": 0.0, "fsync": 0.0, "write": 0.0}
    blocked: list[float] = []
    computed: list[float] = []
    loop: list[float] = []
    ours = module.Trainer

    class Timed(ours):  # type: ignore[misc, valid-type]
        def train(self, *arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            outcome = super().train(*arguments, **named)
            loop.append(time.perf_counter() - began)
            return outcome

        def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
            began, computing = time.perf_counter(), time.thread_time()
            if variant == "stock":
                Stock._save_checkpoint(self, model, trial)
            elif variant == "ours":
                super()._save_checkpoint(model, trial)
            blocked.append(time.perf_counter() - began)
            computed.append(time.thread_time() - computing)

    if variant == "stock":
        Timed._get_output_dir = lambda self, trial=None: str(self.folder.checkpoints)  # type: ignore[attr-defined]
    after_step = module.Saver.on_step_end

    def asked(self: Any, *arguments: Any, **named: Any) -> None:
        began, computing = time.perf_counter(), time.thread_time()
        after_step(self, *arguments, **named)
        if blocked:
            blocked[-1] += time.perf_counter() - began
            computed[-1] += time.thread_time() - computing

    module.Saver.on_step_end = asked  # type: ignore[method-assign]
    if variant != "ours":
        module.Saver.on_step_end = lambda *arguments, **named: None  # type: ignore[method-assign]
        module.Saver.insist = lambda *arguments: None  # type: ignore[method-assign]
    module.Trainer = Timed  # type: ignore[misc]
    _time_parts(files, spent)
    recipe = {
        "model": {"name_or_path": str(folder / "base"), "dtype": "float32"},
        "adapter": {"r": r, "lora_alpha": r},
        "data": {"train": str(ROOT / "data" / "tickets" / "train.jsonl"), "max_length": 512},
        "training": {
            "max_steps": steps, "num_train_epochs": 1000, "global_batch_size": BATCH * ranks, "save_steps": every,
            "warmup_steps": 0,
        },
        "launch": {"device": "cpu", **({"config": mode} if mode != "one" else {})},
        "output_dir": str(folder / variant),
    }  # fmt: skip
    path = folder / f"recipe-{os.environ.get('RANK', 0)}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run(str(path), [], overwrite=True, as_json=True)
    if os.environ.get("RANK", "0") != "0":
        return {}
    newest = sorted((folder / variant / "checkpoints").glob("checkpoint-*"))
    size = sum(path.stat().st_size for path in newest[-1].rglob("*") if path.is_file()) if newest else 0
    shutil.rmtree(folder / variant)
    middle = slice(1, -1)  # the first finds cold caches
    return {
        "variant": variant, "loop": loop[0], "blocked": statistics.median(blocked[middle]),
        "computed": statistics.median(computed[middle]), "bytes": size,
        "saves": len(blocked), **{name: seconds / max(1, len(blocked)) for name, seconds in spent.items()},
    }  # fmt: skip


def _time_parts(files: Any, spent: dict[str, float]) -> None:
    """Count the seconds in hashing and in fsync, and in all of a file's writing."""
    true_fsync, true_write, true_sha = os.fsync, files.write_hashed, hashlib.sha256

    class Timed:
        def __init__(self) -> None:
            self._hash = true_sha()

        def update(self, chunk: Any) -> None:
            began = time.perf_counter()
            self._hash.update(chunk)
            spent["hash"] += time.perf_counter() - began

        def hexdigest(self) -> str:
            return self._hash.hexdigest()

    def fsync(descriptor: Any) -> None:
        began = time.perf_counter()
        true_fsync(descriptor)
        spent["fsync"] += time.perf_counter() - began

    def write_hashed(path: Path, chunks: Any) -> Any:
        began = time.perf_counter()
        files.hashlib.sha256 = Timed
        try:
            return true_write(path, chunks)
        finally:
            files.hashlib.sha256 = true_sha
            spent["write"] += time.perf_counter() - began

    import finetune.run.checkpoint as checkpoint
    import finetune.run.checkpoint_tree as tree

    os.fsync = fsync
    checkpoint.write_hashed = tree.write_hashed = write_hashed  # type: ignore[attr-defined]


def child(variant: str, folder: str, given: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own, or in two with a mode; what rank 0 measured."""
    words = [sys.executable, __file__, "--child", variant, folder, "--r", str(given.r), "--mode", given.mode]
    words += ["--steps", str(given.steps), "--every", str(given.every)]
    count = 1 if given.mode == "one" else 2
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    started = [
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | ({**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}),
        )
        for rank in range(count)
    ]  # fmt: skip
    with ThreadPoolExecutor() as pool:  # a pipe that nobody reads would stop its process, and that the other
        outputs = list(pool.map(lambda process: process.communicate(), started))
    for process, (_, errors) in zip(started, outputs, strict=True):
        if process.returncode:
            sys.exit(errors)
    found: dict[str, Any] = json.loads(outputs[0][0].splitlines()[-1])
    return found


def main() -> None:
    """Measure all variants in turn and print a table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--r", type=int, default=256)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--every", type=int, default=10)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--mode", choices=("one", "zero1", "zero2", "zero3"), default="one")
    options.add_argument("--child", nargs=2, metavar=("VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.steps < 3 * given.every:
        options.error("--steps: at least three times --every, for the first and the last save are left out")
    if given.child:
        variant, folder = given.child[0], Path(given.child[1])
        print(json.dumps(measure(variant, folder, given.r, given.steps, given.every, given.mode)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_base(folder / "base")
        found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
        for _ in range(given.rounds):
            for variant in VARIANTS:
                found[variant].append(child(variant, temporary, given))
                print(found[variant][-1], file=sys.stderr)
    print(
        "| saves | state, MB | loop, s | blocked, ms a save | CPU, ms a save | lost, ms a save | hash | fsync | write |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    middle = {
        variant: {key: statistics.median(one[key] for one in runs) for key in runs[0] if key != "variant"}
        for variant, runs in found.items()
    }
    for variant, one in middle.items():
        lost = (one["loop"] - middle["none"]["loop"]) / one["saves"] * 1000 if one["bytes"] else 0
        parts = " | ".join(f"{one[part] * 1000:.0f}" for part in ("hash", "fsync", "write"))
        figures = f"{one['bytes'] / 1e6:.0f} | {one['loop']:.2f} | {one['blocked'] * 1000:.1f} | "
        figures += f"{one['computed'] * 1000:.1f} | {lost:.0f}"
        print(f"| {variant} | {figures} | {parts} |")


if __name__ == "__main__":
    main()
