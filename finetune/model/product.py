"""Causal attention inside documents as plain matrix products, with its own backward pass.

One autograd node for all documents of a layer: as many small operations by themselves would cost a short document more
than its numbers. The probabilities of short documents are kept for the backward pass; those of long ones are computed
again, so that memory is linear in their length. Grouped heads are never repeated: the queries that share a key head are
rows of one product.

Shapes: T tokens, n documents of a run, L its length, H query heads, K key heads, R = H / K, D and V widths of a query
and a value, W keys that a block of Q queries may see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune.model.documents import Run

# Longer documents go by blocks of queries, each with the keys before them: less is computed for nothing, and what is
# computed stays in a core's cache. Measured on CPUs with heads of 64 and 128, in 16 and 32 bit.
WHOLE = 192  # tokens of a document that is one block
BLOCK = 128  # queries of a block
KEPT = 512  # tokens of a document whose probabilities are kept for the backward pass; those of others are made again


@dataclass(frozen=True)
class Form:
    """How scores become probabilities.

    Attributes:
        scaling: factor of the scores.
        window: how many tokens a token sees, itself included; None for all.
        softcap: scores are bent by softcap * tanh(score / softcap); None for not.
        dropout: share of the probabilities that is set to 0, from 0 to 1.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0

    def sees(self, length: int) -> bool:
        """Whether a token of a document of this length sees all before it."""
        return self.window is None or self.window >= length


@dataclass(frozen=True)
class _Block:
    """Queries of a run and the keys they may see: tokens first to last, and how far the first query is behind them."""

    run: Run
    queries: slice
    keys: slice
    whole: bool

    def hidden(self, shape: _Shape, window: int | None, like: Tensor) -> Tensor:
        """(Q, W) of the dtype and device of `like`: 0 where a query sees a key, else minus infinity."""

        def make() -> Tensor:
            behind = self.queries.start - self.keys.start  # how far the first query is behind the first key
            dark = like.new_full((shape.Q, shape.W), -torch.inf)
            hidden = torch.triu(dark, behind + 1)
            return hidden if window is None or window >= shape.W else hidden + torch.tril(dark, behind - window)

        if self.run.length > KEPT:
            return make()
        return self.run.once((self.queries.start, window, like.dtype, like.device), make)


def _blocks(runs: Sequence[Run], window: int | None) -> Iterator[_Block]:
    for run in runs:
        end = run.start + run.tokens
        if run.count > 1 or run.length <= WHOLE:
            yield _Block(run, slice(run.start, end), slice(run.start, end), True)
            continue
        for first in range(run.start, end, BLOCK):
            last = min(first + BLOCK, end)
            seen = run.start if window is None else max(run.start, first - window + 1)
            yield _Block(run, slice(first, last), slice(seen, last), False)


def product(
    q_THD: Tensor, k_TKD: Tensor, v_TKV: Tensor, sinks_H: Tensor | None, runs: Sequence[Run], form: Form
) -> Tensor:
    """Attention of every token to its own document.

    Args:
        q_THD: queries.
        k_TKD: keys, of the same dtype.
        v_TKV: values, of the same dtype.
        sinks_H: score of each head's sink; None without.
        runs: the documents, in order; their tokens are all T.
        form: of the scores.

    Returns:
        (T, H, V), of the same dtype.
    """
    with torch.autocast(q_THD.device.type, enabled=False):
        out: Tensor = _Product.apply(q_THD, k_TKD, v_TKV, sinks_H, tuple(runs), form)
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKV: Tensor,
        sinks_H: Tensor | None,
        runs: tuple[Run, ...],
        form: Form,
    ) -> Tensor:
        out_THV = q_THD.new_empty(*q_THD.shape[:2], v_TKV.shape[-1])
        kept: list[Tensor | None] = []
        blocks = list(_blocks(runs, form.window))
        for block in blocks:
            states = _States.of(block, q_THD, k_TKD, v_TKV)
            p, _, _ = states.probabilities(form, sinks_H)
            drop = torch.empty_like(p).bernoulli_(1 - form.dropout).div_(1 - form.dropout) if form.dropout else None
            o = torch.bmm(p if drop is None else p * drop, states.v)
            _put(out_THV, block.run, block.queries, _tokens(o, states.shape))
            again = block.run.length > KEPT or form.softcap is not None or sinks_H is not None
            kept += [None if again else p, drop]
        ctx.save_for_backward(q_THD, k_TKD, v_TKV, sinks_H, *kept)
        ctx.blocks, ctx.form = blocks, form
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_TKD, v_TKV, sinks_H, *kept = ctx.saved_tensors
        form: Form = ctx.form
        grad_THV = grads[0].to(q_THD.dtype)
        # Keys of a blocked document get a share from several blocks.
        grad_q, grad_k, grad_v = torch.empty_like(q_THD), torch.zeros_like(k_TKD), torch.zeros_like(v_TKV)
        grad_sinks = (
            None
            if sinks_H is None
            else torch.zeros_like(sinks_H, dtype=torch.promote_types(sinks_H.dtype, torch.float32))
        )
        for at, block in enumerate(ctx.blocks):
            states = _States.of(block, q_THD, k_TKD, v_TKV)
            p, drop = kept[2 * at], kept[2 * at + 1]
            bent = sink = None
            if p is None:
                p, bent, sink = states.probabilities(form, sinks_H)
            go = _rows(_take(grad_THV, block.run, block.queries), states.shape)
            gv = torch.bmm((p if drop is None else p * drop).transpose(1, 2), go)
            gp = torch.bmm(go, states.v.transpose(1, 2))
            if drop is not None:
                gp = gp.mul_(drop)
            if grad_sinks is not None and sink is not None:
                taken = -(sink * (gp * p).sum(-1, keepdim=True, dtype=sink.dtype))
                grad_sinks += _by_head(taken, states.shape)
            gs = torch._softmax_backward_data(gp, p, -1, p.dtype)
            if bent is not None:
                gs = gs * (1 - bent * bent)
            gq = torch.bmm(gs, states.k)
            gk = torch.bmm(gs.transpose(1, 2), states.q).mul_(form.scaling)
            _put(grad_q, block.run, block.queries, _tokens(gq.mul_(form.scaling), states.shape))
            add = not block.whole
            _put(grad_k, block.run, block.keys, _key_tokens(gk, states.shape), add)
            _put(grad_v, block.run, block.keys, _key_tokens(gv, states.shape), add)
        if grad_sinks is not None:
            grad_sinks = grad_sinks.to(sinks_H.dtype)
        return grad_q, grad_k, grad_v, grad_sinks, None, None


