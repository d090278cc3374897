"""Preparing chats for training, beside TRL's own preparation: tokens per CPU-second and peak memory, part by part.

    python benchmarks/data.py                        # 50,000 rows: some minutes, most of them TRL's
    python benchmarks/data.py --rows 4000 --rounds 1

Both read the same JSON lines (benchmarks/chats.py), render them with the same chat template (Qwen 2.5's), encode them
with the same tokenizer (Qwen's vocabulary, 151,000 tokens), train the assistant's turns alone and pack into sequences
of 2,048 tokens, best fit decreasing. One thread. TRL's figure is that of `SFTTrainer(...)` with its data set read by
`datasets` and its model a toy. On both sides the clock starts when imports are made and the tokenizer is loaded; what
loading ours costs (the Hugging Face tokenizer and fastokens) is told apart.

Variants:
    trl         TRL's SFTTrainer, assistant_only_loss, packing bfd
    fast        ours, with fastokens
    reference   ours, with the Hugging Face tokenizer alone
    again       ours, a second start: rows and tokenizer are in the cache
    stream      ours, until the first batch of 16 rows when rows are prepared while training
    bare        the tokenizer alone, on texts rendered beforehand: fastokens and Hugging Face's

Each variant runs in a process of its own, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT)]
MAX_LENGTH = 2048
VARIANTS = ("trl", "fast", "reference", "again", "stream", "bare")
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MKL_NUM_THREADS": "1",
}
STOPS = frozenset({151643, 151645})


def cpu() -> float:
    """CPU-seconds of this process and of those it waited for."""
    return sum(
        use.ru_utime + use.ru_stime
        for use in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def peak() -> float:
    """MiB of the largest resident set so far, of this process or of one it waited for."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024


def trl(rows: Path, tokenizer_folder: Path, work: Path) -> dict[str, Any]:
    """TRL's preparation."""
    import datasets
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1,
        )
    )  # fmt: skip
    datasets.disable_progress_bars()
    before = cpu()
    loaded = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(work / "hf"))
    arguments = SFTConfig(
        output_dir=str(work / "out"), assistant_only_loss=True, packing=True, packing_strategy="bfd",
        max_length=MAX_LENGTH, report_to=[], use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=loaded, processing_class=tokenizer)
    spent = cpu() - before
    packed = trainer.train_dataset
    tokens = sum(len(ids) for ids in packed["input_ids"])
    masks = packed["assistant_masks"] if "assistant_masks" in packed.column_names else packed["labels"]
    return {"cpu": spent, "tokens": tokens, "bins": len(packed), "memory": peak(), "masks": len(masks)}


