"""`finetune evaluate`: answers on held-out rows, before and after training, scored and laid side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import DataError, RecipeError
from finetune.lean import hide, import_all, pause_collector
from finetune.recipe.load import load_recipe
from finetune.recipe.sections import ModelOptions, Recipe
from finetune.registry import resolve

if TYPE_CHECKING:
    from finetune.data.questions import Question
    from finetune.model.folder import Base
    from finetune.plan.hardware import Hardware
    from finetune.run.product import Product

SHOWN = 3
# What every evaluation imports sooner or later, and with it nearly all of torch, transformers and PEFT.
STACK = ("finetune.model.answer", "finetune.model.load", "finetune.model.quantise_lora")
Scorer = Callable[[str, str], dict[str, float]]


@dataclass(frozen=True)
class Answered:
    """One model's answers.

    Attributes:
        label: "base", "adapter", "merged" or "model".
        answers: texts, in the questions' order.
        scores: a mapping of figures per row.
        seconds: time taken.
    """

    label: str
    answers: list[str]
    scores: list[dict[str, float]]
    seconds: float

    def means(self) -> dict[str, float]:
        """The mean of each figure over the rows that have it, in the first row's order of figures."""
        names = list(dict.fromkeys(name for row in self.scores for name in row))
        return {
            name: sum(row[name] for row in self.scores if name in row) / sum(name in row for row in self.scores)
            for name in names
        }


def run(
    target: str,
    *,
    recipe: str | None = None,
    limit: int | None = None,
    base: bool = True,
    as_json: bool = False,
    own_process: bool = False,
) -> dict[str, Any]:
    """Score a run, an adapter, a merged model or a base.

    Args:
        target: run, adapter or model folder, or a model id of the hub.
        recipe: the recipe whose evaluate section is used; the run's own by default.
        limit: use only the first so many rows.
        base: for an adapter, answer with the base alone too.
        as_json: the caller prints the returned facts.
        own_process: this process does nothing else, so that it may be set up for a quick start (finetune/lean.py).

    Returns:
        `target`, `rows`, `scores` (label to figure to mean), `seconds` (label to time), `answers` (a few rows), `file`.

    Raises:
        RecipeError: no recipe, or one without `evaluate.data`.
        DataError: held-out rows at fault.
        ExportError: the base changed since the adapter was trained.
    """
    from finetune.run.product import identify
    from finetune.scorers import SCORERS

    product = identify(target)
    chosen = _recipe(product, recipe)
    options = chosen.evaluate
    if not options.data:
        raise RecipeError("evaluate.data: the recipe names no held-out rows; add them, or give --recipe another recipe")
    if own_process:
        _start_lean(product, chosen)
    score: Scorer = resolve("scorer", options.scorer, SCORERS)
    questions, found = _answer(product, chosen, limit or options.limit, base, score, own_process)
    answered = [
        Answered(label, texts, [score(text, q.reference) for text, q in zip(texts, questions, strict=True)], seconds)
        for label, texts, seconds in found
    ]
    facts = _facts(target, questions, answered)
    facts["file"] = str(_write(product, questions, answered, facts))
    if not as_json:
        _draw(questions, answered)
        print(f"all answers: {facts['file']}")
    return facts


def _recipe(product: Product, path: str | None) -> Recipe:
    if path is None and product.recipe is None:
        raise RecipeError("no recipe stands beside it; name one with --recipe, for its evaluate section")
    return load_recipe(path or str(product.recipe)).recipe


def _start_lean(product: Product, recipe: Recipe) -> None:
    """Have the stack import no optional package that these answers do not use."""
    from finetune.model.folder import find
    from finetune.run.needs import needed_of_product

    options = recipe.evaluate.model_dump()
    config = find(product.base).config
    hide(unless=needed_of_product(recipe.model.model_dump(), product.facts, config, options["data"], options["scorer"]))
    pause_collector()


def _answer(
    product: Product, recipe: Recipe, limit: int | None, base_too: bool, score: Scorer, own_process: bool
) -> tuple[list[Question], list[tuple[str, list[str], float]]]:
    """The questions, and each model's answers with the time they took; base first."""
    from finetune.plan.hardware import detect
    from finetune.run.say import quieten

    hardware = detect(recipe.launch.device)
    quieten(hardware.device)
    if own_process:
        import_all(STACK)

    from finetune.data.cache import Cache
    from finetune.data.questions import questions, without_reasoning
    from finetune.model.answer import answers
    from finetune.model.fetch import fetch
    from finetune.model.folder import find
    from finetune.model.load import load_tokenizer, stop_ids
    from finetune.model.tokenizer import as_trained, new_ids, refuse_other_ids
    from finetune.run.product import refuse_other_base

    options = recipe.evaluate
    model_options = as_trained(recipe.model.model_copy(update={"name_or_path": product.base}), product.facts)
    revision = recipe.model.revision if product.base == recipe.model.name_or_path else None
    base = fetch(
        find(product.base),
        revision,
        recipe.model.trust_remote_code,
        quantization=model_options.quantization,
    )
    known = Cache(recipe.data.cache_dir).file_hashes
    refuse_other_base(product, base.name, base.weights, base.folder, known)
    tokenizer = load_tokenizer(model_options, base)
    added = new_ids(model_options, tokenizer)
    refuse_other_ids(product.facts, added)
    stops = stop_ids(tokenizer, base)
    asked = questions(options.data, tokenizer, recipe.data.chat_template, stops, limit)
    _refuse_unscorable(asked, score)
    _say(f"{len(asked)} rows, greedy, at most {options.max_new_tokens} new tokens")
    model = _load(product, model_options, base, hardware, tuple(added.values()))
    found: list[tuple[str, list[str], float]] = []

    def ask(label: str) -> None:
        def progress(done: int, total: int) -> None:
            _say(f"{label:<8} {done}/{total} answered", live=done < total)

        prompts = [question.prompt for question in asked]
        ids, seconds = answers(
            model, prompts, stops, tokenizer.pad_token_id, options.max_new_tokens, options.batch_size, progress
        )
        texts = [without_reasoning(tokenizer.decode(row, skip_special_tokens=True)) for row in ids]
        found.append((label, texts, seconds))

    if product.adapter is not None and base_too:
        with model.disable_adapter():
            ask("base")
    ask(product.label)
    return asked, found


