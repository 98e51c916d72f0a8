"""heal: the maps of a linearized model trained to say what its original says.

This is training, and optional: everything else in nbl is in closed form. The loss is the
Kullback-Leibler divergence of the original's next-token distribution p from the model's, q,

    KL(p ‖ q) = Σ_v p_v (log p_v - log q_v),

over the whole vocabulary, in the mean over tokens. Its gradient at the logits is q - p, so that
these are made for a part of the tokens at a time, whatever the vocabulary. Only the maps are
trained, by Adam on float32 copies, of which the model has the rounded numbers at every step.
docs/heal.md says what that costs and gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .batches import Batch, read_batches
from .calibration.partial import run_layers
from .checks import check_model, check_no_draft
from .layers.fused import meant_to_record
from .layers.plain import has_plain_weights
from .layers.quantized import quantized_linears
from .layers.spec import layer_specs, linearized_layers
from .linearize import original_layers
from .models import model_type_of
from .perplexity import LOGITS_AT_ONCE, eval_mode
from .progress import progress_bar
from .upstream import execution_device

__all__ = ["Healed", "heal"]

_HELD_OUT = 8192  # tokens at most: 0.01 nats are seen in so many
_WARMUP = 0.1  # of the steps
_BETAS = (0.9, 0.99)  # a hundred steps are few for the usual 0.999
_MOST_GRADIENT = 1.0  # its norm is clipped to this
_LOOKS = 4  # at the held-out tokens, evenly over the steps, besides the one before


@dataclass(frozen=True)
class Healed:
    """What :func:`heal` did.

    steps, tokens: of training; a token that was read twice counts twice.
    before, after: mean KL(original ‖ model) on the held-out tokens, in nats per token; equal where
        the maps were not kept.
    kept: whether the model has trained maps now. False: none was better on the held-out tokens, and
        the maps are bit for bit what they were.
    losses: mean KL of every step on its own tokens, before the maps were changed by it.
    """

    steps: int
    tokens: int
    before: float
    after: float
    kept: bool
    losses: tuple[float, ...]


def heal(
    model: PreTrainedModel,
    original: PreTrainedModel | None,
    batches: Iterable[Any],
    *,
    steps: int = 100,
    tokens_per_step: int = 1024,
    lr: float = 1e-3,
    rank: int | None = None,
    validation: Iterable[Any] | None = None,
    progress: bool | Callable[[int, int | None], None] = True,
) -> Healed:
    """Trains the maps of a linearized model, in place, to the logits of its original.

    Training, unlike all else here: the loss is the KL divergence per token from the original's
    distribution to the model's, over the whole vocabulary. Adam (warmup over a tenth of the steps,
    then a cosine down to 0, gradients clipped to norm 1) changes the maps alone, in float32; they
    are rounded to the model's dtype for every step, and measured as they are rounded. All other
    weights stay bit for bit what they are, and :func:`nbl.restore` goes on undoing everything.

    It takes the memory of a training step: activations from the first replaced layer on for as
    many tokens as the largest batch has, and four float32 numbers for each weight of a map. Logits
    are never there for all tokens. The same batches give the same maps.

    Args:
        model: with linearized layers: any kind of map, layers with dropped attention among them,
            optimized or not (layers run unfused where gradients are recorded).
        original: the model it was made from, on any device. None: the attention layers that the
            model keeps aside for :func:`nbl.restore`, on the same weights: less memory and less
            time, as the layers below the first replaced one run once.
        batches: as :func:`nbl.calibrate` takes them; best the text of the calibration. All are
            read. Their rows are trained on in an order of chance, again where steps are left. No
            more tokens run at once than the largest batch has.
        steps: how many.
        tokens_per_step: a step reads rows until it has so many tokens.
        lr: the highest learning rate.
        rank: train a correction A B of this rank to every full W, not W itself; it is added to W in
            the end. Maps of reduced rank are trained as their factors in any case.
        validation: batches to measure on. Default: the last tenth of the rows of `batches` (at most
            8,192 tokens), which are then not trained on.
        progress: as :func:`nbl.calibrate`, in tokens read.

    Returns:
        :class:`Healed`. The maps are those that were best on the held-out tokens, which are looked
        at before, after every quarter of the steps, and at the end.

    Raises:
        ValueError, TypeError: naming the argument; a gradient that is not finite. On these, and on
            whatever else ends it (Ctrl-C), the maps are what they were.
    """
    _check_numbers(steps=steps, tokens_per_step=tokens_per_step, lr=lr)
    maps = _maps_of(model)
    _check_rank(rank, model, maps)
    if original is None:
        aside = _layers_aside(model)
    else:
        _check_original(model, original)
        aside = original
    rows = _rows(batches, model)
    most = max(row.tokens_at_once for row in rows)
    held_out = _rows(validation, model) if validation is not None else _last_tenth(rows)
    if validation is None:
        rows = rows[: -len(held_out)]
    plan = list(_plan(rows, steps, tokens_per_step))
    trained = sum(row.tokens for chosen in plan for row in chosen)
    looks = {math.ceil(steps * n / _LOOKS) for n in range(1, _LOOKS + 1)}
    total = trained + sum(row.tokens for row in held_out) * (1 + len(looks))

    parameters = [part.parameter for part in maps]
    pair = _Pair(model, original)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(meant_to_record())
        stack.enter_context(eval_mode(model))
        stack.enter_context(eval_mode(aside))
        best = stack.enter_context(_all_or_nothing(parameters))
        stack.enter_context(_alone_with_gradients(model, parameters))
        report = stack.enter_context(progress_bar(progress, total, "healing"))
        done = 0

        def count(tokens: int) -> None:
            nonlocal done
            done += tokens
            report(done)

        weights = [_Weight(part, rank, seed) for seed, part in enumerate(maps)]
        leaves = [leaf for weight in weights for leaf in weight.leaves]
        optimizer = torch.optim.Adam(leaves, lr=lr, betas=_BETAS)
        held = [pair.read(batch) for batch in _joined(held_out, most)]
        before = lowest = _measured(pair, held, count)
        if not math.isfinite(before):
            raise ValueError("model: its divergence from the original is not finite")
        losses = []
        for step, chosen in enumerate(plan, start=1):
            kl, tokens = 0.0, 0
            for batch in _joined(chosen, most):
                found, gradients = pair.gradients(pair.read(batch), parameters)
                kl, tokens = kl + found, tokens + batch.tokens
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.add(gradient)
                count(batch.tokens)
            for weight in weights:
                weight.finish(tokens)
            norm = nn.utils.clip_grad_norm_(leaves, _MOST_GRADIENT)
            if not math.isfinite(kl) or not bool(norm.isfinite()):
                raise ValueError(
                    f"lr: step {step} of {steps} is not finite in {model.dtype}: lower lr, or heal "
                    "the model in bfloat16 or float32"
                )
            for group in optimizer.param_groups:
                group["lr"] = lr * _share_of_lr(step, steps)
            optimizer.step()
            for weight in weights:
                weight.round()
            losses.append(kl / tokens)
            if step in looks:
                found = _measured(pair, held, count)
                if found < lowest:
                    lowest = found
                    best[:] = [p.clone() for p in parameters]
    return Healed(steps, trained, before, lowest, lowest < before, tuple(losses))


# --- checks ---------------------------------------------------------------------------------------


def _check_numbers(*, steps: int, tokens_per_step: int, lr: float) -> None:
    for name, value in (("steps", steps), ("tokens_per_step", tokens_per_step)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: expected an int from 1 on, got {value!r}")
    real = isinstance(lr, int | float) and not isinstance(lr, bool)
    if not real or not 0 < lr < math.inf:
        raise ValueError(f"lr: expected a number above 0, got {lr!r}")


@dataclass(frozen=True)
class _Part:
    """A weight or a bias of a map; full: the W of a map of full rank."""

    parameter: nn.Parameter
    full: bool


def _maps_of(model: PreTrainedModel) -> list[_Part]:
    """ValueError for a model that has no maps to train."""
    check_model(model)
    check_no_draft(model)
    _check_unquantized("model", model)
    parts = []
    for i in linearized_layers(model):
        layer = model.model.layers[i]
        for name, module in layer.named_children():
            plain = type(module) is nn.Linear and has_plain_weights(module)
            if name.startswith("linear") and not plain:
                raise ValueError(
                    f"model.layers.{i}.{name}: expected a plain nn.Linear, got "
                    f"{type(module).__name__}"
                )
        own = [p for name, p in layer.named_parameters() if name.startswith("linear")]
        parts += [_Part(p, layer.spec.rank is None and p.ndim == 2) for p in own]
    if not parts:
        raise ValueError(
            "model: expected one with linear maps (nbl.linearize), got one in which "
            + ("all replaced layers are dropped" if linearized_layers(model) else "no layer is")
        )
    return parts


def _check_unquantized(name: str, model: PreTrainedModel) -> None:
    quantized = next(quantized_linears(model), None)
    if quantized is not None:
        raise ValueError(
            f"{name}: expected plain weights, got {quantized.format}: heal before "
            "nbl.optimize(…, weights=…)"
        )


def _check_rank(rank: int | None, model: PreTrainedModel, maps: Sequence[_Part]) -> None:
    if rank is None:
        return
    size = model.config.hidden_size
    if type(rank) is not int or not 1 <= rank <= size:
        raise ValueError(f"rank: expected None or an int from 1 to {size}, got {rank!r}")
    if not any(part.full for part in maps):
        raise ValueError(
            f"rank: expected None for maps that are of reduced rank themselves, got {rank}"
        )


def _layers_aside(model: PreTrainedModel) -> nn.Module:
    """Those that were replaced; ValueError where they are gone."""
    try:
        with original_layers(model) as layers:
            return nn.ModuleList(layers[i] for i in layer_specs(model.config))
    except ValueError as error:
        raise ValueError(f"original: expected the original model, got None, but {error}") from None


def _check_original(model: PreTrainedModel, original: PreTrainedModel) -> None:
    check_model(original)
    _check_unquantized("original", original)
    gone = list(layer_specs(original.config))
    if gone:
        raise ValueError(
            f"original: expected a model with all its attention, got one with layers {gone} "
            "replaced"
        )
    names = ("num_hidden_layers", "hidden_size", "vocab_size")
    sizes = [
        (model_type_of(m), *(getattr(m.config, name) for name in names)) for m in (model, original)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"original: expected a model like the one to heal, (type, {', '.join(names)}) = "
            f"{sizes[0]}, got {sizes[1]}"
        )


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One row of a batch, (1, T), and how many tokens it brings to what runs at once."""

    batch: Batch
    tokens: int
    tokens_at_once: int  # of the batch that it comes from, padding counted


