"""Greedy answers: those of a plain loop, whatever the batch, the padding and the model's own generation config."""

from __future__ import annotations

import pytest
import torch
import zoo
from transformers import PreTrainedModel

from finetune.model.answer import answers

torch.set_num_threads(1)

PROMPTS = [[5, 6, 7], [9], [30, 31, 32, 33, 34, 35, 36], [100, 101], [5, 6, 7, 8]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.model("llama", seed=2)


@torch.no_grad()
def textbook(model: PreTrainedModel, prompt: list[int], stops: set[int], most: int) -> list[int]:
    """One token after another, the whole sequence each time."""
    ids = list(prompt)
    for _ in range(most):
        best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best in stops:
            break
        ids.append(best)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 50])
def test_answers_are_those_of_a_plain_loop_in_the_prompts_order(model: PreTrainedModel, batch_size: int) -> None:
    free = [textbook(model, prompt, set(), 12) for prompt in PROMPTS]
    stops = {free[0][4], free[2][7], 2}
    expected = [textbook(model, prompt, stops, 12) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) >= 2  # some stop, some run to the end
    told: list[tuple[int, int]] = []
    found, seconds = answers(
        model, PROMPTS, frozenset(stops), 0, 12, batch_size, lambda done, total: told.append((done, total))
    )
    assert found == expected
    assert seconds > 0
    assert told[-1] == (5, 5)
    assert len(told) == -(-5 // batch_size)


def test_a_stop_token_that_also_pads_still_stops(model: PreTrainedModel) -> None:
    stop = textbook(model, PROMPTS[0], set(), 12)[3]
    expected = [textbook(model, prompt, {stop}, 12) for prompt in PROMPTS]
    assert answers(model, PROMPTS, frozenset({stop}), stop, 12, 5)[0] == expected


def test_the_models_own_generation_config_does_not_interfere() -> None:
    model = zoo.model("llama", seed=2)
    expected = answers(model, PROMPTS, frozenset({2}), 0, 12, 2)[0]
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.min_new_tokens = 11
    model.generation_config.eos_token_id = [expected[0][0]]
    model.generation_config.num_beams = 3
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    model.config.use_cache = False
    assert answers(model, PROMPTS, frozenset({2}), 0, 12, 2)[0] == expected


def test_without_stop_tokens_answers_run_to_the_end(model: PreTrainedModel) -> None:
    found, _ = answers(model, PROMPTS, frozenset(), 0, 7, 2)
    assert found == [textbook(model, prompt, set(), 7) for prompt in PROMPTS]


def test_no_prompts_no_answers(model: PreTrainedModel) -> None:
    assert answers(model, [], frozenset({2}), 0, 7, 2)[0] == []
