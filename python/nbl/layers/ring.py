"""Attention to the last tokens of a sequence and to its first ones, and the ring that keeps them.

Token i of a sequence sees token m where ``m <= i`` and (``i - m < size`` or ``m < sinks``). Tokens
are counted sequence by sequence, padding is not. Keys and values of those that are still seen lie
in ``sinks + length`` slots, ``length >= size``: token m in slot m if it is a sink, otherwise in
slot ``sinks + (m - sinks) % length``, where the one before it is seen no more.

Prompts are attended block by block: a block of b queries sees the sinks, size - 1 tokens before it
and itself, so the work grows with tokens · size. Later tokens are attended to the ring as it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..window import Window

__all__ = [
    "FEW",
    "append",
    "attend_prompt",
    "attend_ring",
    "earlier",
    "in_order",
    "ring_slots",
    "token_order",
    "visible_slots",
]

# So many new tokens, and they are attended to the ring: it has room for them beside those that the
# first of them still sees.
FEW = 16
_BLOCKS = (64, 256)  # the fewest and the most queries of a block


def ring_slots(index: Tensor, window: Window, length: int) -> Tensor:
    """The slot of each token; negative for negative ones, padding."""
    behind = index - window.sinks
    return torch.where(behind < 0, index, window.sinks + behind % length)


def visible_slots(index: Tensor, window: Window, length: int) -> Tensor:
    """(R, T, sinks + length) bool: which slots the tokens (R, T) see, the last of them the newest
    that was written. Padding sees slot 0: some kernels make NaN of a row of nothing."""
    slots = torch.arange(window.sinks + length, device=index.device)
    newest = index.amax(dim=-1, keepdim=True) - window.sinks
    behind = newest - (newest - (slots - window.sinks)) % length  # the last one written there
    token = torch.where(slots < window.sinks, slots, behind + window.sinks)
    token = torch.where((slots >= window.sinks) & (behind < 0), -1, token)[:, None]
    own = index[..., None]
    near = (own - token < window.size) | (token < window.sinks)
    return ((token >= 0) & (token <= own) & near) | ((own < 0) & (slots == 0))


def attend_ring(
    q: Tensor, keys: Tensor, values: Tensor, index: Tensor, window: Window, scaling: float
) -> Tensor:
    """(B, T, H, D) of a few tokens q (B, H, T, D), whose keys are in the ring already.

    keys, values: (B, H_kv, sinks + length + 1, D); index: (B or 1, T), negative for padding.
    """
    slots = keys.shape[2] - 1
    mask = visible_slots(index, window, slots - window.sinks)[:, None]
    y = F.scaled_dot_product_attention(
        q,
        keys[:, :, :slots],
        values[:, :, :slots],
        attn_mask=mask,
        scale=scaling,
        enable_gqa=True,
    )
    return y.transpose(1, 2)


@torch.no_grad()
def append(
    ring: tuple[Tensor, Tensor], k: Tensor, v: Tensor, index: Tensor, window: Window
) -> None:
    """Writes the keys and values (B, H_kv, T, D) of tokens `index` (B or 1, T), negative for
    padding, to the ring: of more than it holds the newest, and the sinks."""
    spare = ring[0].shape[2] - 1  # what nobody reads
    length = spare - window.sinks
    kept = (index < window.sinks) | (index > index.amax(dim=-1, keepdim=True) - length)
    slots = torch.where(kept & (index >= 0), ring_slots(index, window, length), spare)
    slots = slots[:, None, :, None].expand(k.shape)
    for slot, new in zip(ring, (k, v), strict=True):
        slot.scatter_(2, slots, new.detach().to(slot.dtype))


def earlier(
    ring: tuple[Tensor, Tensor], first: Tensor, window: Window, count: int
) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H_kv, count, D) of the tokens before `first` (B or 1,), in order; what is
    not there is anything."""
    keys = ring[0]
    length = keys.shape[2] - 1 - window.sinks
    before = first[:, None] - count + torch.arange(count, device=first.device)
    slots = ring_slots(before, window, length).clamp_min(0)
    slots = slots[:, None, :, None].expand(*keys.shape[:2], count, keys.shape[3])
    return keys.gather(2, slots), ring[1].gather(2, slots)


