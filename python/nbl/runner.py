"""Runner: generation without transformers' overhead, on a cache of its own.

One forward pass over the fused layers (:mod:`nbl.fused`) serves prefill, in chunks, and decode. The
cache has room for the layers that kept their attention and is allocated once; prompts of different
lengths are aligned on their right, so that a step writes one slot of it and reads the slots before
as they lie. The attention itself is a library's (:mod:`nbl.attention`). Layers with a memory keep
their states beside the cache, and go back to earlier ones where drafted tokens are rejected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import nbl_kernels as nk

from .attention import FlashInferAttention, SdpaAttention, allocate_cache, load_flashinfer
from .drafting import DraftReport, count_accepted
from .fused import FusedHead, FusedLayer, add_linear, fuse
from .linearization import DRAFT_ORDER
from .models import LinearizedDecoderLayer, MemorySpan, family_of
from .optimization import optimize
from .plain import LINEARS, is_plain
from .quantized import scale_of
from .upstream import NORMS, rotation_table, sliding_window

__all__ = ["Runner"]

_HEADS = (*LINEARS, FusedHead)
_SMALLEST_BUCKET = 128  # of cache slots, for CUDA graphs
# Rows of one forward pass up to which the linears read their weights once, and a row's result does
# not depend on the others: drafted tokens are verified in no more.
_MOST_ROWS = 16


class Runner:
    """Generates with a model, greedily or by sampling, for a batch of prompts at a time.

    Args:
        model: what :func:`nbl.optimize` takes, linearized or not; it is optimized in place, if it
            is not yet, and its weights are used, not copied. While a runner is in use, the model
            may generate on its own, but not be linearized, restored or moved.
        max_batch_size: the most prompts at once.
        max_length: the most tokens of the longest prompt and its continuation together.
        prefill_chunk: the most prompt tokens, of the whole batch, in one forward pass.
        cuda_graphs: replay the decode step as a CUDA graph, one for each batch size and for each
            power of two of cache slots in use, captured when first needed. Not yet run on a GPU:
            compare its tokens with those of a runner without graphs before relying on it.
        draft: what :func:`nbl.draft_model` made of `model`, for :meth:`generate` with
            ``draft_layers``. It uses the weights and the cache of `model`.
        attention: "sdpa", PyTorch's ``scaled_dot_product_attention``, or "flashinfer" (the extra
            ``flashinfer``; a bfloat16 or float16 model on a GPU), which reads padding and free
            slots of the cache in no step. Not yet run on a GPU: compare its tokens with those of
            "sdpa" before relying on it.

    The model's sliding windows and rotary scaling (Llama 3's among them) are respected; a window
    saves reading, not memory. Dropout is never applied.

    Raises:
        ValueError: what optimize refuses; rotary types that depend on the length of the text
            ("dynamic", "longrope"); cuda_graphs for a model that is not on a GPU; a draft of
            another model; an attention that cannot run the model.
        ImportError: FlashInfer is asked for and not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_batch_size: int,
        max_length: int,
        *,
        prefill_chunk: int = 2048,
        cuda_graphs: bool = False,
        draft: PreTrainedModel | None = None,
        attention: str = "sdpa",
    ) -> None:
        sizes = {
            "max_batch_size": max_batch_size,
            "max_length": max_length,
            "prefill_chunk": prefill_chunk,
        }
        for name, value in sizes.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
        family_of(model)
        cos, sin = rotation_table(model, max_length)
        head = model.lm_head
        if not is_plain(head, _HEADS):
            raise ValueError(f"lm_head: expected a plain nn.Linear, got {type(head).__name__}")
        weight = model.model.norm.weight
        if cuda_graphs and weight.device.type != "cuda":
            raise ValueError(f"cuda_graphs: the model is on {weight.device}, not on a GPU")
        if attention not in ("sdpa", "flashinfer"):
            raise ValueError(f'attention: expected "sdpa" or "flashinfer", got {attention!r}')
        if attention == "flashinfer":
            flashinfer = load_flashinfer(weight.device, weight.dtype)
        if draft is not None:
            _check_draft(draft, model)
        optimize(model)

        self.model = model
        self.last_draft: DraftReport | None = None  # of the call that last drafted
        self.max_batch_size = max_batch_size
        self.max_length = max_length
        self.prefill_chunk = prefill_chunk
        self.device = weight.device
        self._dtype = weight.dtype
        self._layers = list(model.model.layers)
        self._stack = _Stack(self._layers, _kept_layers(self._layers))
        self._drafts = _draft_stacks(self._stack, draft)
        kept = [k for k in self._stack.kept if k is not None]
        where = {"device": self.device, "dtype": self._dtype}
        shape = (0, max_batch_size, 0, max_length, 0)
        if kept:
            first = self._layers[self._stack.kept.index(kept[0])]
            shape = (len(kept), *shape[1:2], kept[0].kv_heads, max_length, first.self_attn.head_dim)
        self.keys = allocate_cache(shape, **where)
        self.values = allocate_cache(shape, **where)
        windows, heads = {k.window: k.scaling for k in kept}, model.config.num_attention_heads
        if attention == "flashinfer":
            self._attend = FlashInferAttention(flashinfer, windows, heads, shape[1:], **where)
        else:
            self._attend = SdpaAttention(windows, heads, model.config.num_key_value_heads)
        self._states = _States(self._stack, self._drafts, max_batch_size)
        self._cos, self._sin = cos, sin
        self._call = 0  # which call the cache belongs to
        self._graphs = _Graphs(self) if cuda_graphs else None

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of the cache: nothing for linearized layers."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def state_bytes(self) -> int:
        """Memory of the states of layers with a memory: of one size however long the text."""
        return self._states.nbytes

    # --- what users call -------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Any] | Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: int | Iterable[int] | None = None,
        draft_layers: int | None = None,
        draft_tokens: int | None = None,
    ) -> list[Tensor]:
        """The continuation of every prompt: a list of LongTensors (length,) on the CPU.

        Args:
            prompts: a LongTensor (B, T), or a sequence of token sequences of any lengths.
            max_new_tokens: the most tokens to add. The longest prompt and these together must fit
                into max_length.
            attention_mask: (B, T), 1 where `prompts` holds a token and 0 where padding.
            temperature: 0 is greedy; otherwise the logits are divided by it and a token is drawn.
            top_k: draw among the k likeliest only.
            top_p: draw among the fewest likeliest tokens whose probability reaches p only.
            seed: of the draws; None: PyTorch's own generator.
            stop: token ids that end a row (and are its last token). None: those of the model's
                generation_config; an empty list: none.
            draft_layers: so many layers of the runner's draft, the first in its order, propose
                tokens (self-speculative decoding). The tokens are those of greedy decoding without
                a draft; where two logits differ by no more than rounding (as in bfloat16, where a
                pass over several tokens may round otherwise), either may be taken.
                :attr:`last_draft` says how many were accepted. Greedy only, up to 8 prompts.
            draft_tokens: how many tokens are proposed at a time, fewer at the end and where they
                and the prompts' rows would exceed 16. None: one more than were accepted last.

        Drafting needs no memory but the maps': the draft reads the cache of the model, writes what
        it proposes behind that, and the model's own pass over the proposed tokens overwrites it. A
        token of a batch is accepted when every row that has not ended accepts its own.

        Raises:
            ValueError: naming the argument, before anything runs.
            RuntimeError: the model was changed since the runner was made.
        """
        rows: list[Tensor] = []
        for tokens in self.stream(
            prompts,
            max_new_tokens,
            attention_mask=attention_mask,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            draft_layers=draft_layers,
            draft_tokens=draft_tokens,
        ):
            rows.append(tokens)
        new = torch.stack(rows, dim=1).cpu()
        return [row[row >= 0] for row in new]

    def stream(
        self,
        prompts: Sequence[Any] | Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: int | Iterable[int] | None = None,
        draft_layers: int | None = None,
        draft_tokens: int | None = None,
    ) -> Iterator[Tensor]:
        """As :meth:`generate`, a step at a time: yields the new tokens (B,) of each step, on the
        model's device, -1 for rows that have ended. Arguments are checked at once; the prompts run
        when the first step is asked for.

        The cache belongs to the call that began last: a stream that is resumed after another call
        began raises RuntimeError. One that is left unfinished blocks nothing.
        """
        batch = self._batch(prompts, attention_mask)
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected a positive int, got {max_new_tokens!r}")
        self._check_room(batch.length, max_new_tokens)
        sampler = _Sampler(temperature, top_k, top_p, seed, self.device)
        stop_ids = torch.tensor(self._stop_ids(stop), dtype=torch.long, device=self.device)
        drafting = self._drafting(batch, draft_layers, draft_tokens, temperature)
        return self._steps(batch, max_new_tokens, sampler, stop_ids, drafting)

    def logits(
        self,
        prompts: Sequence[Any] | Tensor,
        *,
        attention_mask: Tensor | None = None,
        prompt_length: int | None = None,
    ) -> list[Tensor]:
        """The logits (T, vocab) at every token of every prompt, as generation would compute them.

        prompt_length: how many tokens (of the longest prompt) are run as a prompt; those after are
        run one at a time, as new tokens. None: all of them are prompt.
        """
        batch = self._batch(prompts, attention_mask)
        self._check_room(batch.length, 0)
        first = batch.length if prompt_length is None else prompt_length
        if not 1 <= first <= batch.length:
            raise ValueError(f"prompt_length: expected 1 to {batch.length}, got {prompt_length!r}")
        self._begin(batch, first, batch.length)
        parts = self._prefill(batch, first, every=True)
        for slot in range(first, batch.length):
            tokens = batch.ids[:, slot : slot + 1]
            parts.append(self._decode(self._stack, batch, tokens, slot).clone())
        logits = torch.cat(parts, dim=1)
        return [row[batch.length - n :] for row, n in zip(logits, batch.lengths)]

    # --- requests --------------------------------------------------------------------------------

    def _batch(self, prompts: Sequence[Any] | Tensor, attention_mask: Tensor | None) -> _Batch:
        rows = _token_rows(prompts, attention_mask, self.model.config.vocab_size)
        if len(rows) > self.max_batch_size:
            raise ValueError(
                f"prompts: got {len(rows)}, the runner has max_batch_size {self.max_batch_size}"
            )
        lengths = [len(row) for row in rows]
        length = max(lengths)
        ids = torch.zeros((len(rows), length), dtype=torch.long)
        for row, tokens in zip(ids, rows):
            row[length - len(tokens) :] = tokens
        padding = visible = None
        if min(lengths) < length:
            padding = torch.tensor([length - n for n in lengths], device=self.device)
            slots = torch.arange(self.max_length, device=self.device)
            visible = slots >= padding[:, None]
        return _Batch(ids.to(self.device), lengths, length, padding, visible)

    def _check_room(self, length: int, new: int) -> None:
        if length + new > self.max_length:
            asked = f"a prompt of {length} tokens" + (f" and {new} new ones" if new else "")
            raise ValueError(f"{asked} exceed the runner's max_length {self.max_length}")

    def _stop_ids(self, stop: int | Iterable[int] | None) -> list[int]:
        if stop is None:
            stop = self.model.generation_config.eos_token_id
        if stop is None:
            return []
        ids = [stop] if isinstance(stop, int) else list(stop)
        if any(type(i) is not int for i in ids):
            raise ValueError(f"stop: expected token ids, got {stop!r}")
        return ids

    def _drafting(
        self,
        batch: _Batch,
        draft_layers: int | None,
        draft_tokens: int | None,
        temperature: float,
    ) -> _Drafting | None:
        if draft_layers is None:
            if draft_tokens is not None:
                raise ValueError(f"draft_tokens: needs draft_layers, got {draft_tokens!r}")
            return None
        if not self._drafts:
            raise ValueError(
                "draft_layers: this runner has no draft; make it with draft=nbl.draft_model(…)"
            )
        if type(draft_layers) is not int or not 1 <= draft_layers < len(self._drafts):
            raise ValueError(
                f"draft_layers: expected a number from 1 to {len(self._drafts) - 1}, the draft's "
                f"layers, got {draft_layers!r}"
            )
        if draft_tokens is not None and (type(draft_tokens) is not int or draft_tokens < 1):
            raise ValueError(f"draft_tokens: expected a positive int, got {draft_tokens!r}")
        if temperature > 0:
            raise ValueError(
                f"draft_layers: drafting is greedy, expected temperature 0, got {temperature!r}"
            )
        rows = len(batch.lengths)
        most = _MOST_ROWS // rows - 1
        if most < 1:
            raise ValueError(
                f"draft_layers: expected at most {_MOST_ROWS // 2} prompts, got {rows}: drafted "
                f"tokens are verified in up to {_MOST_ROWS} rows at once"
            )
        self.last_draft = DraftReport()
        return _Drafting(self._drafts[draft_layers], draft_tokens, most, self.last_draft)

    def _begin(self, batch: _Batch, first: int, end: int) -> int:
        """The cache belongs to this call from now on: a prompt up to slot `first`, new tokens up to
        `end`. RuntimeError for a model that was changed."""
        layers, norm = self.model.model.layers, self.model.model.norm
        same = len(layers) == len(self._layers) and all(
            a is b and isinstance(a, FusedLayer) for a, b in zip(layers, self._layers)
        )
        if not same or (norm.weight.dtype, norm.weight.device) != (self._dtype, self.device):
            raise RuntimeError(
                "the model was linearized, restored or moved since this Runner was made; "
                "make a new one"
            )
        drafts = self._drafts[-1].layers if self._drafts else self._layers
        for i, (layer, draft) in enumerate(zip(self._layers, drafts)):
            if not (layer._is_intact() and draft._is_intact()):
                raise RuntimeError(
                    f"layer {i} has hooks or adapters inside, which a Runner would leave out: "
                    "remove them, or use model.generate"
                )
        for name, module, kinds in (
            ("model.norm", norm, NORMS),
            ("lm_head", self.model.lm_head, _HEADS),
        ):
            if not is_plain(module, kinds):
                raise RuntimeError(
                    f"{name} has hooks or is no plain module any more, which a Runner would leave "
                    "out: remove them, or use model.generate"
                )
        if self._graphs is not None:
            self._graphs.prepare(len(batch.lengths), first, end)
        self._states.begin(len(batch.lengths))
        self._call += 1
        return self._call

    def _steps(
        self,
        batch: _Batch,
        max_new_tokens: int,
        sampler: _Sampler,
        stop: Tensor,
        drafting: _Drafting | None,
    ) -> Iterator[Tensor]:
        end = batch.length + max_new_tokens
        call = self._begin(batch, batch.length, end)
        done = torch.zeros(len(batch.lengths), dtype=torch.bool, device=self.device)
        self._states.observing = None if drafting is None else drafting.stack
        run = [sampler(self._prefill(batch, batch.length)[-1][:, -1])]
        slot = batch.length  # of the tokens that come next
        while True:
            for tokens in run:
                yield tokens.masked_fill(done, -1)
                slot += 1
                if slot == end:
                    return
                if len(stop) > 0:
                    done = done | torch.isin(tokens, stop)
                    if bool(done.all()):
                        return
                if self._call != call:
                    raise RuntimeError(
                        "this stream cannot go on: a newer call of the runner took its cache"
                    )
            if drafting is None:
                logits = self._decode(self._stack, batch, run[-1][:, None], slot - 1)
                run = [sampler(logits[:, -1])]
            else:
                run = self._draft(drafting, batch, run[-1], slot - 1, end - slot, done, stop)

    def _draft(
        self,
        drafting: _Drafting,
        batch: _Batch,
        tokens: Tensor,
        slot: int,
        room: int,
        done: Tensor,
        stop: Tensor,
    ) -> list[Tensor]:
        """The greedy tokens (B,) of the next steps, 1 to `room` of them, by one pass of the model
        over `tokens` (B,), which go into `slot`, and over what the draft says will follow them.

        The cache holds what the model wrote for the slots before. The draft's passes write theirs
        from `slot` on, the model's pass writes all of these again, and what it wrote for rejected
        tokens is overwritten before anything attends to it. So it is with the states of memories,
        of the model's layers and of the draft's: the model's pass begins where the draft did, and
        they then go back to the last accepted token.
        """
        rows = len(batch.lengths)
        saved = self._states.save(rows)
        fed = [tokens]
        for i in range(drafting.count(room)):
            logits = self._decode(drafting.stack, batch, fed[-1][:, None], slot + i)
            fed.append(logits[:, -1].argmax(dim=-1))
        fed = torch.stack(fed, dim=1)
        self._states.restore(saved)
        exact = self._decode(self._stack, batch, fed, slot).argmax(dim=-1)
        accepted = count_accepted(fed[:, 1:], exact, done, stop)
        self._states.go_back(rows, accepted)
        drafting.note(fed.shape[1] - 1, accepted)
        return list(exact[:, : accepted + 1].unbind(dim=1))

    # --- the forward pass ------------------------------------------------------------------------

    @torch.inference_mode()
    def _prefill(self, batch: _Batch, end: int, every: bool = False) -> list[Tensor]:
        """Runs slots 0 to end in chunks; logits of every slot, or of the last one only."""
        chunk = max(1, self.prefill_chunk // len(batch.lengths))
        logits = []
        for start in range(0, end, chunk):
            stop = min(start + chunk, end)
            span = self._span(batch, start, stop)
            x = self._forward(self._stack, batch.ids[:, start:stop], span)
            if every:
                logits.append(self._head(x))
            elif stop == end:
                logits.append(self._head(x[:, -1:]))
        return logits

    @torch.inference_mode()
    def _decode(self, stack: _Stack, batch: _Batch, tokens: Tensor, slot: int) -> Tensor:
        """Logits (B, T, vocab) that follow each of a few more tokens (B, T), from `slot` on."""
        if self._graphs is not None:
            return self._graphs.decode(stack, batch, tokens, slot)
        span = self._span(batch, slot, slot + tokens.shape[1])
        return self._head(self._forward(stack, tokens, span))

    def _forward(self, stack: _Stack, ids: Tensor, span: _Span) -> Tensor:
        """The residual stream (B, T, d) after all layers."""
        x = self.model.model.embed_tokens(ids)
        states, own = self._states, stack is self._stack
        for i, (layer, kept) in enumerate(zip(stack.layers, stack.kept)):
            observer = states.observer(i) if own else None
            if observer is not None:
                states.recall(observer, x, span.memory, record=own)
            if kept is not None:
                x = self._attention(layer, kept, x, span)
            elif layer in states:
                x = states.recall(layer, x, span.memory, record=own)
            else:
                x = layer._attention(x)
            x = layer._mlp(x)
        return x

    def _head(self, x: Tensor) -> Tensor:
        norm, head = self.model.model.norm, self.model.lm_head
        options = {"norm_eps": norm.variance_epsilon, "weight_scale": scale_of(head)}
        return nk.norm_linear(x, norm.weight, head.weight, head.bias, **options)

    def _attention(self, layer: Any, kept: _Kept, x: Tensor, span: _Span) -> Tensor:
        """x + o_proj(attention): rotates q and k, appends k and v to the cache, attends to it."""
        rows, length = x.shape[:2]
        keys, values = self.keys[kept.index], self.values[kept.index]
        q = nk.rope_append(
            layer._qkv(x),
            self._cos,
            self._sin,
            span.positions,
            span.slots,
            keys,
            values,
            **kept.head_norms(layer.self_attn),
        )
        y = self._attend(q, keys, values, span.views[kept.window], kept.scaling)
        return add_linear(x, layer.self_attn.o_proj, y.reshape(rows, length, -1))

    def _span(self, batch: _Batch, start: int, end: int) -> _Span:
        """Tokens in slots start to end, their keys and values being appended."""
        positions = slots = torch.arange(start, end, device=self.device)
        if batch.padding is not None:
            positions = (slots - batch.padding[:, None]).clamp_min(0)
        memory = None
        if start < batch.length - min(batch.lengths):
            memory = MemorySpan(mask=batch.visible[:, start:end])
        return _Span(positions, slots, self._attend.views(batch, start, end), memory)


# --- the parts of a request and of a step --------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    ids: Tensor  # (B, length), prompts aligned on their right
    lengths: list[int]
    length: int  # of the longest
    padding: Tensor | None  # (B,), slots before each prompt; None where there are none
    visible: Tensor | None  # (B, max_length), False for those slots


@dataclass(frozen=True)
class _Span:
    """Where the tokens of one step are, in the cache and in the text."""

    positions: Tensor  # (T,) or (B, T), in the text
    slots: Tensor  # (T,), that their keys and values are written to
    views: dict[int | None, Any]  # of the cache, per sliding window
    memory: MemorySpan | None = None  # which of the tokens are there


@dataclass
class _Kept:
    """A layer that kept its attention."""

    index: int  # in the cache
    kv_heads: int
    scaling: float
    window: int | None
    normalizes: bool  # q and k, head by head, before they are rotated

    def head_norms(self, attention: Any) -> dict[str, Any]:
        """Arguments of rope_append."""
        if not self.normalizes:
            return {}
        return {
            "q_norm_weight": attention.q_norm.weight,
            "k_norm_weight": attention.k_norm.weight,
            "norm_eps": attention.q_norm.variance_epsilon,
        }


@dataclass(frozen=True, eq=False)
class _Stack:
    """The decoder layers of a forward pass: the model's own, or a draft's."""

    layers: list[Any]
    kept: list[_Kept | None]  # None for the layers without attention


class _States:
    """What the layers with a memory keep: of the model's stack, and of the draft's own layers.

    As with the cache, what counts is the model's own pass: a memory of the draft is not fed by the
    draft's stream but observes the model's, in front of the layer in whose place it stands. Only
    between two passes of the model it goes on with the draft's.
    """

    def __init__(self, stack: _Stack, drafts: list[_Stack], max_batch_size: int) -> None:
        layers = [*stack.layers, *(drafts[-1].layers if drafts else [])]
        remembering = [
            layer
            for layer in dict.fromkeys(layers)
            if isinstance(layer, LinearizedDecoderLayer) and layer.spec.has_memory
        ]
        self._states = {layer: layer.new_state(max_batch_size) for layer in remembering}
        # The states after every token of a pass, where some of these may be rejected.
        self._history = {}
        if drafts:
            for layer, state in self._states.items():
                shape = (max_batch_size, _MOST_ROWS, *state.shape[1:])
                self._history[layer] = state.new_zeros(shape)
        self._own = set(stack.layers)
        self.observing: _Stack | None = None  # the draft's layers in use

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._states

    def __len__(self) -> int:
        return len(self._states)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._states.values(), *self._history.values()))

    def observer(self, i: int) -> nn.Module | None:
        """The draft's own layer i, where it has a memory."""
        layer = None if self.observing is None else self.observing.layers[i]
        return layer if layer in self._states and layer not in self._own else None

    def recall(self, layer: Any, x: Tensor, span: MemorySpan | None, *, record: bool) -> Tensor:
        """x + W φ(x) + b, which takes the layer's state on; record: and notes it token by token."""
        rows, length = x.shape[:2]
        history = None
        if record and self.observing is not None and length <= _MOST_ROWS:
            history = self._history[layer][:rows, :length]
        return layer._recall(x, self._states[layer][:rows], span, history)

    def begin(self, rows: int) -> None:
        """Nothing is remembered."""
        self.observing = None
        for state in self._states.values():
            state[:rows] = 0

    def save(self, rows: int) -> list[Tensor]:
        return [state[:rows].clone() for state in self._states.values()]

    def restore(self, saved: list[Tensor]) -> None:
        for state, before in zip(self._states.values(), saved, strict=True):
            state[: len(before)] = before

    def go_back(self, rows: int, token: int) -> None:
        """To what the states were after this token of the model's last pass."""
        for layer, state in self._states.items():
            if layer in self._own or layer in self.observing.layers:
                state[:rows] = self._history[layer][:rows, token]


