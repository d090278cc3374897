"""Secrets are masked by key and by value, and ordinary words are left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.privacy import MASK, environment_secrets, is_secret_name, mask, mask_text, no_telemetry
from finetune.recipe import sections

SECRET = ["token", "hub_token", "HF_TOKEN", "api_key", "WANDB_API_KEY", "apikey", "aws_secret_access_key",
          "DB_PASSWORD", "client_secret", "push_to_hub_token", "GITLAB_TOKEN"]  # fmt: skip
PLAIN = ["max_new_tokens", "pad_token", "eos_token", "tokens", "tokenizer", "keys", "key", "num_tokens", "monkey",
         "path", "TOKENIZERS_PARALLELISM", "author"]  # fmt: skip


@pytest.mark.parametrize("name", SECRET)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", PLAIN)
def test_names_of_other_things(name: str) -> None:
    assert not is_secret_name(name)


def test_no_key_of_a_recipe_counts_as_a_secret() -> None:
    kinds = [kind for kind in vars(sections).values() if isinstance(kind, type) and issubclass(kind, sections.Section)]
    keys = {key for kind in kinds for key in kind.model_fields}
    assert len(keys) >= 50
    assert [key for key in keys if is_secret_name(key)] == []


def test_secrets_of_the_environment_are_found_longest_first() -> None:
    environment = {
        "HF_TOKEN": "abcdefgh",
        "WANDB_API_KEY": "abcdefgh-and-more",
        "MY_TOKEN": "short",
        "HOME": "/root/home",
    }
    assert environment_secrets(environment) == ["abcdefgh-and-more", "abcdefgh"]
    assert mask_text("x abcdefgh-and-more y abcdefgh", environment_secrets(environment)) == f"x {MASK} y {MASK}"


def test_plain_data_is_masked_at_any_depth() -> None:
    found = mask({"a": [{"hub_token": "x", "b": ("hf_" + "a" * 30, 3)}], "api_key": None, "n": 1.5}, ["hidden-value"])
    assert found == {"a": [{"hub_token": MASK, "b": [MASK, 3]}], "api_key": None, "n": 1.5}


@given(st.text(), st.text(min_size=8), st.text())
def test_a_secret_never_survives(before: str, secret: str, after: str) -> None:
    if secret not in MASK:
        assert secret not in mask_text(before + secret + after, [secret]) or secret in before + MASK + after


@given(st.recursive(st.integers() | st.booleans() | st.none(), lambda inner: st.dictionaries(st.just("a"), inner)))
def test_data_without_secrets_stays_as_it_is(value: object) -> None:
    assert mask(value, []) == value


def test_telemetry_switches_are_set_whatever_they_were() -> None:
    environment = {"HF_HUB_DISABLE_TELEMETRY": "0"}
    no_telemetry(environment)
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert environment["DO_NOT_TRACK"] == "1"