def _refuse_unscorable(asked: Sequence[Question], score: Scorer) -> None:
    """Score each reference against itself, so that rows the scorer cannot take cost no loading and no answers."""
    faults: list[str] = []
    for question in asked:
        try:
            score(question.reference, question.reference)
        except DataError as error:
            faults.append(f"{question.place}: {error}")
    if faults:
        more = f"\nand {len(faults) - SHOWN} more rows like these" if len(faults) > SHOWN else ""
        raise DataError("\n".join(faults[:SHOWN]) + more)


def _say(line: str, live: bool = False) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{line}", end="" if live else "\n", file=sys.stderr, flush=True)
    elif not live:
        print(line, file=sys.stderr, flush=True)


def _load(product: Product, options: ModelOptions, base: Base, hardware: Hardware, added: tuple[int, ...]) -> Any:
    """The model that answers, as a server holds it: adapter and base in one precision, with rows for new tokens."""
    import torch

    from finetune.model.embeddings import give_rows
    from finetune.model.load import held_as, load_base
    from finetune.model.quantise_lora import open_adapter
    from finetune.plan.hardware import compute_dtype

    compute = compute_dtype(options.dtype, hardware)
    held = product.facts.get("quantization") or {}
    options = options.model_copy(update={"quantization": held.get("kind", "none")})
    kept = held_as(held, compute)
    place = None if hardware.device == "cpu" else torch.device(hardware.device)
    attn = "sdpa" if options.attn_implementation == "auto" else options.attn_implementation
    model: Any = load_base(options, base, kept, attn, place)
    give_rows(model, added)
    if product.adapter is not None:
        model = open_adapter(model, product.adapter)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(getattr(torch, compute))
    return model


def _facts(target: str, questions: Sequence[Question], answered: Sequence[Answered]) -> dict[str, Any]:
    some = [
        {
            "place": question.place,
            "question": question.shown,
            "reference": question.reference,
            **{one.label: one.answers[number] for one in answered},
        }
        for number, question in enumerate(questions[:SHOWN])
    ]
    return {
        "target": target,
        "rows": len(questions),
        "scores": {one.label: one.means() for one in answered},
        "seconds": {one.label: round(one.seconds, 1) for one in answered},
        "answers": some,
    }


def _write(
    product: Product, questions: Sequence[Question], answered: Sequence[Answered], facts: dict[str, Any]
) -> Path:
    """Every answer with its score, in the run's folder or beside the model."""
    from finetune.files import write_json

    rows = [
        {
            "place": question.place,
            "reference": question.reference,
            **{one.label: {"answer": one.answers[n], "scores": one.scores[n]} for one in answered},
        }
        for n, question in enumerate(questions)
    ]
    path = product.folder / ("evaluation.json" if product.adapter else f"evaluation-{product.label}.json")
    write_json(path, {key: facts[key] for key in ("target", "rows", "scores", "seconds")} | {"answers": rows})
    return path


def _draw(questions: Sequence[Question], answered: Sequence[Answered]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=f"{len(questions)} held-out rows")
    table.add_column("")
    means = {one.label: one.means() for one in answered}
    for label in means:
        table.add_column(label, justify="right")
    for name in dict.fromkeys(name for row in means.values() for name in row):
        cells = [f"{row[name]:.2f}" if name in row else "" for row in means.values()]
        table.add_row(name.replace("_", " "), *cells, style="bold" if name == "exact_match" else "")
    console.print(table)
    for number, question in enumerate(questions[:SHOWN]):
        rows = Table(show_header=False, title=question.place, title_justify="left")
        rows.add_column(style="dim")
        rows.add_column(overflow="fold")
        rows.add_row("question", Text(question.shown))
        rows.add_row("reference", Text(question.reference))
        for one in answered:
            right = one.scores[number].get("exact_match") == 1.0
            rows.add_row(one.label, Text(one.answers[number], style="green" if right else "red"))
        console.print(rows)