def _check_draft(draft: PreTrainedModel, model: PreTrainedModel) -> None:
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


def _draft_stacks(stack: _Stack, draft: PreTrainedModel | None) -> list[_Stack]:
    """The draft's layers in use: none of its own, the first in its order, the first two, …"""
    if draft is None:
        return []
    stacks = [stack]
    for i in getattr(draft, DRAFT_ORDER):
        layers, kept = list(stacks[-1].layers), list(stacks[-1].kept)
        layers[i], kept[i] = draft.model.layers[i], None
        fuse(layers[i])
        stacks.append(_Stack(layers, kept))
    return stacks


class _Drafting:
    """How many tokens are drafted at a time, and how that went."""

    def __init__(self, stack: _Stack, tokens: int | None, most: int, report: DraftReport) -> None:
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


def _kept_layers(layers: list[Any]) -> list[_Kept | None]:
    """None for the layers without attention."""
    kept: list[_Kept | None] = []
    count = 0
    for layer in layers:
        attention = getattr(layer, "self_attn", None)
        if attention is None:
            kept.append(None)
            continue
        _, kv_heads, _ = layer._heads
        window, normalizes = sliding_window(attention), hasattr(attention, "q_norm")
        kept.append(_Kept(count, kv_heads, attention.scaling, window, normalizes))
        count += 1
    return kept


