"""A float32 model whose weights stay in the 16 bits of their files is otherwise the very model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import zoo

from finetune.families import FAMILIES
from finetune.families.family import Family
from finetune.model.folder import find
from finetune.model.load import Precision, load_base
from finetune.model.twin import twin
from finetune.recipe.sections import ModelOptions
from finetune.registry import resolve

FAST = ("llama", "gemma", "gpt_oss", "qwen3_moe", "deepseek_v3")  # scales of embeddings, experts in one, latents


@pytest.mark.parametrize(
    "family", [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stay_as_their_files_have_them_and_nothing_else_is_rounded(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    known: Family = resolve("family", family, FAMILIES)
    twin(known.model_types[-1], known.twin_shape(), 0, dtype).save_pretrained(tmp_path)
    for file in zoo.TOKENIZER.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    options, base = ModelOptions(name_or_path=str(tmp_path)), find(str(tmp_path))
    kept = Precision("float32", "float32")
    wide = load_base(options, base, kept, "eager")
    narrow = load_base(options, base, kept, "eager", as_stored=True)
    assert {one.dtype for one in wide.parameters()} == {torch.float32}
    assert dtype in {one.dtype for one in narrow.parameters()}
    for (name, ours), (_, theirs) in zip(narrow.named_parameters(), wide.named_parameters(), strict=True):
        assert ours.dtype in (dtype, torch.float32), name
        assert ours.requires_grad
        assert torch.equal(ours.float(), theirs), name
    for (name, ours), (_, theirs) in zip(narrow.named_buffers(), wide.named_buffers(), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    again = load_base(options, base, kept, "eager")
    assert {one.dtype for one in again.parameters()} == {torch.float32}, "only inside"


def test_weights_of_32_bits_are_what_they_are(tmp_path: Path) -> None:
    path = zoo.folder(tmp_path / "base")
    loaded = load_base(
        ModelOptions(name_or_path=str(path)), find(str(path)), Precision("float32", "float32"), "eager", as_stored=True
    )
    assert {one.dtype for one in loaded.parameters()} == {torch.float32}
