"""Attention over documents end to end gives what each document gets alone: values and gradients, in every form."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from finetune.data.collate import FlatCollator, PaddedCollator
from finetune.model.attention import EAGER_UP_TO, ISOLATED, NotIsolated, attend, isolate
from finetune.model.documents import Documents
from finetune.run.loss import TrainedTokenLoss, trained_positions

KINDS = list(zoo.SHAPES)


class Layer(nn.Module):
    is_causal = True


def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lengths: list[int], form: dict[str, Any]) -> Tensor:
    """The definition: one document at a time, a dense mask, repeated heads."""
    found, start = [], 0
    for size in lengths:
        own = [states[0, :, start : start + size] for states in (q, k, v)]
        own[1:] = [states.repeat_interleave(q.shape[1] // k.shape[1], 0) for states in own[1:]]
        scores = own[0] @ own[1].transpose(1, 2) * form["scaling"]
        if form["softcap"]:
            scores = torch.tanh(scores / form["softcap"]) * form["softcap"]
        behind = torch.arange(size)[:, None] - torch.arange(size)
        seen = (behind >= 0) & (behind < (form["sliding_window"] or size))
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, size, 1)], -1)
        found.append(scores.softmax(-1)[..., :size] @ own[2])
        start += size
    return torch.cat(found, 1).transpose(0, 1)[None]


def compared(
    kernel: str, lengths: list[int], heads: tuple[int, int], widths: tuple[int, int], sink: bool, **form: Any
) -> float:
    """The largest difference to `plain` over values and all gradients, in float64."""
    draw = torch.Generator().manual_seed(len(lengths))

    def states(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

    total = sum(lengths)
    q, k = (states(1, count, total, widths[0]) for count in heads)
    v, sinks = states(1, heads[1], total, widths[1]), states(heads[0]) if sink else None
    form = {"scaling": 0.3, "softcap": None, "sliding_window": None, **form}
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    given = [tensor for tensor in (q, k, v, sinks) if tensor is not None]
    out, _ = attend(
        Layer(), q, k, v, None, s_aux=sinks, cu_seq_lens_q=starts, max_length_q=max(lengths), kernel=kernel, **form
    )
    expected = plain(q, k, v, sinks, lengths, form)
    towards = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(value, given, towards) for value in (out, expected))
    return max(float((a - b).detach().abs().max()) for a, b in zip([out, *ours], [expected, *theirs], strict=True))


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.sampled_from(list(ISOLATED)),
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=12),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    widths=st.sampled_from([(8, 8), (8, 12)]),
    sink=st.booleans(),
    softcap=st.sampled_from([None, 2.0]),
    sliding_window=st.sampled_from([None, 1, 5, 100]),
)
def test_documents_get_what_they_get_alone(**case: Any) -> None:
    assert compared(**case) < 1e-12
    assert compared(**{**case, "lengths": sorted(case["lengths"], reverse=True)}) < 1e-12


@pytest.mark.parametrize("kernel", ISOLATED)
@pytest.mark.parametrize(
    "form", [{}, {"softcap": 2.0}, {"sliding_window": 70}, {"sliding_window": 600}, {"sink": True}]
)
def test_long_documents_too_which_go_block_by_block_or_through_torch(kernel: str, form: dict[str, Any]) -> None:
    lengths = [2 * EAGER_UP_TO + 100, EAGER_UP_TO + 1, EAGER_UP_TO, 200, 30, 30, 2]
    assert compared(kernel, lengths, (2, 1), (4, 4), **{"sink": False, **form}) < 1e-12


def test_few_calls_take_many_short_documents() -> None:
    lengths = sorted([3, 3, 4, 4, 5, 5, 6, 6, 7, 8] * 3, reverse=True)
    (section,) = Documents(lengths).sections(EAGER_UP_TO, 4)
    assert len(section.runs) < 4
    assert sum(run.tokens for run in section.runs) == section.tokens == sum(lengths)
    assert any(not run.even for run in section.runs)
    sections = Documents([600, 600, 90, 20]).sections(EAGER_UP_TO, 4)
    assert [(section.short, section.tokens) for section in sections] == [(False, 1200), (True, 110)]


def test_memory_of_a_long_document_is_linear_in_its_length() -> None:
    """No (T, T) tensor, though a soft cap forbids torch's own kernel: what is kept has a few times T numbers."""
    kept: list[int] = []
    length = 8 * EAGER_UP_TO
    q = torch.randn(1, 1, length, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attend(Layer(), q, q, q, None, softcap=5.0, kernel="eager")
    assert kept
    assert max(kept) <= 4 * length


def test_dropout_falls_on_probabilities_and_their_gradients_alike() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 40, 4, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 2, 40, 3, dtype=torch.float64, requires_grad=True)
    out, _ = attend(Layer(), q, q, ones, None, dropout=0.5, kernel="eager")
    sums = out[0, :, :, 0]  # of the probabilities that were kept, doubled
    assert 0.8 < float(sums.mean()) < 1.2
    assert float(sums.std()) > 0.1
    assert float(sums[0].max()) in (0.0, 2.0)  # the first token has one probability
    state = torch.random.get_rng_state()

    def seeded(values: Tensor) -> Tensor:
        torch.random.set_rng_state(state)
        return attend(Layer(), values, values, values, None, dropout=0.5, kernel="eager")[0]

    few = q[:, :, :5].detach().requires_grad_()
    assert torch.autograd.gradcheck(seeded, (few,))


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"indices": torch.zeros(1)}, "indices"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"is_causal": False}, "attention in both directions"),
    ],
)
def test_other_forms_of_attention_are_refused_by_name(asked: dict[str, Any], name: str) -> None:
    q = torch.randn(1, 2, 6, 4)
    with pytest.raises(NotIsolated, match=f"Layer asks for {name}"):
        attend(Layer(), q, q, q, None, kernel="eager", **asked)
    with pytest.raises(NotIsolated, match="a mask of its own"):
        attend(Layer(), q, q, q, torch.zeros(1, 1, 6, 6), kernel="eager")
    with pytest.raises(NotIsolated, match="cached keys"):
        attend(Layer(), q[:, :, :1], q, q, None, kernel="eager")
    two = q.expand(2, -1, -1, -1)
    with pytest.raises(NotIsolated, match="2 rows with cu_seq_lens_q"):
        attend(Layer(), two, two, two, None, kernel="eager", cu_seq_lens_q=torch.tensor([0, 6]))


