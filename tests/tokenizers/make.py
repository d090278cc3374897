"""Make the small tokenizers that tests use: real byte-level BPE, 1,000 tokens, three chat templates.

    python tests/tokenizers/make.py

chatml    a default system message; pad, eos and end-of-turn are one token, as in SmolLM2
llama3    the template writes BOS, turns end with <|eot_id|>, plain text gets BOS from the tokenizer
thinking  reasoning of turns before the last question is dropped from the history, as in Qwen3

The training text is made here from a seed, so the same versions of the libraries give the same files.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
VOCABULARY = 1000
SPLIT = r"\p{N}{1,3}|[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+| ?\p{L}+|\s+"

SUBJECTS = [
    "the printer",
    "my invoice",
    "an order",
    "the mobile app",
    "our server",
    "a password",
    "this account",
    "the delivery",
]
VERBS = [
    "does not start",
    "was charged twice",
    "arrived late",
    "keeps crashing",
    "shows an error",
    "cannot be found",
    "is slow",
]
ASKS = ["What should I do?", "Please help.", "Can you check it?", "Who can answer this?", "Thank you in advance."]
CHINESE = ["打印机无法启动。", "我的订单还没有到。", "请帮我检查账户。", "谢谢您的帮助。"]
KEYS = ["category", "priority", "product", "summary", "system", "user", "assistant", "answer"]

CHATML = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou answer briefly.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

THINKING = """\
{%- set last = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > last.question %}
        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def sentences(count: int, seed: int = 0) -> list[str]:
    """Made-up lines in English, Chinese and JSON, with the runs of blanks and newlines that chats have."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        english = f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)}. {draw.choice(ASKS)}"
        facts = json.dumps({draw.choice(KEYS): english.split(".")[0], draw.choice(KEYS): draw.randrange(10_000)})
        found.append(draw.choice([english, english.capitalize(), facts, draw.choice(CHINESE)]))
        found.append(draw.choice(["\n", "\n\n", "\n\n\n", " ", "  ", "    "]))
    return found


def train(special: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer with `special` tokens first."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    text = "".join(sentences(4000))
    tokenizer.train_from_iterator([text[at : at + 500] for at in range(0, len(text), 500)], trainer)
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, template: str, **special: str) -> None:
    """Write `folder`, as AutoTokenizer reads it."""
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)
    wrapped.model_max_length = 4096
    wrapped.save_pretrained(folder)


def main(target: Path = HERE) -> None:
    """Write all three below `target`."""
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    save(
        target / "chatml",
        train(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        CHATML,
        unk_token="<|endoftext|>",
        **ends,
    )

    marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
    llama3 = train(marks)
    llama3.post_processor = processors.TemplateProcessing(
        single=f"{marks[0]} $A", pair=f"{marks[0]} $A {marks[0]} $B", special_tokens=[(marks[0], 0)]
    )
    save(target / "llama3", llama3, LLAMA3, bos_token=marks[0], eos_token="<|eot_id|>", pad_token="<|pad|>")

    thinking = train(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    save(target / "thinking", thinking, THINKING, eos_token="<|im_end|>", pad_token="<|endoftext|>")


if __name__ == "__main__":
    main()
