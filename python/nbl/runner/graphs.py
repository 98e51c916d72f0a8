"""The decode step as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.tokens import TokenSpan
from .requests import PromptBatch
from .rings import Rings
from .step import MOST_ROWS, Span, Stack, States

__all__ = ["Graphs"]

_SMALLEST_BUCKET = 128  # of cache slots


class Graphs:
    """The decode step as CUDA graphs, for each batch size and each bucket of cache slots.

    A graph replays fixed addresses: tokens, slot and padding are read from buffers that a step
    fills, and the logits are left in one. The slots beyond the one in use, up to the bucket's end,
    are masked, so that a short text pays for a short cache.
    """

    def __init__(
        self,
        forward: Callable[[Stack, Tensor, Span], Tensor],
        stacks: Sequence[Stack],
        states: States,
        rings: Rings,
        attend: Any,
        caches: Sequence[Tensor],
        *,
        vocab_size: int,
    ) -> None:
        """forward: the logits (B, T, vocab_size) of a step. stacks: whose layers it may run.
        attend, caches: the attention, and what it reads, (layers, rows, heads, slots, head_dim)."""
        self.forward = forward
        self.stacks = stacks
        self.states = states
        self.rings = rings
        self.attend = attend
        self.caches = caches
        self.max_length, self.device = caches[0].shape[3], caches[0].device
        rows = caches[0].shape[1]
        most = max(rows, MOST_ROWS)  # of tokens in one step
        self.tokens = torch.zeros(most, dtype=torch.long, device=self.device)
        self.slot = torch.zeros(1, dtype=torch.long, device=self.device)
        self.padding = torch.zeros(rows, dtype=torch.long, device=self.device)
        where = {"dtype": caches[0].dtype, "device": self.device}
        self.logits = torch.empty((most, vocab_size), **where)
        self.graphs: dict[tuple[Any, ...], Any] = {}
        self.pool: Any = None  # of the graphs' memory: only one of them runs at a time
        self.weights: tuple[int, ...] = ()

    def prepare(self, model: nn.Module, rows: int, first: int, end: int) -> None:
        """Before a call on `rows` prompts whose new tokens go into slots first to end."""
        modules = (model, *(layer for stack in self.stacks for layer in stack.layers))
        weights = tuple(t.data_ptr() for m in modules for t in (*m.parameters(), *m.buffers()))
        if weights != self.weights:  # graphs hold their addresses
            self.graphs.clear()
            self.pool = None
            self.weights = weights
        if self.attend.reads_free_slots:
            # They are multiplied by zero: no infinity of an earlier call may be left in them.
            for cache in self.caches:
                cache[:, :rows, :, first : self.bucket(end)] = 0

    def decode(self, stack: Stack, batch: PromptBatch, tokens: Tensor, slot: int) -> Tensor:
        rows, length = tokens.shape
        self.tokens[: rows * length].view(rows, length).copy_(tokens)
        self.slot.fill_(slot)
        if batch.padding is None:
            self.padding.zero_()
        else:
            self.padding[:rows].copy_(batch.padding)
        self.attend.prepare_step(batch, slot, length)
        self.run(stack, rows, length, self.bucket(slot + length))
        return self.logits[: rows * length].view(rows, length, -1)

    def bucket(self, slots: int) -> int:
        """The next power of two of slots; all slots, where those that are free are not read."""
        if not self.attend.reads_free_slots:
            return self.max_length
        size = max(_SMALLEST_BUCKET, 1 << (slots - 1).bit_length())
        return min(size, self.max_length)

    def run(self, stack: Stack, rows: int, length: int, bucket: int) -> None:
        states = self.states
        step = (stack, rows, length, bucket)
        key = (*step, states.observing)
        with torch.cuda.device(self.device):
            graph = self.graphs.get(key)
            if graph is None:
                saved = states.save(rows)
                graph = self.graphs[key] = self.capture(*step)
                states.restore(saved)  # capturing ran the step, which took them on
            graph.replay()

    def capture(self, *step: Any) -> Any:
        # What libraries set up when first used must not be captured: the step runs before, on
        # another stream. It writes to its own slots only, what the replay will write again.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step(*step)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step(*step)
        self.pool = graph.pool()
        return graph

    def step(self, stack: Stack, rows: int, length: int, bucket: int) -> None:
        """One decode step between the buffers; everything that varies is in a tensor."""
        padding = self.padding[:rows, None]
        own = self.slot + torch.arange(length, device=self.device)
        views = self.attend.step_views(rows, length, bucket, padding, own)
        memory = TokenSpan(mask=own >= padding) if self.states else None
        rings = self.rings.step_views(own, padding)
        span = Span((own - padding).clamp_min(0), own, views, memory, rings)
        logits = self.forward(stack, self.tokens[: rows * length].view(rows, length), span)
        self.logits[: rows * length].copy_(logits.flatten(0, 1))