def _token_rows(
    prompts: Sequence[Any] | Tensor, attention_mask: Tensor | None, vocab_size: int
) -> list[Tensor]:
    """Prompts as LongTensors (length,) on the CPU; ValueError or TypeError for anything else."""
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2:
            raise ValueError(f"prompts: expected (B, T), got shape {tuple(prompts.shape)}")
        rows = list(prompts.cpu())
    else:
        if isinstance(prompts, str | bytes) or any(isinstance(p, int | str) for p in prompts):
            raise TypeError("prompts: expected a sequence of sequences of token ids")
        rows = [torch.as_tensor(p).cpu() for p in prompts]
    if attention_mask is not None:
        if not isinstance(prompts, Tensor) or attention_mask.shape != prompts.shape:
            raise ValueError(
                "attention_mask: expected the shape of prompts, a tensor (B, T), got "
                f"{tuple(attention_mask.shape)}"
            )
        rows = [row[keep] for row, keep in zip(rows, attention_mask.cpu().bool())]
    if not rows:
        raise ValueError("prompts: expected at least one")
    for i, row in enumerate(rows):
        if row.dim() != 1 or len(row) == 0:
            raise ValueError(f"prompts[{i}]: expected at least one token id")
        if row.is_floating_point() or row.dtype == torch.bool:
            raise TypeError(f"prompts[{i}]: expected integers, got {row.dtype}")
        if not 0 <= int(row.min()) <= int(row.max()) < vocab_size:
            raise ValueError(f"prompts[{i}]: expected token ids from 0 to {vocab_size - 1}")
    return rows