# -- whole models --------------------------------------------------------------------------------------------------


def token_rows(*lengths: int) -> list[dict[str, Any]]:
    found = []
    for at, size in enumerate(lengths):
        ids = zoo.ids(1, size, seed=at)[0].numpy().astype("int32")
        labels = ids.copy()
        labels[: size // 3] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def losses(model: Any, batch: dict[str, Any]) -> Tensor:
    """(N,) float32: the loss of each trained token, in the order of the batch."""
    labels = batch["labels"]
    positions, targets = trained_positions(labels)
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**given, use_cache=False).logits.flatten(0, 1)[positions]
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The gradient of the summed loss, as the trainer takes it, by parameter."""
    positions, targets = trained_positions(batch["labels"])
    given = {name: value for name, value in batch.items() if name != "labels"}
    model.zero_grad()
    TrainedTokenLoss(model)(model, given, positions, targets).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kernel", ISOLATED)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_without_padding_are_those_of_padded_batches(kind: str, kernel: str) -> None:
    model = zoo.model(kind)
    rows = sorted(token_rows(9, 30, 9, 3, 28, 27), key=lambda row: -len(row["input_ids"]))
    padded = PaddedCollator(0)(rows)
    expected, towards = losses(model, padded), gradients(model, padded)
    assert isolate(model, kernel, 30) == ISOLATED[kernel]
    flat = FlatCollator()(rows)
    assert flat["input_ids"].numel() == 106 < padded["input_ids"].numel()
    assert torch.allclose(losses(model, flat), expected, atol=1e-5, rtol=0)
    found = gradients(model, flat)
    assert found.keys() == towards.keys()
    assert len(found) > 10
    for name, gradient in towards.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * max(1.0, float(gradient.abs().max()))), name


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("mistral", {"sliding_window": 6}), ("gemma2", {"sliding_window": 6, "attn_logit_softcapping": 3.0})],
)
def test_windows_and_soft_caps_of_a_model_hold_in_each_document(kind: str, changes: dict[str, Any]) -> None:
    model, wide = zoo.model(kind, **changes), zoo.model(kind, **{**changes, "sliding_window": 100})
    rows = token_rows(30, 20)
    expected = losses(model, PaddedCollator(0)(rows))
    isolate(model, "eager", 30)
    assert torch.allclose(losses(model, FlatCollator()(rows)), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(losses(wide, PaddedCollator(0)(rows)), expected, atol=1e-2)


def test_a_window_that_only_the_mask_states_is_left_to_the_model() -> None:
    """Qwen2-MoE does not pass its window on, so that a kernel without masks would see everything."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {**zoo.SHAPES["moe"][1], "shared_expert_intermediate_size": 32, "use_sliding_window": True,
             "sliding_window": 6, "max_window_layers": 0}  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2_moe", **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    rows = token_rows(30, 20)
    expected = losses(model, PaddedCollator(0)(rows))
    assert isolate(model, "eager", 30) == "eager"
    assert torch.allclose(losses(model, FlatCollator()(rows)), expected, atol=1e-5, rtol=0)
    assert isolate(model, "eager", 6) == "isolated_product"  # no document is longer than the window


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: varlen_attn runs nowhere else")
@pytest.mark.parametrize("window", [None, 50])
def test_on_cuda_all_documents_go_through_one_kernel(window: int | None) -> None:
    lengths = [300, 130, 64, 64, 7, 1]
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, sum(lengths), 64, device="cuda") for heads in (8, 2, 2))
    towards = torch.randn(1, sum(lengths), 8, 64, device="cuda")
    found = []
    for dtype in (torch.float32, torch.bfloat16):  # per document, and varlen_attn
        given = [states.to(dtype).requires_grad_() for states in (q, k, v)]
        out, _ = attend(
            Layer(), *given, None, sliding_window=window, cu_seq_lens_q=starts, max_length_q=300, kernel="sdpa"
        )
        found.append([out, *torch.autograd.grad(out, given, towards.to(dtype))])
    for expected, ours in zip(*found, strict=True):
        assert float((ours.float() - expected).norm() / expected.norm()) < 0.02
