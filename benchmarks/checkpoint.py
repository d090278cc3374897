"""What a save costs the training loop, beside the stock Trainer's save of the same state.

    python benchmarks/checkpoint.py                  # ten minutes on two CPU cores; quote this on a quiet machine
    python benchmarks/checkpoint.py --r 64 --rounds 1
    python benchmarks/checkpoint.py --mode zero2     # two processes; stock is DeepSpeed's own save then

A random Llama of 9 million parameters, LoRA of rank `--r` on all linear layers, `--saves` saves, one every 2 ×
`--every` steps. All variants run the same loop, finetune's, on copies of one row, so that all steps compute the same;
they differ in the saves alone:

    none     no saves
    stock    transformers' own `_save_checkpoint` into the same file system: pickled, in place, not fsynced
    ours     finetune's: copied, then hashed, fsynced and opened again beside the training

`lost` is what the loop loses by a save, whatever the reason: it stands still, it asks how far the save is, the writing
takes its share of the cores and the disk. It is measured in pairs, within a run: the time of the `--every` steps that
begin with a save, less the mean of as many steps before and after them, which have none. Slow drift of the machine
cancels out. Beside the median over the pairs of all rounds stand the bounds between which the true median lies with 95
% confidence, by the order of the pairs alone (a little less, for neighbours share steps). The same figure of the runs
without saves is the noise of the machine, and what is not well beyond that has not been measured. Writes that go on for
longer than `--every` steps are counted, because the steps after them are not free of a save: raise `--every` then.

`blocked` is the time that the loop stands in a save, and after the following steps to ask how far it is, the median
over saves; with `--mode` that of rank 0. `CPU` is how much of it its thread computes, which is the better figure on a
busy machine. Beside it stands what happens once a run: the `probe`, as long as the loop stands still for it, and the
`last wait`, for the final checkpoint. `run` is what the whole loop takes longer than without saves, these two included,
for each save; two runs without saves stand in each round, whose difference is its noise. `hash`, `fsync` and `write`
are milliseconds of the thread that writes, for each write. Variants take turns, forwards and backwards, so that a
machine whose speed drifts treats all alike; quote ratios.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from finetune.run.launch import free_port

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "tests" / "tokenizers" / "chatml"
VARIANTS = ("none", "stock", "ours")
TURNS = ("none", "stock", "ours", "none")  # of a round; the next goes backwards
BATCH = 1
ROWS = 64
FEWEST = 6  # pairs, of which the least and the greatest bound the median with 95 %


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


def make_rows(path: Path) -> None:
    """Write copies of the longest ticket: every step computes the same."""
    lines = (ROOT / "data" / "tickets" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{max(lines, key=len)}\n" for _ in range(ROWS)), encoding="utf-8")


def measure(variant: str, folder: Path, r: int, saves: int, every: int, mode: str) -> dict[str, Any]:
    """One run in this process."""
    import shutil

    import torch
    from transformers import Trainer as Stock

    import finetune.run.trainer as module
    from finetune import files
    from finetune.run.checkpoint_saver import Saver
    from finetune.train import run

    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    spent = {"hash": 0.0, "fsync": 0.0, "write": 0.0}
    blocked: list[float] = []
    computed: list[float] = []
    loop: list[float] = []
    ended: list[float] = []  # seconds of each wait for a write, of which the last is that of the end
    stamps: dict[int, float] = {}  # when the step's own work was done, before a save after it
    probe = late = 0.0
    steps = 2 * every * saves
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
        Timed._get_output_dir = lambda self, trial=None: str(self.folder.checkpoints)
    after_step, finish = Saver.on_step_end, Saver.finish

    def asked(self: Any, args: Any, state: Any, control: Any, **named: Any) -> None:
        nonlocal probe, late
        began, computing = time.perf_counter(), time.thread_time()
        stamps[state.global_step] = began
        if variant != "ours":
            return
        if state.global_step % (2 * every) == every and blocked:
            late += self._writer.busy or self._parts is not None
        after_step(self, args, state, control, **named)
        took = time.perf_counter() - began
        if blocked:
            blocked[-1] += took
            computed[-1] += time.thread_time() - computing
        else:
            probe += took

    def waited(self: Any) -> None:
        began = time.perf_counter()
        finish(self)
        ended.append(time.perf_counter() - began)

    Saver.finish = waited  # type: ignore[method-assign]
    Saver.on_step_end = asked  # type: ignore[method-assign]
    if variant != "ours":
        Saver.insist = lambda *arguments: None  # type: ignore[method-assign]
    module.Trainer = Timed  # type: ignore[misc]
    _time_parts(files, spent)
    recipe = {
        "model": {"name_or_path": str(folder / "base"), "dtype": "float32"},
        "adapter": {"r": r, "lora_alpha": r},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 512},
        "training": {
            "max_steps": steps, "num_train_epochs": 1000, "global_batch_size": BATCH * ranks, "save_steps": 2 * every,
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
    writes = len(blocked) + (variant == "ours")  # the probe is written too
    return {
        "variant": variant, "loop": loop[0], "blocked": statistics.median(blocked[middle]),
        "computed": statistics.median(computed[middle]), "bytes": size, "saves": len(blocked), "probe": probe,
        "last": ended[-1], "late": late, "lost": lost(stamps, every, saves),
        **{name: seconds / writes for name, seconds in spent.items()},
    }  # fmt: skip


def lost(stamps: dict[int, float], every: int, saves: int) -> list[float]:
    """Seconds that the steps after each save took longer than those before it and after them, but for the first and the
    last save.
    """
    found = []
    for step in range(4 * every, 2 * every * saves, 2 * every):
        before, with_save, after = (stamps[at + every] - stamps[at] for at in (step - every, step, step + every))
        found.append(with_save - (before + after) / 2)
    return found


def between(values: list[float]) -> tuple[float, float, float]:
    """Median, and bounds of the true median at 95 %: each value is as likely above it as below, whatever else it is.

    With fewer than six values the bounds are the least and the greatest, and hold with less confidence.
    """
    ordered, count = sorted(values), len(values)
    outside, chance = 0, 0.0
    while 2 * (chance := chance + math.comb(count, outside) / 2**count) <= 0.05:
        outside += 1
    below = max(0, outside - 1)
    return statistics.median(ordered), ordered[below], ordered[count - 1 - below]


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
        if threading.current_thread() is not threading.main_thread():  # which writes the run's other files
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

    os.fsync = fsync  # type: ignore[assignment]
    checkpoint.write_hashed = tree.write_hashed = write_hashed  # type: ignore[attr-defined]


def child(variant: str, folder: str, given: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own, or in two with a mode; what rank 0 measured."""
    words = [sys.executable, __file__, "--child", variant, folder, "--r", str(given.r), "--mode", given.mode]
    words += ["--saves", str(given.saves), "--every", str(given.every)]
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
    options.add_argument("--saves", type=int, default=6)
    options.add_argument("--every", type=int, default=8)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--mode", choices=("one", "zero1", "zero2", "zero3"), default="one")
    options.add_argument("--child", nargs=2, metavar=("VARIANT", "FOLDER"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.saves < 3:
        options.error("--saves: at least three, for the first and the last are left out")
    if given.child:
        variant, folder = given.child[0], Path(given.child[1])
        print(json.dumps(measure(variant, folder, given.r, given.saves, given.every, given.mode)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_base(folder / "base")
        make_rows(folder / "rows.jsonl")
        rounds: list[list[dict[str, Any]]] = []
        for number in range(given.rounds):
            rounds.append([])
            for variant in TURNS if number % 2 == 0 else reversed(TURNS):
                rounds[-1].append(child(variant, temporary, given))
                print(rounds[-1][-1], file=sys.stderr)
    report(rounds)


def report(rounds: list[list[dict[str, Any]]]) -> None:
    """Print the table, how ours compares, and what was not measured."""
    names = ("saves", "state, MB", "lost, ms a save (95 %)", "blocked", "CPU", "probe", "last wait", "run", "hash",
             "fsync", "write")  # fmt: skip
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    told: dict[str, tuple[float, float, float]] = {}
    for variant in VARIANTS:
        runs = [one for turns in rounds for one in turns if one["variant"] == variant]
        told[variant] = between([value for one in runs for value in one["lost"]])

        def middle(key: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.median(one[key] for one in runs)

        longer = statistics.median(_longer(turns, variant) for turns in rounds)
        figures = [
            f"{middle('bytes') / 1e6:.0f}",
            "{:.0f} ({:.0f} to {:.0f})".format(*(1000 * v for v in told[variant])),
        ]
        figures += [f"{1000 * middle(key):.1f}" for key in ("blocked", "computed")]
        figures += [f"{1000 * value:.0f}" for value in (middle("probe"), middle("last"), longer)]
        figures += [f"{1000 * middle(key):.0f}" for key in ("hash", "fsync", "write")]
        print(f"| {variant} | {' | '.join(figures)} |")
    pairs = sum(len(one["lost"]) for turns in rounds for one in turns if one["variant"] == "ours")
    print(f"\n{pairs} pairs of ours, as many of stock, twice as many of none; `run` of none is its noise")
    if late := sum(one["late"] for turns in rounds for one in turns):
        print(f"{late:.0f} writes went on beyond their steps, so that `lost` is too small: raise --every")
    (ours, low, high), (stock, least, most) = told["ours"], told["stock"]
    if pairs < FEWEST:
        print(f"lost: not measured by fewer than {FEWEST} pairs; take more rounds or saves")
    elif least > max(0, told["none"][2]):
        ratio = f"{ours / stock:.2f} of stock's, between {max(0.0, low) / most:.2f} and {high / least:.2f}"
        print(f"lost by ours: {ratio} by the bounds of both")
    else:
        print("lost by stock is not beyond the noise: not measured; take more rounds, or a quieter machine")


def _longer(turns: list[dict[str, Any]], variant: str) -> float:
    """Seconds a save by which a round's run of a variant took longer than those without; of none, how these differ."""
    without = [one["loop"] for one in turns if one["variant"] == "none"]
    saves = turns[0]["saves"]
    if variant == "none":
        return (max(without) - min(without)) / saves
    (its,) = (one["loop"] for one in turns if one["variant"] == variant)
    return (its - statistics.mean(without)) / saves


if __name__ == "__main__":
    main()