def attend_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    scaling: float,
    *,
    first: Tensor | None = None,
    before: tuple[Tensor, Tensor] | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """(B, T, H, D) of q (B, H, T, D) and k, v (B, H_kv, T, D), the tokens of their sequences from
    `first` (B or 1,) on; negative ones are padding. None: from 0 on, nothing before.

    before: keys and values of the last tokens before those; None: there are none. sinks: those of
    the first tokens of the sequences; None: they are among k and v.
    """
    length = q.shape[2]
    if first is None and length <= window.size:
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=length > 1, scale=scaling, enable_gqa=True, dropout_p=dropout
        )
        return y.transpose(1, 2)
    if first is None:
        first = torch.zeros(1, dtype=torch.long, device=q.device)
    if sinks is None:
        sinks = tuple(_first_of(t, first, window.sinks) for t in (k, v))
    count = 0 if before is None else before[0].shape[2]
    block = min(length, max(_BLOCKS[0], min(window.size, _BLOCKS[1])))
    blocks = -(-length // block)
    # Every block sees as many tokens before it; for the first ones some of them are not there.
    missing = max(0, min(window.size - 1, count + (blocks - 1) * block) - count)
    room = blocks * block - length  # up to whole blocks: later than everything, seen by nothing
    seen = block + count + missing

    def in_blocks(new: Tensor, i: int) -> Tensor:
        """(B · blocks, H_kv, sinks + seen, D)."""
        new = new if before is None else torch.cat([before[i].to(new.dtype), new], dim=2)
        new = F.pad(new, (0, 0, missing, room)).unfold(2, seen, block).permute(0, 2, 1, 4, 3)
        own = sinks[i].to(new.dtype)[:, None].expand(-1, blocks, -1, -1, -1)
        return torch.cat([own, new], dim=3).flatten(0, 1)

    queries = F.pad(q, (0, 0, 0, room)).unflatten(2, (blocks, block)).transpose(1, 2)
    mask = _visible_in_blocks(first, window, blocks, block, count + missing)
    y = F.scaled_dot_product_attention(
        queries.flatten(0, 1),
        in_blocks(k, 0),
        in_blocks(v, 1),
        attn_mask=mask.expand(len(q), -1, -1, -1).flatten(0, 1)[:, None],
        scale=scaling,
        enable_gqa=True,
        dropout_p=dropout,
    )
    return y.unflatten(0, (len(q), blocks)).transpose(2, 3).flatten(1, 2)[:, :length]


def token_order(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(where the tokens of rows (B, T) are, those that are there in front; the way back)."""
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    return order, torch.argsort(order, dim=1)


def in_order(t: Tensor, order: Tensor) -> Tensor:
    """(B, H, T, D) with its tokens in this order (B, T)."""
    return t.gather(2, order[:, None, :, None].expand(t.shape))


def _first_of(t: Tensor, first: Tensor, count: int) -> Tensor:
    """Of (B, H_kv, T, D), whose tokens begin at `first`, the tokens 0 to count - 1; anything for
    those behind the last."""
    where = torch.arange(count, device=t.device) - first[:, None]
    where = where.clamp(0, t.shape[2] - 1)[:, None, :, None]
    return t.gather(2, where.expand(*t.shape[:2], count, t.shape[3]))


def _visible_in_blocks(
    first: Tensor, window: Window, blocks: int, block: int, before: int
) -> Tensor:
    """(R, blocks, block, sinks + before + block) bool."""
    start = first[:, None] + block * torch.arange(blocks, device=first.device)
    near = torch.arange(block + before, device=first.device) - before
    own = (start[..., None] + near[before:])[..., None]
    token = (start[..., None] + near)[..., None, :]
    seen = (token <= own) & (own - token < window.size) & (token >= window.sinks)
    seen |= (token == own) & (own < 0)  # padding sees itself
    is_sink = torch.arange(window.sinks, device=first.device) <= own
    return torch.cat([is_sink, seen], dim=-1)