class _Sampler:
    """Logits (B, vocab) to tokens (B,), on their device, without waiting for it."""

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int | None,
        device: torch.device,
    ) -> None:
        if not temperature >= 0 or temperature == float("inf"):
            raise ValueError(f"temperature: expected 0 (greedy) or more, got {temperature!r}")
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"top_k: expected a positive int, got {top_k!r}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
        if temperature == 0 and (top_k, top_p, seed) != (None, None, None):
            raise ValueError("top_k, top_p and seed need a temperature above 0, which is greedy")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        scores, ids = logits.float() / self.temperature, None
        if self.top_k is not None:
            scores, ids = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1)
        elif self.top_p is not None:
            scores, ids = scores.sort(dim=-1, descending=True)
        p = scores.softmax(dim=-1)
        if self.top_p is not None:
            p = p.masked_fill(p.cumsum(dim=-1) - p >= self.top_p, 0)
        # Of independent exponential clocks with rates p, the i-th rings first with probability p_i.
        clocks = torch.empty_like(p).exponential_(generator=self.generator)
        choice = (p / clocks).argmax(dim=-1, keepdim=True)
        return (choice if ids is None else ids.gather(-1, choice))[:, 0]


# --- CUDA graphs ---------------------------------------------------------------------------------


class _Graphs:
    """The decode step as CUDA graphs, for each batch size and each bucket of cache slots.

    A graph replays fixed addresses: tokens, slot and padding are read from buffers that a step
    fills, and the logits are left in one. The slots beyond the one in use, up to the bucket's end,
    are masked, so that a short text pays for a short cache.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        rows, device = runner.max_batch_size, runner.device
        most = max(rows, _MOST_ROWS)  # of tokens in one step
        self.tokens = torch.zeros(most, dtype=torch.long, device=device)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.padding = torch.zeros(rows, dtype=torch.long, device=device)
        vocab = runner.model.lm_head.out_features
        self.logits = torch.empty((most, vocab), dtype=runner._dtype, device=device)
        self.graphs: dict[tuple[Any, ...], Any] = {}
        self.pool: Any = None  # of the graphs' memory: only one of them runs at a time
        self.weights: tuple[int, ...] = ()

    def prepare(self, rows: int, first: int, end: int) -> None:
        stacks = (self.runner._stack, *self.runner._drafts[-1:])
        modules = (self.runner.model, *(layer for stack in stacks for layer in stack.layers))
        weights = tuple(t.data_ptr() for m in modules for t in (*m.parameters(), *m.buffers()))
        if weights != self.weights:  # graphs hold their addresses
            self.graphs.clear()
            self.pool = None
            self.weights = weights
        if self.runner._attend.reads_free_slots:
            # They are multiplied by zero: no infinity of an earlier call may be left in them.
            for cache in (self.runner.keys, self.runner.values):
                cache[:, :rows, :, first : self.bucket(end)] = 0

    def decode(self, stack: _Stack, batch: _Batch, tokens: Tensor, slot: int) -> Tensor:
        rows, length = tokens.shape
        self.tokens[: rows * length].view(rows, length).copy_(tokens)
        self.slot.fill_(slot)
        if batch.padding is None:
            self.padding.zero_()
        else:
            self.padding[:rows].copy_(batch.padding)
        self.runner._attend.prepare_step(batch, slot, length)
        self.run(stack, rows, length, self.bucket(slot + length))
        return self.logits[: rows * length].view(rows, length, -1)

    def bucket(self, slots: int) -> int:
        """The next power of two of slots; all slots, where those that are free are not read."""
        if not self.runner._attend.reads_free_slots:
            return self.runner.max_length
        size = max(_SMALLEST_BUCKET, 1 << (slots - 1).bit_length())
        return min(size, self.runner.max_length)

    def run(self, stack: _Stack, rows: int, length: int, bucket: int) -> None:
        states = self.runner._states
        step = (stack, rows, length, bucket)
        key = (*step, states.observing)
        with torch.cuda.device(self.runner.device):
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

    def step(self, stack: _Stack, rows: int, length: int, bucket: int) -> None:
        """One decode step between the buffers; everything that varies is in a tensor."""
        runner = self.runner
        padding = self.padding[:rows, None]
        own = self.slot + torch.arange(length, device=runner.device)
        views = runner._attend.step_views(rows, length, bucket, padding, own)
        memory = MemorySpan(mask=own >= padding) if runner._states else None
        span = _Span((own - padding).clamp_min(0), own, views, memory)
        x = runner._forward(stack, self.tokens[: rows * length].view(rows, length), span)
        self.logits[: rows * length].copy_(runner._head(x).flatten(0, 1))
