"""Self-speculative decoding: a model with linearized layers drafts tokens for its own original.

The draft proposes k tokens one after another; the original runs all of them in one forward pass,
keeps those that are its own greedy choice and adds its next one. Its output is therefore what it
would have said alone, in fewer passes over its weights. (Leviathan et al., arXiv 2211.17192; a
model that drafts for itself: Zhang et al., arXiv 2309.08168.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import nbl_kernels as nk

from ..calibration import Calibration
from ..checks import DRAFT_ORDER, check_model, check_no_draft
from ..layers.fused import FusedLayer, fuse
from ..layers.spec import config_entry, layer_specs
from ..linearize import chosen_layers, linear_layers
from ..models import family_of
from ..upstream import capture_once
from .step import Stack

__all__ = [
    "DraftReport",
    "Drafting",
    "check_draft",
    "count_accepted",
    "draft_model",
    "draft_stacks",
]


@dataclass
class DraftReport:
    """How drafting went, over one call of :meth:`nbl.Runner.generate` or ``stream``.

    passes: forward passes of the model itself after the prompt's, each of which gave one token and
    those of the draft that it accepted. In a batch, a token of every row counts once.
    """

    proposed: int = 0
    accepted: int = 0
    passes: int = 0

    @property
    def rate(self) -> float:
        """Accepted of the proposed tokens; 0.0 where none was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """1.0: no gain; k + 1: every draft of k tokens was accepted."""
        return 1 + self.accepted / self.passes if self.passes else 1.0


def draft_model(
    model: PreTrainedModel,
    cal: Calibration,
    layers: int | Iterable[int],
    *,
    criterion: str = "residual",
    ridge: float = 1e-4,
    bias: bool = True,
    rank: int | None = None,
    batches: Iterable[Any] | None = None,
    maps: Mapping[int, nk.Lmmse] | None = None,
) -> PreTrainedModel:
    """The linearized model as a second model, which shares every weight with its original.

    What :func:`nbl.linearize` with the same arguments would make of `model`, with nothing copied:
    the embedding, the head, the norms and the layers that keep their attention are the very modules
    of `model`, a replaced layer shares its MLP and norms; only the maps are new. `model` stays what
    it is. For speculative decoding, in which the draft proposes tokens and the original decides::

        draft = nbl.draft_model(model, cal, layers=8)
        model.generate(ids, assistant_model=draft)  # transformers' own
        nbl.Runner(model, 1, 2048, draft=draft).generate(prompts, 100, draft_layers=8)

    The draft has a configuration of its own, generates, and may be saved as any linearized model.
    Shared modules are shared in every respect: hooks on them, ``train``, ``to`` and
    :func:`nbl.optimize` concern both models (after ``model.to(…)`` call ``draft.to(…)`` too), and
    the attention implementation is the original's. Where `model` is optimized, the replaced layers
    are, on the weights that are packed already; the draft goes on working when `model` is restored
    or optimized later.

    Args: those of :func:`nbl.linearize`. The maps are kept in the order of `layers` (the
        criterion's, for a number), which is the order in which ``draft_layers`` takes them.

    Raises:
        ValueError: as linearize; a model that is a draft itself.
    """
    check_model(model)
    check_no_draft(model)
    cal.check_model(model)
    if cal.down_proj:
        raise ValueError(
            "cal: expected one without refitted down projections, which a draft shares with its "
            "original"
        )
    options = {"ridge": ridge, "bias": bias, "rank": rank}
    layers = chosen_layers(model, cal, layers, criterion, batches, **options)
    own = linear_layers(model, cal, layers, **options, maps=maps)
    family = family_of(model)
    config = copy.deepcopy(model.config)
    config.__class__ = family.nbl_config
    config.nbl = config_entry(layer_specs(config) | {i: layer.spec for i, layer in own.items()})
    with torch.device("meta"):
        draft = family.nbl_causal_lm(config)
    draft.generation_config = copy.deepcopy(model.generation_config)
    capture_once(model.model, draft.model)
    draft.model.embed_tokens = model.model.embed_tokens
    for i, layer in enumerate(model.model.layers):
        if i in own:
            own[i].train(layer.training)
            if isinstance(layer, FusedLayer):
                fuse(own[i])
        draft.model.layers[i] = own.get(i, layer)
    draft.model.norm = model.model.norm
    draft.model.rotary_emb = model.model.rotary_emb
    draft.lm_head = model.lm_head
    draft.training, draft.model.training = model.training, model.model.training
    setattr(draft, DRAFT_ORDER, tuple(own))
    return draft


def count_accepted(drafted: Tensor, exact: Tensor, done: Tensor, stop: Tensor) -> int:
    """How many drafted tokens (B, k) are the model's own choice, in every row of the batch.

    exact (B, k + 1): what the model says at the place of each drafted token, and after the last.
    Rows that are `done` (B,), or end here with a token of `stop`, accept everything; where no row
    is left, counting ends.
    """
    exact = exact[:, :-1]
    ended = done[:, None] | (torch.isin(exact, stop).cumsum(dim=1) > 0)
    goes_on = ((drafted == exact) | ended).all(dim=0) & ~ended.all(dim=0)
    return int(goes_on.long().cumprod(dim=0).sum())


def check_draft(draft: PreTrainedModel, model: PreTrainedModel) -> None:
    """ValueError unless draft_model made `draft` of this model, as it is now."""
    if not isinstance(draft, PreTrainedModel) or getattr(draft, DRAFT_ORDER, None) is None:
        raise ValueError(f"draft: expected what nbl.draft_model made, got {type(draft).__name__}")
    own, layers, shared = getattr(draft, DRAFT_ORDER), draft.model.layers, model.model.layers
    same = draft.lm_head is model.lm_head and len(layers) == len(shared)
    if not same or not all(
        a.mlp is b.mlp and (a is b or i in own) for i, (a, b) in enumerate(zip(layers, shared))
    ):
        raise ValueError("draft: it was made of another model, or this one was changed since")
    places = {(p.dtype, p.device) for i in own for p in layers[i].parameters()}
    if len(places) > 1:
        raise ValueError(f"draft: expected weights of one dtype on one device, got {places}")


def draft_stacks(stack: Stack, draft: PreTrainedModel | None) -> list[Stack]:
    """The draft's layers in use: none of its own, the first in its order, the first two, …"""
    if draft is None:
        return []
    stacks = [stack]
    for i in getattr(draft, DRAFT_ORDER):
        layers, kept = list(stacks[-1].layers), list(stacks[-1].kept)
        layers[i], kept[i] = draft.model.layers[i], None
        fuse(layers[i])
        stacks.append(Stack(layers, kept))
    return stacks


class Drafting:
    """How many tokens are drafted at a time, and how that went."""

    def __init__(self, stack: Stack, tokens: int | None, most: int, report: DraftReport) -> None:
        self.stack = stack
        self.report = report
        self._most = most
        self._fixed = tokens is not None
        self._next = tokens or 1

    def count(self, room: int) -> int:
        """`room`: the tokens that are still wanted. The model's pass gives one itself."""
        return min(self._next, self._most, room - 1)

    def note(self, proposed: int, accepted: int) -> None:
        self.report.proposed += proposed
        self.report.accepted += accepted
        self.report.passes += 1
        if not self._fixed:
            self._next = accepted + 1