def _rows(batches: Iterable[Any], model: PreTrainedModel) -> list[_Row]:
    """Those that have a token. TypeError, ValueError: a bad batch, by its index."""
    rows = []
    for batch in read_batches(batches, model):
        for i in range(len(batch.input_ids)):
            tensors = (batch.input_ids, batch.attention_mask, batch.position_ids)
            row = Batch(*(None if t is None else t[i : i + 1] for t in tensors))
            if row.tokens:
                rows.append(_Row(row, row.tokens, batch.input_ids.numel()))
    if not rows:
        raise ValueError("batches: no token to read; all is padding")
    return rows


def _last_tenth(rows: Sequence[_Row]) -> list[_Row]:
    if len(rows) < 2:
        raise ValueError(
            "batches: expected two rows or more, of which some are held out, or validation beside "
            "them, got one"
        )
    count, tokens = 1, rows[-1].tokens
    while count + 1 <= len(rows) // 10 and tokens + rows[-count - 1].tokens <= _HELD_OUT:
        tokens += rows[-count - 1].tokens
        count += 1
    return list(rows[-count:])


def _plan(rows: Sequence[_Row], steps: int, tokens_per_step: int) -> Iterator[list[_Row]]:
    """The rows of every step: all of them in an order of chance, the same at every call, then all
    of them again in another."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(steps):
        chosen: list[_Row] = []
        while sum(row.tokens for row in chosen) < tokens_per_step:
            if not order:
                order = torch.randperm(len(rows), generator=generator).tolist()
            chosen.append(rows[order.pop()])
        yield chosen


def _joined(rows: Sequence[_Row], most: int) -> Iterator[Batch]:
    """Rows of one length and kind together, as many as `most` tokens hold."""
    alike: dict[tuple[int, bool], list[Batch]] = {}
    for row in rows:
        batch = row.batch
        alike.setdefault((batch.input_ids.shape[1], batch.position_ids is None), []).append(batch)
    for (length, _), group in alike.items():
        count = max(1, most // length)
        for start in range(0, len(group), count):
            yield _stacked(group[start : start + count])


def _stacked(group: Sequence[Batch]) -> Batch:
    ids = torch.cat([batch.input_ids for batch in group])
    mask = positions = None
    if group[0].position_ids is not None:
        positions = torch.cat([batch.position_ids for batch in group])
    if any(batch.attention_mask is not None for batch in group):
        masks = [
            torch.ones_like(batch.input_ids, dtype=torch.bool)
            if batch.attention_mask is None
            else batch.attention_mask
            for batch in group
        ]
        mask = torch.cat(masks)
    return Batch(ids, mask, positions)


# --- the two models on the same tokens ------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """A batch, the stream before the first replaced layer, and what the original's head reads,
    of the tokens that count."""

    batch: Batch
    stream: Tensor
    wanted: Tensor


class _Pair:
    def __init__(self, model: PreTrainedModel, original: PreTrainedModel | None) -> None:
        self.model, self.original = model, original
        first = min(layer_specs(model.config))
        layers = dict(enumerate(model.model.layers))
        self.below = {i: layer for i, layer in layers.items() if i < first}
        self.above = {i: layer for i, layer in layers.items() if i >= first}
        self.head = model.get_output_embeddings()
        self.right_head = (original or model).get_output_embeddings()

    def read(self, batch: Batch) -> _Read:
        x = self.model.get_input_embeddings()(batch.input_ids)
        x = run_layers(self.model, self.below, batch, x)
        if self.original is None:
            with original_layers(self.model) as layers:
                above = {i: layers[i] for i in self.above}
                hidden = run_layers(self.model, above, batch, x, norm=True)
            return _Read(batch, x, _counted(hidden, batch))
        where = execution_device(self.original.get_input_embeddings())
        inputs = {name: t.to(where) for name, t in batch.inputs.items()}
        hidden = self.original.base_model(**inputs, use_cache=False).last_hidden_state
        return _Read(batch, x, _counted(hidden.to(x.device), batch).to(where))

    def divergence(self, read: _Read) -> float:
        """The sum of KL(original ‖ model) over the tokens that count."""
        return sum(kl for kl, _ in self._parts(self._hidden(read), read, gradient=False))

    def gradients(self, read: _Read, parameters: list[nn.Parameter]) -> tuple[float, Any]:
        """That sum, and its gradients."""
        with torch.enable_grad():
            hidden = self._hidden(read)
        parts = list(self._parts(hidden.detach(), read, gradient=True))
        behind = torch.cat([gradient for _, gradient in parts])
        found = torch.autograd.grad(hidden, parameters, behind)
        return sum(kl for kl, _ in parts), found

    def _hidden(self, read: _Read) -> Tensor:
        hidden = run_layers(self.model, self.above, read.batch, read.stream, norm=True)
        return _counted(hidden, read.batch)

    def _parts(
        self, hidden: Tensor, read: _Read, *, gradient: bool
    ) -> Iterator[tuple[float, Tensor | None]]:
        """(the sum of KL, its gradient at what the head reads), of some tokens at a time."""
        rows = max(1, LOGITS_AT_ONCE // self.head.weight.shape[0])
        for own, right in zip(hidden.split(rows), read.wanted.split(rows), strict=True):
            log_p = F.log_softmax(self.right_head(right).float(), dim=-1).to(own.device)
            own = own.detach().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                logits = self.head(own)
            log_q = F.log_softmax(logits.detach().float(), dim=-1)
            p = log_p.exp()
            kl = float((p * log_p.sub_(log_q)).sum(dim=-1).double().sum())
            if not gradient:
                yield kl, None
                continue
            error = log_q.exp_().sub_(p).to(logits.dtype)  # q - p
            yield kl, torch.autograd.grad(logits, own, error)[0]


def _counted(hidden: Tensor, batch: Batch) -> Tensor:
    """(tokens, d) of (B, T, d): without padding."""
    mask = batch.attention_mask
    return hidden.flatten(0, 1) if mask is None else hidden[mask]


def _measured(pair: _Pair, held: Sequence[_Read], count: Callable[[int], None]) -> float:
    """Mean KL on the held-out tokens."""
    total = 0.0
    for read in held:
        total += pair.divergence(read)
        count(read.batch.tokens)
    return total / sum(read.batch.tokens for read in held)


# --- what is trained ------------------------------------------------------------------------------


class _Weight:
    """A part of a map as it is trained: in float32, whole, or as the correction A B of a full W.

    The gradients of a step are summed in float32, in the place of those of the leaves.
    """

    def __init__(self, part: _Part, rank: int | None, seed: int) -> None:
        self.parameter = part.parameter
        start = self.parameter.to(torch.float32, copy=True)
        self.sum = torch.zeros_like(start)
        self.base: Tensor | None = None
        self.leaves = [start]
        if rank is not None and part.full:
            self.base = start
            outputs, inputs = start.shape
            generator = torch.Generator().manual_seed(seed)
            b = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            self.leaves = [start.new_zeros(outputs, rank), b.to(start.device)]

    def add(self, gradient: Tensor) -> None:
        self.sum += gradient

    def finish(self, tokens: int) -> None:
        """The leaves get the gradient of the mean over so many tokens."""
        self.sum /= tokens
        if self.base is None:
            self.leaves[0].grad = self.sum
        else:
            a, b = self.leaves
            a.grad, b.grad = self.sum @ b.T, a.T @ self.sum

    def round(self) -> None:
        """Into the model; the next step begins."""
        a = self.leaves[0]
        self.parameter.copy_(a if self.base is None else self.base + a @ self.leaves[1])
        self.sum.zero_()


@contextmanager
def _all_or_nothing(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """A list of what the parameters are to be in the end; after an exception they are what they
    were."""
    before = [p.clone() for p in parameters]
    best = list(before)
    try:
        yield best
    except BaseException:
        best = before
        raise
    finally:
        for p, tensor in zip(parameters, best, strict=True):
            p.copy_(tensor)


@contextmanager
def _alone_with_gradients(
    model: PreTrainedModel, parameters: Sequence[nn.Parameter]
) -> Iterator[None]:
    """Only these parameters of the model require gradients."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def _share_of_lr(step: int, steps: int) -> float:
    """Of the steps 1, 2, …: up in a tenth of them, then down to 0 along a cosine."""
    warm = min(1.0, step / math.ceil(_WARMUP * steps))
    return warm * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
