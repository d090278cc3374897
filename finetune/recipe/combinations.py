"""What goes together and what does not: one table, which the checks, the documents and the tests all read.

A row is a condition over facts of a run, the verdict, its reason, what to use instead, and the release it was seen on.
Facts are known one after another: a recipe's own as it is read, the launcher's before torch is imported, and what the
layers are once the model is built. `refusals` is asked at each of these three times with what is known by then.

To add a combination add a row, with a recipe that makes it: `docs/adapters.md` shows it (python docs/adapters.py), and
`tests/test_recipe_combinations.py` runs it, refused rows to their message and working rows for two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Known = Literal["recipe", "launch", "model"]
Facts = Mapping[str, frozenset[str]]

FROM_WEIGHTS = ("pissa", "olora")  # starts taken from the weights, which a second, frozen half takes off again
_FIRST_VALUES = (*FROM_WEIGHTS, "loftq")
_SPREAD = ("ZeRO-3", "FSDP")
_AS_PARAMETERS = ("fused experts", "layers named as experts")


@dataclass(frozen=True)
class Combination:
    """One row.

    Attributes:
        when: fact to values; the row holds where every fact has one of its values. Facts and values are those of
            `recipe_facts`, of finetune/run/modes.py for `parallelism`, and of finetune/model/adapt.py for layers.
        works: the verdict.
        why: a clause: why not, or what is to be known about it. `{place}` stands for a layer where one is the cause.
        instead: of a refused row what to write instead.
        key: of a refused row the recipe key that its message stands at.
        known: when the facts are: as the recipe is read, as the launcher is known, or as the model is built.
        seen: release that the verdict was seen on.
        example: recipe keys that make it.
        base: the tiny base of the tests that the example is for.
    """

    when: Mapping[str, tuple[str, ...]]
    works: bool
    why: str
    instead: str = ""
    key: str = ""
    known: Known = "recipe"
    seen: str = "peft 0.21.2"
    example: Mapping[str, Any] = field(default_factory=dict)
    base: str = "llama3"

    def holds(self, facts: Facts) -> bool:
        """Whether the row is about a run of which `facts` are known; what is not known yet is not so."""
        return all(facts.get(name, frozenset()) & set(values) for name, values in self.when.items())

    def message(self, place: str = "") -> str:
        """Why it is refused, and what to write."""
        return f"{self.why.replace('{place}', place)}; {self.instead}"


_PARAMETER = "{place} is adapted as a parameter (fused experts, or a layer that PEFT would take for them)"

TABLE: tuple[Combination, ...] = (
    # -- what is trained -----------------------------------------------------------------------------------------------
    Combination(
        when={"method": ("lora",), "quantization": ("none",)},
        works=True,
        why="the base in model.dtype, the adapter in float32",
    ),
    Combination(
        when={"method": ("lora",), "scale": ("rslora",)},
        works=True,
        why="the scale is alpha / sqrt(r); SGLang 0.5.23 takes alpha / r whatever the adapter says, so serve it merged",
        example={"adapter.use_rslora": True},
    ),
    Combination(
        when={"method": ("dora",), "quantization": ("none",)},
        works=True,
        why="one magnitude more for each output; vLLM 0.32 and SGLang 0.5.23 serve it merged only",
        example={"adapter.method": "dora"},
    ),
    Combination(
        when={"method": ("lora",), "quantization": ("nf4", "int8")},
        works=True,
        why="QLoRA: the merge repeats the quantisation, since the adapter belongs to the quantised base",
        seen="peft 0.21.2, bitsandbytes 0.50.2",
        example={"model.quantization": "nf4"},
    ),
    Combination(
        when={"method": ("dora",), "quantization": ("nf4",)},
        works=True,
        why="QDoRA: the norm of each output is taken of the dequantised weights",
        seen="peft 0.21.2, bitsandbytes 0.50.2",
        example={"model.quantization": "nf4", "adapter.method": "dora"},
    ),
    Combination(
        when={"method": ("none",), "quantization": ("nf4", "int8")},
        works=False,
        key="model.quantization",
        why="quantised weights cannot be trained, as adapter.method: none asks",
        instead="write none or adapter.method: lora",
        seen="bitsandbytes 0.50.2",
        example={"adapter": {"method": "none"}, "model.quantization": "nf4"},
    ),
    Combination(
        when={"method": ("none",), "freeze": ("some",)},
        works=True,
        why="the other weights are trained",
        seen="transformers 5.23",
        example={"adapter": {"method": "none"}, "model.freeze": ["embed_tokens", "layers.0"]},
    ),
    Combination(
        when={"method": ("lora", "dora"), "freeze": ("some",)},
        works=False,
        key="model.freeze",
        why="beside an adapter every weight of the base is frozen already",
        instead="remove it, or write adapter.method: none; layers without an adapter are chosen by "
        "adapter.target_modules and adapter.layers_to_transform",
        example={"model.freeze": ["embed_tokens"]},
    ),
    # -- dropout, experts and layers that PEFT takes for experts -------------------------------------------------------
    Combination(
        when={"dropout": ("above 0",), "adapts": ("layers",)},
        works=True,
        why="the adapter's input is dropped, the base's is not",
        example={"adapter.lora_dropout": 0.1},
    ),
    Combination(
        when={"method": ("lora",), "adapts": ("fused experts",)},
        works=True,
        why="one pair of matrices holds the A and B of all experts; SGLang 0.5.23 serves it merged only",
        known="model",
        base="moe",
    ),
    Combination(
        when={"method": ("lora",), "quantization": ("nf4",), "adapts": _AS_PARAMETERS},
        works=True,
        why="experts are held in 4 bits one by one; plain PEFT cannot add an adapter to them, a merge can",
        known="model",
        seen="peft 0.21.2, bitsandbytes 0.50.2",
        example={"model.quantization": "nf4"},
        base="moe",
    ),
    Combination(
        when={"dropout": ("above 0",), "adapts": _AS_PARAMETERS},
        works=False,
        key="adapter.lora_dropout",
        why=_PARAMETER + ", which has no dropout",
        instead="write lora_dropout: 0, or name other layers",
        known="model",
        example={"adapter.lora_dropout": 0.1},
        base="moe",
    ),
    Combination(
        when={"method": ("dora",), "adapts": _AS_PARAMETERS},
        works=False,
        key="adapter.method",
        why=_PARAMETER + ", which DoRA cannot do",
        instead="write method: lora, or name other layers",
        known="model",
        example={"adapter.method": "dora"},
        base="moe",
    ),
    Combination(
        when={"init": _FIRST_VALUES, "adapts": _AS_PARAMETERS},
        works=False,
        key="adapter.init_lora_weights",
        why=_PARAMETER + ", for which there is no start from the weights",
        instead="write init_lora_weights: true, or name other layers",
        known="model",
        example={"adapter.init_lora_weights": "pissa"},
        base="moe",
    ),
    # -- how the matrices start ----------------------------------------------------------------------------------------
    Combination(
        when={"init": ("gaussian",)},
        works=True,
        why="A is drawn from a normal distribution, B is zero",
        example={"adapter.init_lora_weights": "gaussian"},
    ),
    Combination(
        when={"init": FROM_WEIGHTS, "quantization": ("none",), "method": ("lora",), "scale": ("alpha / r",)},
        works=True,
        why="the saved adapter is plain LoRA of twice r on the base as it is; the base is never changed",
        example={"adapter.init_lora_weights": "pissa_niter_4", "adapter.rank_pattern": {"q_proj": 2}},
    ),
    Combination(
        when={"init": FROM_WEIGHTS, "dropout": ("above 0",), "adapts": ("layers",)},
        works=True,
        why="both halves see the same dropped input, so that the start is the base in training too; the published form "
        "drops a part of the weights with it, so that its losses are others",
        example={"adapter.init_lora_weights": "olora", "adapter.lora_dropout": 0.1},
    ),
    Combination(
        when={"init": FROM_WEIGHTS, "scale": ("rslora",)},
        works=False,
        key="adapter.init_lora_weights",
        why="what is saved has twice the rank, at which rsLoRA's scale would need a lora_alpha that is no whole number",
        instead="write use_rslora: false, and the lora_alpha that gives the scale: alpha / r",
        example={"adapter.init_lora_weights": "olora", "adapter.use_rslora": True},
    ),
    Combination(
        when={"init": ("loftq",), "quantization": ("nf4",), "method": ("lora",)},
        works=True,
        why="the adapter starts as what quantisation has lost; one iteration, so that the base stays plain NF4",
        seen="bitsandbytes 0.50.2",
        example={"adapter.init_lora_weights": "loftq", "model.quantization": "nf4"},
    ),
    Combination(
        when={"init": FROM_WEIGHTS, "quantization": ("nf4", "int8")},
        works=False,
        key="adapter.init_lora_weights",
        why="on a quantised base it would quantise what the start leaves of the weights, a base that no other tool has",
        instead="with nf4 write loftq, or write model.quantization: none",
        example={"adapter.init_lora_weights": "pissa", "model.quantization": "nf4"},
    ),
    Combination(
        when={"init": ("loftq",), "quantization": ("none", "int8")},
        works=False,
        key="adapter.init_lora_weights",
        why="loftq makes up for what nf4 has lost of the weights, and model.quantization is not nf4",
        instead="write model.quantization: nf4, or init_lora_weights: true",
        example={"adapter.init_lora_weights": "loftq"},
    ),
    Combination(
        when={"init": _FIRST_VALUES, "method": ("dora",)},
        works=False,
        key="adapter.init_lora_weights",
        why="DoRA takes its magnitudes from the weights before such a start is made",
        instead="write init_lora_weights: true, or method: lora",
        example={"adapter.init_lora_weights": "olora", "adapter.method": "dora"},
    ),
    Combination(
        when={"init": FROM_WEIGHTS, "decay": ("above 0",)},
        works=False,
        key="training.weight_decay",
        why="half of the matrices hold the start and must not shrink (adapter.init_lora_weights)",
        instead="write weight_decay: 0, or init_lora_weights: true",
        seen="torch 2.13",
        example={"adapter.init_lora_weights": "pissa", "training.weight_decay": 0.1},
    ),
    Combination(
        when={"init": ("eva", "corda", "lora_ga")},
        works=False,
        key="adapter.init_lora_weights",
        why="it needs activations or gradients of the data before training begins, which are not taken here",
        instead="write pissa, olora or true",
        example={"adapter.init_lora_weights": "eva"},
    ),
    Combination(
        when={"init": ("orthogonal",)},
        works=False,
        key="adapter.init_lora_weights",
        why="PEFT makes it in the base's precision, so that on a bfloat16 base it changes what the base says",
        instead="write gaussian or true",
        example={"adapter.init_lora_weights": "orthogonal"},
    ),
    Combination(
        when={"init": ("mica",)},
        works=False,
        key="adapter.init_lora_weights",
        why="it freezes B, whose movement is what shows here that an adapter learns",
        instead="write pissa, olora or true",
        example={"adapter.init_lora_weights": "mica"},
    ),
    Combination(
        when={"init": ("false",)},
        works=False,
        key="adapter.init_lora_weights",
        why="false starts from a random change of the base, which is for tests of PEFT",
        instead="write true",
        example={"adapter.init_lora_weights": False},
    ),
    Combination(
        when={"start": ("earlier adapter",), "init": ("gaussian", *_FIRST_VALUES)},
        works=False,
        key="adapter.init_lora_weights",
        why="with adapter.continue_from the matrices start as that adapter has them",
        instead="remove one of the two",
        example={"adapter.init_lora_weights": "gaussian", "adapter.continue_from": "earlier"},
    ),
    Combination(
        when={"start": ("earlier adapter",), "init": ("true",)},
        works=True,
        why="r, scale, targets and patterns are the adapter's",
        example={"adapter": {"continue_from": "earlier"}},
    ),
    # -- optimizer -----------------------------------------------------------------------------------------------------
    Combination(
        when={"optimizer": ("loraplus",), "method": ("lora", "dora")},
        works=True,
        why="B, and the magnitudes of DoRA, learn loraplus_lr_ratio times faster than A; logs show the rate of A",
        example={"adapter.loraplus_lr_ratio": 8.0, "adapter.method": "dora"},
    ),
    # -- whole modules and rows of the embedding -----------------------------------------------------------------------
    Combination(
        when={"whole": ("modules_to_save", "trainable_token_indices"), "quantization": ("none",)},
        works=True,
        why="saved beside the matrices",
        example={"adapter.modules_to_save": ["lm_head"], "adapter.trainable_token_indices": [5, 6]},
    ),
    Combination(
        when={"whole": ("modules_to_save", "trainable_token_indices"), "quantization": ("nf4", "int8")},
        works=True,
        why="embeddings and the output head are not quantised, so that they can be trained",
        seen="peft 0.21.2, bitsandbytes 0.50.2",
        example={"adapter.modules_to_save": ["embed_tokens", "lm_head"], "model.quantization": "int8"},
    ),
    Combination(
        when={"whole": ("modules_to_save",), "method": ("dora",)},
        works=True,
        why="saved beside the matrices",
        example={"adapter.modules_to_save": ["norm"], "adapter.method": "dora"},
    ),
    # -- attention and precision ---------------------------------------------------------------------------------------
    Combination(
        when={"attention": ("flash_attention_2", "flash_attention_3"), "dtype": ("float32",)},
        works=False,
        key="model.attn_implementation",
        why="flash attention multiplies in bfloat16 and float16 only, and model.dtype is float32",
        instead="write sdpa or auto, or another dtype",
        seen="transformers 5.23",
        example={"model.attn_implementation": "flash_attention_2", "model.dtype": "float32"},
    ),
    # -- parallelism ---------------------------------------------------------------------------------------------------
    Combination(
        when={"method": ("lora", "dora", "none"), "parallelism": ("ZeRO-1", "ZeRO-2", *_SPREAD)},
        works=True,
        why="weights are loaded whole, adapted, and then spread; what is saved is gathered first",
        known="launch",
        seen="accelerate 1.15, deepspeed 0.19.8",
        example={"launch.config": "zero3"},
    ),
    Combination(
        when={"optimizer": ("loraplus",), "parallelism": ("ZeRO-1", "ZeRO-2", *_SPREAD)},
        works=True,
        why="B is told from A by name, since a weight in parts has one dimension only",
        known="launch",
        seen="accelerate 1.15, deepspeed 0.19.8",
        example={"launch.config": "zero3", "adapter.loraplus_lr_ratio": 8.0},
    ),
    Combination(
        when={"whole": ("modules_to_save", "trainable_token_indices"), "parallelism": ("ZeRO-1", "ZeRO-2", *_SPREAD)},
        works=True,
        why="saved whole; where weights are spread, rows of the embedding are too, and are gathered first",
        known="launch",
        seen="accelerate 1.15, deepspeed 0.19.8",
        example={"launch.config": "zero3", "adapter.trainable_token_indices": [5, 6]},
    ),
    Combination(
        when={"init": FROM_WEIGHTS, "parallelism": ("ZeRO-1", "ZeRO-2")},
        works=True,
        why="each process has whole matrices, and the same start",
        known="launch",
        seen="accelerate 1.15, deepspeed 0.19.8",
        example={"launch.config": "zero2", "adapter.init_lora_weights": "pissa"},
    ),
    Combination(
        when={"init": _FIRST_VALUES, "parallelism": _SPREAD},
        works=False,
        key="adapter.init_lora_weights",
        why="where each process holds a part of each matrix nothing holds the start's half as it is, and what is saved "
        "could not be factored anew",
        instead="write true, or launch.config: ddp or zero2",
        known="launch",
        example={"adapter.init_lora_weights": "pissa"},
    ),
)


def refusals(facts: Facts, known: Known | None = None) -> Iterator[Combination]:
    """The refused rows that hold.

    Args:
        facts: what is known.
        known: only rows whose facts are known at this time; None for all.
    """
    return (row for row in TABLE if not row.works and known in (None, row.known) and row.holds(facts))


def recipe_facts(get: Callable[[str, str], Any]) -> dict[str, frozenset[str]]:
    """The facts that a recipe states.

    Args:
        get: gives the plain value of a section's key, its default where the recipe says nothing. It may be one that is
            not valid, of which nothing is known then.
    """
    start = get("adapter", "init_lora_weights")
    named = str(start).lower() if isinstance(start, bool) else start
    facts: dict[str, Any] = {
        "method": get("adapter", "method"),
        "quantization": get("model", "quantization"),
        "init": "pissa" if isinstance(named, str) and named.startswith("pissa_niter_") else named,
        "scale": "rslora" if get("adapter", "use_rslora") is True else "alpha / r",
        "dropout": _sign(get("adapter", "lora_dropout")),
        "decay": _sign(get("training", "weight_decay")),
        "optimizer": "one rate" if get("adapter", "loraplus_lr_ratio") is None else "loraplus",
        "start": "new" if get("adapter", "continue_from") is None else "earlier adapter",
        "freeze": "some" if get("model", "freeze") else "none",
        "attention": get("model", "attn_implementation"),
        "dtype": get("model", "dtype"),
    }
    whole = [name for name in ("modules_to_save", "trainable_token_indices") if get("adapter", name)]
    return {
        **{name: frozenset({value}) for name, value in facts.items() if isinstance(value, str)},
        "whole": frozenset(whole),
    }


def _sign(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return "above 0" if value > 0 else "0"
