"""Attention over documents laid end to end: a token sees itself and what stands before it in its own document.

Registered with transformers' AttentionInterface under the names of ISOLATED. A model that runs with one of them takes
(1, T) tokens with `position_ids` that begin again at 0 in each document, and `cu_seq_lens_q` (D+1,), where the
documents begin and the last one ends, as a forward argument; without that, each row of a batch is one document. No
mask function is registered, so transformers builds no mask: a dense one costs T x T elements, and looking for the
documents in `position_ids` makes the host wait for an accelerator. A row with padding is therefore never to be sent.

What runs inside a document:
    16 bit on CUDA   torch's varlen_attn, all documents in one kernel
    eager            the product of model/product.py, on a CPU the faster one for short documents; documents over
                     EAGER_UP_TO tokens go through torch's kernel, whose memory is linear
    sdpa             torch's scaled_dot_product_attention, once per run of documents of one length
Soft caps, sinks and windows shorter than a document, which torch's kernels lack, go through the product.

Shapes: T tokens, H query heads, K key heads, D and V widths of a query and a value.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from finetune.model.documents import Documents, Run
from finetune.model.product import Form, product

# On a CPU the backward pass of torch's flash attention takes 30 % of a step of short rows; the plain product is faster
# up to about this many tokens, where its quadratic score matrix begins to cost more than it saves.
EAGER_UP_TO = 512

# Without the words "sdpa" and "flash", for which transformers looks in names to ask whether a model may have those.
ISOLATED = {"eager": "isolated_product", "sdpa": "isolated_kernel"}

# Arguments by which a model asks for attention of another form; ignoring one would be silently wrong.
_REFUSED = ("indices", "block_indices", "position_bias", "sinks", "cache")


class NotIsolated(ValueError):
    """The model asks for something that attention over documents does not do."""


def isolate(model: Any, kernel: str, longest: int) -> str:
    """Let a model attend within documents, where its code asks for attention through transformers' interface.

    Another keeps its own, which may find documents by `position_ids` or not: the probe must tell.

    Args:
        model: a transformers model, with or without an adapter.
        kernel: "eager", "sdpa", or the name of an implementation of transformers that finds documents by itself.
        longest: tokens of the longest document.

    Returns:
        The name of the attention that the model now runs with.
    """
    if kernel in ISOLATED and _says_more_in_masks(model, longest):
        return str(model.config._attn_implementation)
    for name, registered in ISOLATED.items():
        AttentionInterface.register(registered, functools.partial(attend, kernel=name))
    model.set_attn_implementation(ISOLATED.get(kernel, kernel))
    return str(model.config._attn_implementation)


def _says_more_in_masks(model: Any, longest: int) -> bool:
    """Whether only the model's masks say that tokens do not see all of a document: chunks, or windows not passed on."""
    config = model.config.get_text_config()
    if (getattr(config, "attention_chunk_size", None) or longest) < longest:
        return True
    if (getattr(config, "sliding_window", None) or longest) >= longest:
        return False
    sources = (_source(kind) for kind in {type(module) for module in model.modules()})
    return any("attention_interface(" in source and "sliding_window=" not in source for source in sources)


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def attention_width(model: Any) -> float:
    """About how many tokens a token must attend to before that costs as much as the rest of the model.

    A layer of width h has about 12 h² weights, each one product per token; causal attention makes h products for each
    pair of tokens of a document.
    """
    return 12.0 * model.config.get_text_config().hidden_size


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    *,
    kernel: str,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it.

    Args:
        module: the model's attention layer.
        query: (B, H, T, D); B is 1 where cu_seq_lens_q is given.
        key: (B, K, T, D).
        value: (B, K, T, V).
        attention_mask: must be None.
        scaling: of the scores; 1 / sqrt(D) by default.
        dropout: on the probabilities.
        is_causal: must not be False.
        sliding_window: how many tokens a token sees, itself included.
        softcap: scores are bent by softcap * tanh(score / softcap).
        s_aux: (H,) scores of a sink that takes probability and gives nothing.
        cu_seq_lens_q: int32 (D+1,), from 0 to T.
        max_length_q: the longest document.
        kernel: a key of ISOLATED.
        others: further forward arguments of the model.

    Returns:
        (B, T, H, V), and None for the probabilities, which are never whole.

    Raises:
        NotIsolated: a mask, a cache, or another form of attention is asked for.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = [name for name in _REFUSED if others.get(name) is not None]
    asked += ["a mask of its own"] * (attention_mask is not None) + ["attention in both directions"] * (not causal)
    asked += ["cached keys"] * (query.shape[2] != key.shape[2])
    if asked:
        raise NotIsolated(f"{type(module).__name__} asks for {', '.join(asked)}")
    batch, heads, length, width = query.shape
    if cu_seq_lens_q is not None and batch > 1:
        raise NotIsolated(f"{batch} rows with cu_seq_lens_q; documents are laid end to end in one row")
    dtype = _dtype(query)
    q, k, v = (states.to(dtype).transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    form = Form(
        scaling=width**-0.5 if scaling is None else scaling,
        window=sliding_window or None,
        softcap=softcap,
        dropout=dropout,
    )
    if s_aux is None and cu_seq_lens_q is not None and max_length_q is not None and _varlen_takes(q, v, form):
        out = _varlen(q, k, v, cu_seq_lens_q, max_length_q, form)
    else:
        # Reading the lengths makes the host wait for an accelerator, which the one kernel above spares it.
        documents = Documents.equal(batch, length) if cu_seq_lens_q is None else Documents.of(cu_seq_lens_q)
        out = _by_runs(q, k, v, s_aux, documents, form, kernel)
    return out.view(batch, length, heads, -1), None


def _dtype(query: Tensor) -> torch.dtype:
    """What the products are made in: as the model's own would be under autocast."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _by_runs(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, documents: Documents, form: Form, kernel: str
) -> Tensor:
    """(T, H, V): the documents in as few calls as their lengths allow."""
    torch_can = form.softcap is None and sinks is None and form.sees(documents.longest)
    limit = 0 if kernel == "sdpa" and torch_can else EAGER_UP_TO if torch_can else None
    sections = documents.sections(limit, q.shape[1])
    sizes = [section.tokens for section in sections]
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True) if len(sizes) > 1 else [(q, k, v)]
    found = [
        product(*part, sinks, section.runs, form) if section.short else _torch_run(*part, section.runs[0], form)
        for section, part in zip(sections, parts, strict=True)
    ]
    return torch.cat(found) if len(found) > 1 else found[0]


def _torch_run(q: Tensor, k: Tensor, v: Tensor, run: Run, form: Form) -> Tensor:
    """Documents of one length through scaled_dot_product_attention."""
    repeats = q.shape[1] // k.shape[1]
    q, k, v = (states.unflatten(0, (run.count, run.length)).transpose(1, 2) for states in (q, k, v))
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=form.scaling, dropout_p=form.dropout)
    return out.transpose(1, 2).flatten(0, 1)


@functools.cache
def _varlen_attn() -> Any:
    """torch's kernel for documents of any length, where this torch's takes windows, a scale and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= set(known) else None


def _varlen_takes(q: Tensor, v: Tensor, form: Form) -> bool:
    width = q.shape[-1]
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and form.softcap is None
        and form.dropout == 0
        and width == v.shape[-1]
        and width % 8 == 0
        and width <= 256
        and _varlen_attn() is not None
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, form: Form) -> Tensor:
    """(T, H, V) by one call for all documents."""
    left = -1 if form.window is None else form.window - 1
    out: Tensor = _varlen_attn()(
        q, k, v, starts, starts, longest, longest, scale=form.scaling, window_size=(left, 0), enable_gqa=True
    )
    return out
