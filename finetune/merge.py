"""`finetune merge`: fold an adapter into its base, reload the result from disk, and compare it with base plus adapter.

The folder appears under its name only when the proof holds.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ExportError, RecipeError, RefusedError
from finetune.lean import hide, import_all, pause_collector
from finetune.recipe.load import load_recipe
from finetune.recipe.sections import ExportOptions, ModelOptions

if TYPE_CHECKING:
    from finetune.model.folder import Base
    from finetune.run.product import Product

# A merged weight is rounded once to the output's precision. What that rounding may cost, as a share of what the adapter
# does: mean divergence from base + adapter, over mean divergence of base + adapter from the base.
LARGEST_LOSS = 0.05
# Share of an update that float32 loses at most; more than that tells of a coarser precision, also where `auto` took it.
OF_FLOAT32 = 1e-6
# What every merge imports sooner or later, and with it nearly all of torch, transformers and PEFT.
STACK = ("finetune.model.merge", "finetune.model.load", "finetune.model.quantise_lora")
DTYPES = ("auto", "bfloat16", "float16", "float32")


def run(
    target: str,
    *,
    output: str | None = None,
    dtype: str | None = None,
    verify: bool = True,
    as_json: bool = False,
    own_process: bool = False,
) -> dict[str, Any]:
    """Merge a run's adapter, or an adapter folder.

    Args:
        target: run or adapter folder.
        output: where to; `merged` beside the adapter by default. Must not exist.
        dtype: precision of the merged weights; the recipe's export.dtype by default.
        verify: reload and compare; without it the result is called unproved.
        as_json: the caller prints the returned facts.
        own_process: this process does nothing else, so that it may be set up for a quick start (finetune/lean.py).

    Returns:
        `output`, `proved`, the merge's report, and with `verify` the proof.

    Raises:
        ExportError: the adapter does not fit the base, or the proof fails; nothing is left behind then.
        RefusedError: the output exists, or lies in the adapter.
        RecipeError: the output or the precision is no name of one.
    """
    from finetune.files import staged_folder, write_json
    from finetune.model.folder import find
    from finetune.run.needs import needed_of_product
    from finetune.run.product import identify, refuse_other_base
    from finetune.run.say import quieten

    started = time.monotonic()
    product = identify(target)
    if product.adapter is None:
        raise RefusedError(f"{target}: holds whole weights already, so there is nothing to merge")
    options, recipe_model, cache = _options(product)
    chosen = _dtype(dtype, options)
    folder = _output(output, product.adapter)
    found = find(product.base)
    if own_process:
        pause_collector()
        hide(unless=needed_of_product(recipe_model.model_dump(), product.facts, found.config))
    quieten("cpu")
    if own_process:
        import_all(STACK)

    from finetune.data.cache import Cache
    from finetune.exports import EXPORTS
    from finetune.model.fetch import fetch
    from finetune.model.tokenizer import as_trained
    from finetune.registry import resolve

    model = as_trained(recipe_model, product.facts)
    base = fetch(found, model.revision, model.trust_remote_code, quantization="none")
    refuse_other_base(product, base.name, base.weights, base.folder, Cache(cache).file_hashes)
    tokenizer_from = product.adapter if (product.adapter / "tokenizer_config.json").is_file() else None
    named = (product.facts.get("base") or {}).get("name") or base.name  # as the recipe says it, not where it was found
    with staged_folder(folder, {"merged_from": {"base": named, "adapter": product.adapter.name}}) as staging:
        report = resolve("export", "merged", EXPORTS)(
            base, product.adapter, staging, chosen, options.max_shard_size, _card(product, base), product.facts,
            tokenizer_from, model,
        )  # fmt: skip
        _say(f"merged   {report['merged_tensors']} tensors, {report['copied_tensors']} copied; "
             f"{report['kept_of_update']:.2%} of the update survives rounding"
             + (f"; dequantised from {report['dequantised_from']}" if report["dequantised_from"] else ""))  # fmt: skip
        proof: dict[str, Any] = {}
        if verify:
            proof = prove(product, base, model, staging, report["vocabulary"])
            _refuse_unproved(proof, chosen, report)
            write_json(staging / "proof.json", {**proof, "merge": report})
    facts = {"output": str(folder), "proved": verify, **report, "seconds": round(time.monotonic() - started, 1)}
    if verify:
        facts["proof"] = proof
    if not as_json:
        _say_done(facts)
    return facts


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options(product: Product) -> tuple[ExportOptions, ModelOptions, str | None]:
    """Export and model sections of the recipe beside the adapter and its cache, or their defaults."""
    if product.recipe is None:
        return ExportOptions(), ModelOptions(name_or_path=product.base), None
    recipe = load_recipe(product.recipe).recipe
    return recipe.export, recipe.model, recipe.data.cache_dir


def _output(asked: str | None, adapter: Path) -> Path:
    """The folder to make."""
    if asked is not None and not asked.strip():
        raise RecipeError("--output: is empty; name a folder to make, or leave it out for `merged` beside the adapter")
    folder = adapter.parent / "merged" if asked is None else Path(asked)
    if os.path.lexists(folder):
        raise RefusedError(f"{folder} exists already; remove it, or choose another place with --output")
    if folder.resolve().is_relative_to(adapter.resolve()):
        raise RefusedError(f"{folder} lies in the adapter's own folder {adapter}; choose another place with --output")
    return folder


def _dtype(asked: str | None, options: ExportOptions) -> str:
    if asked is None:
        return options.dtype
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    name = short.get(asked, asked)
    if name not in DTYPES:
        raise RecipeError(f"--dtype: {asked!r} is no precision; choose one of {', '.join((*DTYPES, *short))}")
    return name


def _card(product: Product, base: Base) -> str:
    """The adapter's card, retold for whole weights."""
    from finetune.model.auto import class_name
    from finetune.run.card import CardFacts, base_facts, card
    from finetune.run.folder import read_json
    from finetune.run.record import versions

    name, licence = base_facts(product.base, base.folder)
    record = read_json(product.folder / "run.json")
    trained = ((record.get("data") or {}).get("train") or {}).get("sources") or []
    facts = CardFacts(
        title=f"{product.folder.resolve().name}, merged",
        base=name,
        licence=licence,
        method="A LoRA adapter folded into the weights",
        data=tuple(Path(str(source.get("name", ""))).name for source in trained) or ("data its adapter's card names",),
        figures={"trained tokens": record["data"]["train"]["trained_tokens"]} if trained else {},
        versions={key: value for key, value in versions().items() if key in ("finetune", "torch", "safetensors")},
        library="transformers",
        loads=class_name(base.model_type),
    )
    return card(facts)


