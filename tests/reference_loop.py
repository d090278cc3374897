"""The textbook version of a run: LoRA on a chat model in a bare PyTorch loop, with nothing of finetune in it.

Rows are tokenised with the chat template, padded on the right, and only the last answer with its end-of-turn token has
labels; the loss is transformers' own mean over them, the optimizer AdamW, the learning rate falls in a straight line.
`finetune train` must give the same losses, which is what tests use this for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

IGNORED = -100


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids and labels of a chat that ends with an answer, cut off behind its end-of-turn token."""
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    answer = messages[-1]["content"] + tokenizer.eos_token
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    ids = tokenizer(asked + answer, add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) :]


def pad(rows: list[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Tensor]:
    """A batch, each tensor (B, T) int64."""
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
    }


def read(path: Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """All rows of a file of chats."""
    return [encode(tokenizer, json.loads(line)["messages"]) for line in path.read_text().splitlines()]


def token_mean(model: PreTrainedModel, rows: list[tuple[list[int], list[int]]], pad_id: int) -> float:
    """The loss per trained token over all rows, one row at a time."""
    model.eval()
    total = tokens = 0.0
    with torch.no_grad():
        for row in rows:
            count = sum(label != IGNORED for label in row[1][1:])
            total += model(**pad([row], pad_id)).loss.item() * count
            tokens += count
    return total / tokens


def train(
    base: Path,
    data: Path,
    *,
    steps: int,
    batch: int,
    rate: float,
    r: int,
    alpha: int,
    seed: int,
    change: Callable[[PreTrainedModel], None] | None = None,
) -> list[float]:
    """The loss of each step, over as many epochs as `steps` takes; the rows must fill whole batches.

    Args:
        base: the model's folder.
        data: a file of chats.
        steps: optimizer steps.
        batch: rows of a step.
        rate: the first step's learning rate.
        r: rank of the LoRA matrices.
        alpha: their scale times r.
        seed: of the LoRA matrices and the order of rows.
        change: what is done to the base before it gets its adapter.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = read(data, tokenizer)
    assert len(rows) % batch == 0
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if change is not None:
        change(model)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    losses: list[float] = []
    while len(losses) < steps:
        epoch = len(losses) * batch // len(rows)
        order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(len(rows)), kind="stable").tolist()
        for start in range(0, len(rows), batch):
            picked = [rows[index] for index in order[start : start + batch]]
            loss = model(**pad(picked, tokenizer.pad_token_id)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    return losses