def loaded(folder: Path) -> Any:
    """The vocabulary, by a process without torch."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    from transformers import AutoTokenizer

    from finetune.data.tokenizer import Vocabulary

    return Vocabulary.of(AutoTokenizer.from_pretrained(folder))


def _settings(tokenizer_folder: Path, rows: Path, cache: Any, fast: bool) -> Any:
    from finetune.data.engine import Settings
    from finetune.data.vocabulary import load
    from finetune.recipe.sections import DataOptions

    def make() -> Any:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # as `finetune data prepare` does
            return pool.submit(loaded, tokenizer_folder).result()

    options = DataOptions.model_validate(
        {"train": str(rows), "max_length": MAX_LENGTH, "on_long_row": "truncate", "packing": True, "num_proc": 1}
    )
    vocabulary = load(tokenizer_folder, cache, make)
    return Settings(vocabulary if fast else vocabulary.without_fast(), STOPS, options)


def ours(rows: Path, tokenizer_folder: Path, work: Path, fast: bool, again: bool = False) -> dict[str, Any]:
    """Our preparation; of a second start, all of it."""
    from finetune.data.cache import Cache
    from finetune.data.gather import gather
    from finetune.data.pack import best_fit

    cache = Cache(work / "cache")
    before = cpu()
    settings = _settings(tokenizer_folder, rows, cache, fast)
    if not again:
        settings.vocabulary.encoder.expect(rows.stat().st_size)
    loaded = cpu()
    train, _ = gather(settings, cache, 42)
    gathered = cpu()
    units = best_fit(train.rows.lengths, MAX_LENGTH)
    packed = cpu()
    spent = packed - (before if again else loaded)
    return {
        "cpu": spent, "tokens": train.rows.tokens, "bins": len(units), "memory": peak(),
        "parts": {"tokenizer": loaded - before, "rows": gathered - loaded, "packing": packed - gathered},
        "fingerprint": train.fingerprint,
    }  # fmt: skip


def parts(rows: Path, tokenizer_folder: Path, work: Path) -> dict[str, Any]:
    """What each part of the fast path costs by itself, in CPU-seconds, over all rows."""
    from finetune.data.cache import Cache
    from finetune.data.engine import Engine
    from finetune.data.examples import Located, layout_of, piece_examples
    from finetune.data.read import pieces, read
    from finetune.data.rows import RowsWriter

    cache = Cache(work / "cache")
    settings = _settings(tokenizer_folder, rows, cache, True)
    source = settings.options.train[0]
    found: dict[str, Any] = {}
    began = cpu()
    for _ in read(source):
        pass
    found["reading JSON"] = cpu() - began
    layout = layout_of(source)
    began = cpu()
    located = [item for piece in pieces(source) for item in piece_examples(piece, source, layout)]
    found["reading and checking"] = cpu() - began
    engine = Engine(settings)
    began = cpu()
    engine.settings.vocabulary.encoder.expect(10**9)
    found["loading both encoders"] = cpu() - began
    began = cpu()
    chunks = [
        engine.chunk([i for i in located[at : at + 512] if isinstance(i, Located)])
        for at in range(0, len(located), 512)
    ]
    found["rendering, encoding, masks"] = cpu() - began
    folder = work / "written"
    folder.mkdir(exist_ok=True)
    began = cpu()
    with RowsWriter(folder) as writer:
        for chunk in chunks:
            if chunk.block is not None:
                writer.add(chunk.block)
    found["writing"] = cpu() - began
    return found


def bare(rows: Path, tokenizer_folder: Path, work: Path) -> dict[str, Any]:
    """The tokenizers by themselves, on whole rendered chats."""
    import fastokens
    import jinja2
    import tokenizers

    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        (tokenizer_folder / "chat_template.jinja").read_text(encoding="utf-8")
    )
    with open(rows, encoding="utf-8") as stream:
        texts = [template.render(messages=json.loads(line)["messages"], tools=None) for line in stream]
    file = str(tokenizer_folder / "tokenizer.json")
    reference, fast = tokenizers.Tokenizer.from_file(file), fastokens.Tokenizer.from_file(file)
    began = cpu()
    tokens = 0
    for at in range(0, len(texts), 512):
        tokens += sum(
            len(one.ids) for one in reference.encode_batch_fast(texts[at : at + 512], add_special_tokens=False)
        )
    middle = cpu()
    for at in range(0, len(texts), 512):
        fast.encode_batch_flat(texts[at : at + 512])
    return {
        "cpu": middle - began, "tokens": tokens, "memory": peak(), "fast_cpu": cpu() - middle,
        "parts": parts(rows, tokenizer_folder, work),
    }  # fmt: skip


def stream(rows: Path, tokenizer_folder: Path, work: Path) -> dict[str, Any]:
    """Seconds until the first batch of 16 rows is there when rows are prepared while training."""
    from finetune.data.cache import Cache
    from finetune.data.engine import Engine
    from finetune.data.examples import Located, examples

    settings = _settings(tokenizer_folder, rows, Cache(work / "cache"), True)
    began, wall = cpu(), time.monotonic()
    engine = Engine(settings)
    first: list[Any] = []
    for item in examples(settings.options.train[0], streaming=True):
        if isinstance(item, Located):
            first.append(item)
        if len(first) == 16:
            break
    tokens = engine.chunk(first).report.tokens
    return {"cpu": cpu() - began, "tokens": tokens, "memory": peak(), "wall": time.monotonic() - wall}


def child(variant: str, rows: Path, tokenizer_folder: Path, work: Path) -> None:
    """Run one variant in this process and print what it found."""
    run = {
        "trl": trl,
        "fast": lambda *places: ours(*places, fast=True),
        "reference": lambda *places: ours(*places, fast=False),
        "again": lambda *places: ours(*places, fast=True, again=True),
        "stream": stream,
        "bare": bare,
    }[variant]
    print("RESULT " + json.dumps(run(rows, tokenizer_folder, work)))


def measure(variant: str, rows: Path, tokenizer_folder: Path, work: Path) -> dict[str, Any]:
    """Run one variant in a process of its own."""
    words = [sys.executable, __file__, "--child", variant, str(rows), str(tokenizer_folder), str(work)]
    environment = {**os.environ, **ONE_THREAD, "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"{variant} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def main() -> None:
    """Measure all variants and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", nargs=4, metavar=("VARIANT", "ROWS", "TOKENIZER", "WORK"))
    words = parser.parse_args()
    if words.child:
        child(words.child[0], *map(Path, words.child[1:]))
        return
    import chats
    import vocabularies

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        rows = work / "rows.jsonl"
        chats.write(rows, words.rows, 0)
        folder = vocabularies.qwen(work / "qwen", template=vocabularies.trl_template("qwen2_5"))
        found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
        for number in range(words.rounds):
            for variant in VARIANTS:
                place = work / f"{number}-{'fast' if variant in ('again', 'stream', 'bare') else variant}"
                place.mkdir(exist_ok=True)
                found[variant].append(measure(variant, rows, folder, place))
                print(f"round {number + 1} {variant}: {found[variant][-1]}", file=sys.stderr, flush=True)
        _table(found, rows)