@dataclass(frozen=True)
class _Shape:
    """n documents, Q queries and W keys each, K key heads of R query heads."""

    n: int
    Q: int
    W: int
    K: int
    R: int


@dataclass(frozen=True)
class _States:
    """One block's queries, keys and values, ready for products.

    Attributes:
        q: (n*K, R*Q, D).
        k: (n*K, W, D).
        v: (n*K, W, V).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    shape: _Shape
    block: _Block

    @classmethod
    def of(cls, block: _Block, q_THD: Tensor, k_TKD: Tensor, v_TKV: Tensor) -> _States:
        run, heads, groups = block.run, q_THD.shape[1], k_TKD.shape[1]
        queries = run.length if block.whole else block.queries.stop - block.queries.start
        keys = run.length if block.whole else block.keys.stop - block.keys.start
        shape = _Shape(run.count, queries, keys, groups, heads // groups)
        q = _rows(_take(q_THD, run, block.queries), shape)
        k, v = (_key_rows(_take(states, run, block.keys), shape) for states in (k_TKD, v_TKV))
        return cls(q, k, v, shape, block)

    def probabilities(self, form: Form, sinks_H: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(n*K, R*Q, W); the tanh of capped scores; and of each query what the sink takes, (n*K, R*Q, 1)."""
        q, shape = self.q, self.shape
        scores = torch.bmm(q, self.k.transpose(1, 2)).mul_(form.scaling)
        bent = None
        if form.softcap is not None:
            bent = torch.tanh(scores / form.softcap)
            scores = bent * form.softcap
        scores.view(-1, shape.Q, shape.W).add_(self.block.hidden(shape, form.window, scores))
        wide = torch.float32 if scores.dtype in (torch.bfloat16, torch.float16) else scores.dtype
        if sinks_H is None:
            return torch.softmax(scores, -1, dtype=wide).to(scores.dtype), bent, None
        column = sinks_H.view(1, shape.K, shape.R, 1, 1).expand(shape.n, -1, -1, shape.Q, 1)
        column = column.reshape(shape.n * shape.K, shape.R * shape.Q, 1).to(scores.dtype)
        whole = torch.softmax(torch.cat([scores, column], -1), -1, dtype=wide)
        return whole[..., :-1].to(scores.dtype), bent, whole[..., -1:]


# Between the tokens of a run, (tokens, heads, width) with documents of any length, and the rows of its products.


def _take(states: Tensor, run: Run, tokens: slice) -> Tensor:
    """The tokens of a run, its documents filled up to one length with zeros."""
    taken = states[tokens]
    if run.even:
        return taken
    filled = states.new_zeros(run.count * run.length, *states.shape[1:])
    return filled.index_copy_(0, run.places(states.device), taken)


def _put(target: Tensor, run: Run, tokens: slice, found: Tensor, add: bool = False) -> None:
    """Write what was found for (filled up) tokens of a run to its tokens."""
    if not run.even:
        found = found.flatten(0, 1).index_select(0, run.places(found.device))
    place = target[tokens].view(found.shape)
    if add:
        place.add_(found)
    else:
        place.copy_(found)


def _rows(states: Tensor, shape: _Shape) -> Tensor:
    """(n*Q, H, D) to (n*K, R*Q, D)."""
    split = states.view(shape.n, shape.Q, shape.K, shape.R, -1)
    return split.permute(0, 2, 3, 1, 4).reshape(shape.n * shape.K, shape.R * shape.Q, -1)


def _tokens(rows: Tensor, shape: _Shape) -> Tensor:
    """(n*K, R*Q, D) back to (n, Q, H, D)."""
    split = rows.view(shape.n, shape.K, shape.R, shape.Q, -1).permute(0, 3, 1, 2, 4)
    return split.flatten(2, 3)


def _key_rows(states: Tensor, shape: _Shape) -> Tensor:
    """(n*W, K, D) to (n*K, W, D)."""
    return states.view(shape.n, shape.W, shape.K, -1).transpose(1, 2).flatten(0, 1)


def _key_tokens(rows: Tensor, shape: _Shape) -> Tensor:
    """(n*K, W, D) back to (n, W, K, D)."""
    return rows.view(shape.n, shape.K, shape.W, -1).transpose(1, 2)


def _by_head(values: Tensor, shape: _Shape) -> Tensor:
    """(n*K, R*Q, 1) summed to (H,)."""
    return values.view(shape.n, shape.K, shape.R, shape.Q).sum((0, 3)).flatten()
