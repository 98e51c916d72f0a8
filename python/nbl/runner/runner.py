"""Runner: generation without transformers' overhead, on a cache of its own.

One forward pass over the fused layers (:mod:`nbl.layers.fused`) serves prefill, in chunks, and
decode. The cache has room for the layers that kept their attention and is allocated once; prompts
of different lengths are aligned on their right, so that a step writes one slot of it and reads the
slots before as they lie. The attention itself is a library's (:mod:`nbl.runner.attention`). Layers
with a memory keep their states beside the cache, and go back to earlier ones where drafted tokens
are rejected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import nbl_kernels as nk

from ..layers.fused import FusedHead, FusedLayer, add_linear
from ..layers.plain import LINEARS, is_plain
from ..layers.quantized import scale_of
from ..layers.tokens import TokenSpan
from ..models import family_of
from ..optimize import optimize
from ..upstream import NORMS, rotation_table
from .attention import FlashInferAttention, SdpaAttention, allocate_cache, load_flashinfer
from .drafting import Drafting, DraftReport, check_draft, count_accepted, draft_stacks
from .graphs import Graphs
from .requests import PromptBatch, Sampler, token_rows
from .rings import Rings
from .step import MOST_ROWS, Kept, Span, Stack, States, kept_layers

__all__ = ["Runner"]

_HEADS = (*LINEARS, FusedHead)


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
            power of two of cache slots in use, captured when first needed. On an H200 its
            tokens were those of a runner without graphs (tests/models/test_cuda_models.py).
        draft: what :func:`nbl.draft_model` made of `model`, for :meth:`generate` with
            ``draft_layers``. It uses the weights and the cache of `model`.
        attention: "sdpa", PyTorch's ``scaled_dot_product_attention``, or "flashinfer" (the extra
            ``flashinfer``; a bfloat16 or float16 model on a GPU), which reads padding and free
            slots of the cache in no step. Not yet run on a GPU: compare its tokens with those of
            "sdpa" before relying on it.

    The model's own sliding windows and rotary scaling (Llama 3's among them) are respected; such a
    window saves reading, not memory. Layers with an :class:`nbl.Window` have rings of slots of
    their own, and PyTorch's attention. Dropout is never applied.

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
            check_draft(draft, model)
        optimize(model)

        self.model = model
        self.last_draft: DraftReport | None = None  # of the call that last drafted
        self.max_batch_size = max_batch_size
        self.max_length = max_length
        self.prefill_chunk = prefill_chunk
        self.device = weight.device
        self._dtype = weight.dtype
        self._layers = list(model.model.layers)
        self._stack = Stack(self._layers, kept_layers(self._layers))
        self._drafts = draft_stacks(self._stack, draft)
        attending = [k for k in self._stack.kept if k is not None]
        kept = [k for k in attending if k.bounded is None]
        heads, kv_heads, dim = model.config.num_attention_heads, 0, 0
        if attending:
            kv_heads = attending[0].kv_heads
            dim = self._layers[self._stack.kept.index(attending[0])].self_attn.head_dim
        where = {"device": self.device, "dtype": self._dtype}
        shape = (len(kept), max_batch_size, kv_heads, max_length, dim)
        self.keys = allocate_cache(shape, **where)
        self.values = allocate_cache(shape, **where)
        windows = {k.window: k.scaling for k in kept}
        if attention == "flashinfer":
            self._attend = FlashInferAttention(flashinfer, windows, heads, shape[1:], **where)
        else:
            self._attend = SdpaAttention(windows, heads, model.config.num_key_value_heads)
        sizes = (heads, model.config.num_key_value_heads, dim)
        room = {"drafts": bool(self._drafts), **where}
        self._rings = Rings(attending, max_batch_size, max_length, sizes, **room)
        self._states = States(self._stack, self._drafts, max_batch_size)
        self._cos, self._sin = cos, sin
        self._call = 0  # which call the cache belongs to
        self._graphs = self._new_graphs() if cuda_graphs else None

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of the cache: nothing for linearized layers, little for those with a window."""
        return self.keys.nbytes + self.values.nbytes + self._rings.nbytes

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
        sampler = Sampler(temperature, top_k, top_p, seed, self.device)
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

    def _batch(self, prompts: Sequence[Any] | Tensor, attention_mask: Tensor | None) -> PromptBatch:
        rows = token_rows(prompts, attention_mask, self.model.config.vocab_size)
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
        return PromptBatch(ids.to(self.device), lengths, length, padding, visible)

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
        batch: PromptBatch,
        draft_layers: int | None,
        draft_tokens: int | None,
        temperature: float,
    ) -> Drafting | None:
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
        most = MOST_ROWS // rows - 1
        if most < 1:
            raise ValueError(
                f"draft_layers: expected at most {MOST_ROWS // 2} prompts, got {rows}: drafted "
                f"tokens are verified in up to {MOST_ROWS} rows at once"
            )
        self.last_draft = DraftReport()
        return Drafting(self._drafts[draft_layers], draft_tokens, most, self.last_draft)

    def _begin(self, batch: PromptBatch, first: int, end: int) -> int:
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
            self._graphs.prepare(self.model, len(batch.lengths), first, end)
        self._states.begin(len(batch.lengths))
        self._rings.begin(len(batch.lengths))
        self._call += 1
        return self._call

    def _steps(
        self,
        batch: PromptBatch,
        max_new_tokens: int,
        sampler: Sampler,
        stop: Tensor,
        drafting: Drafting | None,
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
        drafting: Drafting,
        batch: PromptBatch,
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
    def _prefill(self, batch: PromptBatch, end: int, every: bool = False) -> list[Tensor]:
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
    def _decode(self, stack: Stack, batch: PromptBatch, tokens: Tensor, slot: int) -> Tensor:
        """Logits (B, T, vocab) that follow each of a few more tokens (B, T), from `slot` on."""
        if self._graphs is not None:
            return self._graphs.decode(stack, batch, tokens, slot)
        span = self._span(batch, slot, slot + tokens.shape[1])
        return self._head(self._forward(stack, tokens, span))

    def _new_graphs(self) -> Graphs:
        return Graphs(
            lambda *step: self._head(self._forward(*step)),
            (self._stack, *self._drafts[-1:]),
            self._states,
            self._rings,
            self._attend,
            (self.keys, self.values),
            vocab_size=self.model.lm_head.out_features,
        )

    def _forward(self, stack: Stack, ids: Tensor, span: Span) -> Tensor:
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

    def _attention(self, layer: Any, kept: Kept, x: Tensor, span: Span) -> Tensor:
        """x + o_proj(attention): rotates q and k, appends k and v to the cache, attends to it."""
        rows, length = x.shape[:2]
        qkv, norms = layer._qkv(x), kept.head_norms(layer.self_attn)
        tables = (self._cos, self._sin)
        if kept.bounded is not None:
            y = self._rings.attend(qkv, kept, span, tables, norms)
        else:
            cache = (self.keys[kept.index], self.values[kept.index])
            q = nk.rope_append(qkv, *tables, span.positions, span.slots, *cache, **norms)
            y = self._attend(q, *cache, span.views[kept.window], kept.scaling)
        return add_linear(x, layer.self_attn.o_proj, y.reshape(rows, length, -1))

    def _span(self, batch: PromptBatch, start: int, end: int) -> Span:
        """Tokens in slots start to end, their keys and values being appended."""
        positions = slots = torch.arange(start, end, device=self.device)
        if batch.padding is not None:
            positions = (slots - batch.padding[:, None]).clamp_min(0)
        memory = None
        if start < batch.length - min(batch.lengths):
            memory = TokenSpan(mask=batch.visible[:, start:end])
        views, rings = (part.views(batch, start, end) for part in (self._attend, self._rings))
        return Span(positions, slots, views, memory, rings)