def prove(product: Product, base: Base, options: ModelOptions, merged: Path, vocabulary: int = 0) -> dict[str, Any]:
    """Compare the merged weights, reloaded from disk, with base plus adapter, in float32 on the CPU.

    Args:
        product: the adapter.
        base: its base.
        options: the model section of its recipe.
        merged: the merged folder.
        vocabulary: rows of the embeddings where the adapter makes them longer, else 0.

    Returns:
        `effect`: how far the adapter moves the base; `gap`: how far the merged model is from base plus adapter; `loss`:
        the share of the effect that the merge lost; `probe`: which rows were compared.
    """
    from finetune.model.folder import check
    from finetune.model.load import held_as, load_base, load_tokenizer
    from finetune.model.probe import gap, logits_of, probe_rows
    from finetune.model.quantise_lora import open_adapter
    from finetune.model.tokenizer import new_ids, refuse_other_ids
    from finetune.run.folder import RunFolder

    assert product.adapter is not None, "only adapters are merged"
    held = product.facts.get("quantization") or {}
    as_trained = options.model_copy(update={"quantization": held.get("kind", "none")})
    file = RunFolder(product.folder).probe
    own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    tokenizer = load_tokenizer(options, base)
    refuse_other_ids(product.facts, new_ids(options, tokenizer))
    rows = probe_rows(own, lambda text: list(tokenizer(text)["input_ids"]))
    plain = load_base(as_trained, base, held_as(held, "float32"), "eager")
    if vocabulary:  # the adapter holds the new rows
        plain.resize_token_embeddings(vocabulary, mean_resizing=False)
    model = open_adapter(plain, product.adapter)
    with_adapter = logits_of(model, rows)
    with model.disable_adapter():
        without = logits_of(model, rows)
    del model, plain
    plainly = options.model_copy(update={"quantization": "none"})
    whole = load_base(plainly, check(str(merged), merged), held_as({}, "float32"), "eager")
    after = logits_of(whole, rows)
    effect, distance = gap(with_adapter, without), gap(with_adapter, after)
    return {
        "effect": effect.facts(),
        "gap": distance.facts(),
        "loss": distance.mean_kl / effect.mean_kl if effect.mean_kl else float("inf"),
        "probe": "rows of the run" if own else "built-in texts",
        "rows": len(rows),
    }


def _refuse_unproved(proof: dict[str, Any], dtype: str, report: dict[str, Any]) -> None:
    effect, distance = proof["effect"], proof["gap"]
    if not all(math.isfinite(value) for value in (effect["mean_kl"], distance["mean_kl"], distance["max_logit"])):
        raise ExportError(
            "base plus adapter, or the merged model, answers with NaN or infinite logits on the probe rows"
        )
    if effect["mean_kl"] == 0:
        raise ExportError("the adapter changes nothing on the probe rows, so the merged model would equal the base")
    if proof["loss"] > LARGEST_LOSS:
        lost = 1 - report["kept_of_update"]
        raise ExportError(
            f"the merged model does not answer like base plus adapter: mean divergence {distance['mean_kl']:.3g} nats "
            f"where the adapter moves the base by {effect['mean_kl']:.3g} ({proof['loss']:.1%} of it; at most "
            f"{LARGEST_LOSS:.0%} is allowed). "
            + (f"{max(lost, 0.0):.1%} of the update was lost to rounding to {dtype}; merge with --dtype float32, or "
               "serve the adapter itself" if dtype != "float32" and abs(lost) > OF_FLOAT32 else
               "Nothing of the update was lost to rounding, so no other --dtype helps; serve the adapter itself")
        )  # fmt: skip


def _say_done(facts: dict[str, Any]) -> None:
    print(f"{facts['output']}: {facts['bytes'] / 1e6:,.0f} MB in {len(facts['files'])} file(s), {facts['seconds']} s")
    if not facts["proved"]:
        print("not proved: --no-verify skipped the comparison with base plus adapter")
        return
    proof = facts["proof"]
    print(
        f"proved: reloaded from disk, mean divergence from base + adapter {proof['gap']['mean_kl']:.2e} nats where the "
        f"adapter moves the base by {proof['effect']['mean_kl']:.2e}; same first choice at {proof['gap']['top1']:.1%} "
        f"of {proof['gap']['positions']} positions"
    )
    print(f"next: finetune evaluate {shlex.quote(facts['output'])}")
