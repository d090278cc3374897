"""Model cards: facts alone. No placeholder, no path of this machine, front matter that the hub understands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from finetune.recipe.sections import DataOptions, ModelOptions, TrainingOptions
from finetune.run.card import CardFacts, base_facts, card, trained_card

PLACEHOLDERS = ("More Information Needed", "TODO", "[optional]", "{{", "}}", "None", "BASE", "<")


def matter(text: str) -> dict[str, Any]:
    """The front matter of a card."""
    start, front, _ = text.split("---\n", 2)
    assert start == ""
    loaded = yaml.safe_load(front)
    assert isinstance(loaded, dict)
    return loaded


def base(tmp_path: Path, front: str | None) -> Path:
    folder = tmp_path / "some-base"
    folder.mkdir()
    if front is not None:
        (folder / "README.md").write_text(f"---\n{front}\n---\n# A base\n")
    return folder


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        (None, ("some-base", None)),
        ("license: apache-2.0", ("some-base", "apache-2.0")),
        ("license: mit\nbase_model: org/x\nbase_model_relation: quantized", ("org/x", "mit")),
        ("base_model: [org/x, org/y]\nbase_model_relation: quantized", ("org/x", None)),
        # What an instruct model was made from is not that model.
        ("license: mit\nbase_model: org/x", ("some-base", "mit")),
        ("license: mit\nbase_model: org/x\nbase_model_relation: finetune", ("some-base", "mit")),
        ("license: [mit, cc0-1.0]", ("some-base", "mit")),
        ("license: []", ("some-base", None)),
        ("[broken", ("some-base", None)),
        ("- a list", ("some-base", None)),
    ],
)
def test_what_a_local_base_is_called_and_under_which_licence(
    tmp_path: Path, front: str | None, expected: tuple[str, str | None]
) -> None:
    folder = base(tmp_path, front)
    assert base_facts(str(folder), folder) == expected


def test_a_base_of_the_hub_is_its_id(tmp_path: Path) -> None:
    assert base_facts("Qwen/Qwen3-0.6B", None) == ("Qwen/Qwen3-0.6B", None)
    assert base_facts("Qwen/Qwen3-0.6B", base(tmp_path, "license: apache-2.0")) == ("Qwen/Qwen3-0.6B", "apache-2.0")


def made(folder: Path, name: str, library: str = "peft", **data: Any) -> str:
    return trained_card(
        folder,
        Path(name) if Path(name).is_dir() else None,
        ModelOptions(name_or_path=name),
        DataOptions.model_validate({"train": "data/tickets/train.jsonl", **data}),
        TrainingOptions(learning_rate=2e-4, seed=7),
        "lora r=16 on q_proj: 4.9 million parameters, float32; optimizer state float32",
        {"rows_kept": 3000, "trained_tokens": 90000},
        {"final_loss": 0.25, "steps": 150, "validation_loss": 0.5},
        library,
    )


@pytest.mark.parametrize("library", ["peft", "transformers"])
def test_a_card_has_facts_and_nothing_of_this_machine(tmp_path: Path, library: str) -> None:
    folder = base(tmp_path, "license: apache-2.0\nbase_model: org/base\nbase_model_relation: quantized")
    (tmp_path / "rows.jsonl").write_text("")
    sources = [str(tmp_path / "rows.jsonl"), "org/data-v1.5", {"path": "x/y.jsonl", "name": "mine"}, "~/private/z.csv"]
    text = made(tmp_path / "runs" / "tickets", str(folder), library, train=sources)
    assert matter(text) == {
        "base_model": "org/base",
        "library_name": library,
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["finetune"],
    }
    assert str(tmp_path) not in text
    assert str(Path.home()) + "/" not in text
    assert not re.search(r"(?<![\w:/])/\w+/", text)
    assert [word for word in PLACEHOLDERS if word in text] == []
    assert "# tickets\n" in text
    assert "trained on `rows.jsonl`, `org/data-v1.5`, `mine`, `z.csv`." in text
    for row in (
        "| rows | 3000 |",
        "| learning rate | 0.0002 |",
        "| seed | 7 |",
        "| final loss | 0.25 |",
        "| steps | 150 |",
    ):
        assert row in text
    assert re.search(r"Made with finetune \S+, torch \S+, transformers \S+, trl \S+, peft \S+\.\n$", text)
    calls = {"peft": 'PeftModel.from_pretrained(base, "this folder")', "transformers": 'from_pretrained("this folder")'}
    assert calls[library] in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    compile(code.group(1), "card", "exec")


def test_a_base_without_a_licence_claims_none(tmp_path: Path) -> None:
    assert "license" not in matter(made(tmp_path, str(base(tmp_path, None))))


NAMES = st.text(st.characters(categories=("L", "N", "P", "S"), include_characters=" "), min_size=1)


@given(title=NAMES, name=NAMES, licence=st.none() | NAMES, value=NAMES)
def test_any_name_leaves_the_front_matter_readable(title: str, name: str, licence: str | None, value: str) -> None:
    facts = CardFacts(title, name, licence, "Trained", ("a",), {"x": value}, {"torch": "1"})
    text = card(facts)
    front = text[4 : text.index("\n---\n\n# ")]
    loaded = yaml.safe_load(front)
    assert (loaded["base_model"], loaded.get("license")) == (name, licence)


def test_a_bar_does_not_break_the_table() -> None:
    text = card(CardFacts("t", "b", None, "m", ("a",), {"x": "one|two"}, {}))
    assert "| x | one/two |" in text


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("family", ["llama", "kimi_k25"])
def test_what_a_card_says_loads_the_adapter(tmp_path: Path, family: str, longer: bool) -> None:
    """Also of a type of which transformers registers the whole model only."""
    import torch
    import zoo
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoTokenizer

    from finetune.families import FAMILIES
    from finetune.model.auto import class_name
    from finetune.model.twin import family_twin
    from finetune.registry import resolve

    known = resolve("family", family, FAMILIES)
    model: Any = family_twin(known)
    model.save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(zoo.TOKENIZER)
    tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    if longer:
        tokenizer.add_tokens([f"<new {number}>" for number in range(model.config.get_text_config().vocab_size)])
        model.resize_token_embeddings(len(tokenizer))
        config.trainable_token_indices = [len(tokenizer) - 1]
    trained = get_peft_model(model, config)
    trained.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trained.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    tokenizer.save_pretrained(str(tmp_path / "adapter"))
    loads = class_name(model.config.model_type)
    text = card(CardFacts("t", str(tmp_path / "base"), None, "m", ("a",), {}, {}, loads=loads, longer=longer))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    found: dict[str, Any] = {}
    exec(code.group(1).replace("this folder", str(tmp_path / "adapter")), found)
    expected = get_peft_model_state_dict(trained, save_embedding_layers=False)
    opened = get_peft_model_state_dict(found["model"], save_embedding_layers=False)
    assert expected.keys() == opened.keys()
    assert all(torch.equal(expected[name], opened[name]) for name in expected)


def test_a_card_of_an_adapter_that_plain_peft_loses_a_part_of_says_to_merge_it() -> None:
    text = card(CardFacts("t", "b", None, "m", ("a",), {}, {}, lost=10))
    assert "PEFT by itself loses 10 matrices" in text
    assert "from_pretrained" not in text


def test_a_card_names_the_class_that_loads_whole_weights() -> None:
    from finetune.model.auto import class_name

    text = card(CardFacts("t", "b", None, "m", ("a",), {}, {}, library="transformers", loads=class_name("kimi_k25")))
    assert 'AutoModelForImageTextToText.from_pretrained("this folder")' in text
    assert class_name("a_type_that_nobody_knows") == "AutoModelForCausalLM"
