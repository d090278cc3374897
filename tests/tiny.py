"""Tiny bases, data and recipes for tests of whole runs.

The bases are real architectures of two layers with the tokenizers of tests/tokenizers, random from a seed. They are
made once per session by `main`, in a child of the warm fork server, because this file imports torch only there.

    chatml    Llama with tied embeddings; pad, eos and end-of-turn are one token, as in SmolLM2
    llama3    Llama with an output head of its own; grouped attention
    thinking  Qwen3
    infinite  chatml with a weight that is infinite
    stuck     chatml whose second layer ignores its attention: no gradient reaches q, k and v there
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from warm import Outcome, Warm

TOKENIZERS = Path(__file__).parent / "tokenizers"
BASES = ("chatml", "llama3", "thinking", "infinite", "stuck")

SETTINGS: dict[str, Any] = {
    "model": {"name_or_path": "chatml", "dtype": "float32"},
    "adapter": {"r": 4, "lora_alpha": 8},
    "data": {"train": "train.jsonl", "max_length": 256},
    "training": {"learning_rate": 0.01, "max_steps": 4, "global_batch_size": 4, "warmup_steps": 0},
    "launch": {"device": "cpu"},
    "output_dir": "run",
}


def main(argv: list[str]) -> int:
    """Make all bases below the folder that is named."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, Qwen3Config
    from transformers.models.llama.modeling_llama import LlamaForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

    (target,) = map(Path, argv)
    for name in BASES:
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / (name if name in ("llama3", "thinking") else "chatml"))
        special = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        shape = {
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4 if name == "chatml" else 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.1,  # wide, so that what an adapter does shows in the logits
            **special,
        }
        torch.manual_seed(1)
        model: Any = (
            Qwen3ForCausalLM(Qwen3Config(head_dim=16, tie_word_embeddings=True, **shape))
            if name == "thinking"
            else LlamaForCausalLM(LlamaConfig(tie_word_embeddings=name != "llama3", **shape))
        )
        with torch.no_grad():
            # Zero by default, and with tied embeddings a token of zeros can never be the likeliest.
            model.model.embed_tokens.weight[tokenizer.pad_token_id].normal_(std=0.1)
            if name == "infinite":
                model.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
            if name == "stuck":
                model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.generation_config = GenerationConfig(**special)
        model.save_pretrained(target / name)
        tokenizer.save_pretrained(target / name)
    return 0


def chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in `messages` format, of unequal length; the answer follows from the question."""
    draw = random.Random(seed)
    things = ["the printer", "my invoice", "an order", "the server"]
    faults = ["does not start", "arrived late", "keeps crashing", "is slow"]
    rows = []
    for number in range(count):
        thing, fault = draw.choice(things), draw.choice(faults)
        words = f"{number}: {thing} {fault}. " + "Please help. " * draw.randrange(4)
        answer = json.dumps({"product": thing.split()[-1], "summary": fault})
        rows.append({"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": answer}]})
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with dotted or nested `changes`; None takes a key away."""
    result = copy.deepcopy(dict(settings))
    for key, value in changes.items():
        place = result
        *sections, leaf = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        if value is None:
            place.pop(leaf, None)
        else:
            place[leaf] = copy.deepcopy(value)
    return result


def lab_in(folder: Path, bases: Path, warm: Warm) -> Lab:
    """A lab in an empty folder: the bases, 16 rows to train on and 6 to validate on."""
    for name in BASES:
        (folder / name).symlink_to(bases / name)
    write_rows(folder / "train.jsonl", chats(16))
    write_rows(folder / "held.jsonl", chats(6, seed=9))
    return Lab(folder, warm)


@dataclass(frozen=True)
class Lab:
    """A folder with the tiny bases linked into it, data, recipes, and the command line run in it.

    Attributes:
        folder: where everything lies; commands run there.
        warm: the fork server.
    """

    folder: Path
    warm: Warm

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def recipe(self, changes: Mapping[str, Any] | None = None, name: str = "recipe.yaml") -> str:
        """Write a recipe: SETTINGS with `changes` by dotted key; gives its name."""
        (self.folder / name).write_text(yaml.safe_dump(merged(SETTINGS, changes or {}), sort_keys=False))
        return name

    def train(self, changes: Mapping[str, Any] | None = None, *words: str, **how: Any) -> Outcome:
        """`finetune train` on a recipe with `changes`."""
        return self.warm.run("train", self.recipe(changes), *words, cwd=self.folder, **how)

    def importable(self) -> dict[str, str]:
        """An environment in which modules in the folder can be imported."""
        return {"PYTHONPATH": os.pathsep.join([str(self.folder), os.environ["PYTHONPATH"]])}

    def losses(self, run: str = "run") -> list[float]:
        """The logged training losses of a run, in order."""
        return [line["loss"] for line in self.metrics(run) if "loss" in line]

    def metrics(self, run: str = "run") -> list[dict[str, Any]]:
        """All logged figures of a run."""
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]

    def ended(self, run: str = "run") -> dict[str, Any]:
        """exit.json of a run."""
        value: dict[str, Any] = json.loads((self.folder / run / "exit.json").read_text())
        return value

    def adapter(self, run: str = "run") -> bytes:
        """The bytes of a run's adapter weights."""
        return (self.folder / run / "adapter" / "adapter_model.safetensors").read_bytes()

    def own_base(self, name: str) -> Path:
        """A copy of a base that may be changed, in place of the link to it."""
        path = self.folder / name
        source = path.resolve()
        path.unlink()
        shutil.copytree(source, path)
        return path