def _table(found: dict[str, list[dict[str, Any]]], rows: Path) -> None:
    fastest = {name: min(results, key=lambda one: one["cpu"]) for name, results in found.items()}
    base = fastest["trl"]
    rate = base["tokens"] / base["cpu"]
    print(f"\n{rows.stat().st_size / 1e6:.0f} MB of chats, {base['tokens']:,} tokens with TRL\n")
    print("| variant | CPU-s | tokens/CPU-s | times TRL | peak MiB | sequences |\n|---|---|---|---|---|---|")
    for name in ("trl", "fast", "reference", "again"):
        one = fastest[name]
        speed = one["tokens"] / one["cpu"]
        print(
            f"| {name} | {one['cpu']:.2f} | {speed:,.0f} | {speed / rate:.1f} | {one['memory']:.0f} | {one['bins']:,} |"
        )
    tokenizer = fastest["bare"]
    for name, seconds in (("Hugging Face's tokenizer", tokenizer["cpu"]), ("fastokens", tokenizer["fast_cpu"])):
        print(f"| {name}, bare | {seconds:.2f} | {tokenizer['tokens'] / seconds:,.0f} | | | |")
    first = fastest["stream"]
    print(f"\nstreaming: first batch of 16 rows after {first['wall']:.2f} s ({first['cpu']:.2f} CPU-s)")
    same = {one["fingerprint"] for name in ("fast", "reference", "again") for one in found[name]}
    print(f"rows of fast, reference and again: {'the same' if len(same) == 1 else 'DIFFERENT'}")
    total = sum(statistics.median([one["parts"][part] for one in found["bare"]]) for part in tokenizer["parts"])
    print("\n| part of the fast path | CPU-s | share |\n|---|---|---|")
    for part in tokenizer["parts"]:
        seconds = statistics.median([one["parts"][part] for one in found["bare"]])
        print(f"| {part} | {seconds:.2f} | {seconds / total:.0%} |")


if __name__ == "__main__":
    main()
