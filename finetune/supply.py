"""What a run is fed with: the base, fetched, its tokenizer, and the rows of the recipe, prepared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune.preflight import Checked
from finetune.recipe.loaded import LoadedRecipe

if TYPE_CHECKING:
    from finetune.data.cache import Cache
    from finetune.data.engine import Settings
    from finetune.data.feed import Feed
    from finetune.model.folder import Base
    from finetune.ready import Process
    from finetune.recipe.sections import Recipe
    from finetune.run.folder import RunFolder
    from finetune.run.say import Say


@dataclass(frozen=True)
class Supplies:
    """What `supply` has at hand.

    Attributes:
        base: with its folder.
        tokenizer: with the recipe's new tokens.
        settings: how rows were encoded.
        cache: where prepared rows and hashes of files are kept.
        data: the rows, with what ends their trained answers.
    """

    base: Base
    tokenizer: Any
    settings: Settings
    cache: Cache
    data: Feed


def supply(loaded: LoadedRecipe, checked: Checked, process: Process) -> Supplies:
    """Fetch the base, prepare the rows, and say what became of them.

    Raises:
        ModelError: the base is not whole, or of a kind that cannot be trained so.
        DataError: rows are faulty, or no trained answer ends with a stop token.
    """
    from finetune.data import date
    from finetune.data.cache import Cache
    from finetune.data.engine import Settings
    from finetune.data.vocabulary import load
    from finetune.model.fetch import fetch
    from finetune.model.load import load_tokenizer, stop_ids
    from finetune.run.folder import read_json

    recipe, say = loaded.recipe, process.say
    base = fetch(
        checked.base,
        recipe.model.revision,
        recipe.model.trust_remote_code,
        quantization=recipe.model.quantization,
        method=recipe.adapter.method,
    )
    tokenizer = load_tokenizer(recipe.model, base)
    added = (recipe.model.new_tokens, recipe.model.new_special_tokens)
    cache = Cache(recipe.data.cache_dir)
    assert base.folder is not None, "a fetched base has a folder"
    settings = Settings(load(base.folder, cache, lambda: tokenizer, added), stop_ids(tokenizer, base), recipe.data)
    date.keep(None if checked.overwrite else read_json(checked.folder.record).get("date"))
    data = _with_stops(_data(recipe, settings, cache, checked.folder, say), recipe, settings, base, say)
    for number, line in enumerate(data.lines()):
        say("" if number else "data", line)
    removed, freed = cache.prune_daily() if process.launched.is_main else (0, 0)
    if removed:
        say("cache", f"{removed} prepared sources unused for 30 days removed from {cache.root}, {freed / 1e6:.0f} MB")
    return Supplies(base, tokenizer, settings, cache, data)


def _data(recipe: Recipe, settings: Settings, cache: Cache, folder: RunFolder, say: Say) -> Feed:
    """The rows, prepared, or made while they are trained."""
    from finetune.data.feed import feed
    from finetune.data.stream import Length, stream_feed

    training = recipe.training
    if not recipe.data.streaming:
        return feed(settings, recipe.audit, cache, training.seed, lambda line: say("data", line))
    assert training.max_steps is not None, "the recipe is refused without it"
    length = Length(training.max_steps, training.global_batch_size)
    return stream_feed(
        settings, recipe.audit, cache, training.seed, length, folder.quarantine, lambda line: say("data", line)
    )


def _with_stops(data: Feed, recipe: Recipe, settings: Settings, base: Base, say: Say) -> Feed:
    """The rows with what ends their trained answers, which a server must stop at.

    Raises:
        DataError: no trained answer ends with a stop token.
    """
    from finetune.data.stop import stop_contract
    from finetune.model.generation import generation_of

    assert base.folder is not None, "a fetched base has a folder"
    if recipe.data.loss_on == "all":
        return data
    blocks = (block for part in data.train.rows.parts for block in part.blocks())
    generation = generation_of(base.folder)
    contract = stop_contract(blocks, settings.vocabulary, settings.stop_ids, base.config, generation)
    contract.refuse()
    for fault in contract.faults(adapter=recipe.adapter.method != "none"):
        say("stops", str(fault))
    return replace(data, stops=contract)
