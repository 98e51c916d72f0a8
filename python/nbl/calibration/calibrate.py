"""calibrate: one forward pass over text, all attention layers observed at once, moments kept.

Per layer and token, x is the residual stream in, f the features (x, or RMSNorm(x) with the layer's
weight), y the attention output before the residual add, z = x + y. Only sums over tokens are kept:
those of f, y, z and their products in an ``nk.CovarianceAccumulator``, and of cos(x, z) and ||x||².
"""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..batches import Batch, count_tokens, read_batches
from ..checks import check_attention, check_dtype, check_layers, check_sequential
from ..memory import Memory
from ..models import family_of, linearized_layers, model_type_of
from ..perplexity import eval_mode
from ..progress import progress_bar
from ..upstream import execution_device
from .calibration import SAME, Calibration
from .sequential import calibrate_sequentially
from .store import TENSOR_FILE, batch_bytes, digest, fingerprint

__all__ = ["calibrate", "fit_sequentially", "measure_moments"]

# With fewer tokens per feature dimension the maps fit the text rather than the language.
_TOKENS_PER_DIMENSION = 50


def calibrate(
    model: PreTrainedModel,
    batches: Iterable[Any],
    *,
    features: Literal["pre-norm", "post-norm"] = "post-norm",
    memory: Memory | None = None,
    layers: Iterable[int] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool | Callable[[int, int | None], None] = True,
    layers_at_once: int | None = None,
    sequential: bool = False,
    ridge: float = 1e-4,
    bias: bool = True,
    rank: int | None = None,
    refit_mlp: bool = False,
) -> Calibration:
    """Measures the moments that linear maps are solved from, in one forward pass over `batches`.

    Every observed attention streams its features f and output y into sums; activations are not
    stored, and the LM head is not computed. Sums are float64-grade, on the device of the layer.

    Args:
        model: a supported causal LM, on any device and in any dtype. Run in eval mode, without a
            cache; afterwards as it was.
        batches: iterable of LongTensors (B, T), or of dicts with input_ids and attention_mask (B,
            T), 1 for tokens that count; or with position_ids (B, T) beside the input_ids, for
            packed texts: attention and memory begin anew where they do not go on by one. Give
            about 50 tokens per feature dimension or more: P times as many with a memory.
        features: "post-norm", f = RMSNorm(x) with the layer's weight, or "pre-norm", f = x.
        memory: :class:`nbl.Memory`: measure the features of the tokens before, too. Padding is
            skipped as if it were not there, and no memory reaches beyond the beginning of a row or
            of a packed text. The sums of a layer are then 14 d² float64 (9 with pre-norm features)
            for the default memory, in place of 5 (3); see layers_at_once.
        layers: ids to observe, default every layer that still has attention.
        checkpoint: a folder. The sums are stored there from time to time, and a calibration that
            was killed goes on where the last store left it, when called again with the same
            arguments:
            batches counted before are read but not run, and the result is the very same.
        checkpoint_seconds: at least so long between two stores; they never take more than about a
            twentieth of the time.
        progress: True: a bar with tokens/s and time left, on stderr; or a function that is called
            with (tokens so far, tokens in all or None) after each batch.
        layers_at_once: read the batches once for every so many layers, whose sums then move to
            the CPU's memory: for devices that cannot hold those of all layers. None: all.
        sequential: fit the maps of `layers` (give those that are to be replaced together)
            bottom-up, each on the stream of the model in which those below it are replaced
            already, so that it makes up for their errors (:mod:`nbl.calibration.sequential`). Two
            passes over `batches` (three with refit_mlp), which are kept in memory with two hidden
            states per token. The calibration is for exactly these layers and the following options,
            of which the others know nothing.
        ridge, bias, rank: of the sequential maps, as :meth:`Calibration.solve`.
        refit_mlp: also refit the down projections from the first replaced layer on to the stream of
            the original model, in closed form; :func:`nbl.linearize` then sets them.

    Raises:
        ValueError, TypeError: an unsupported model, a bad batch (by its index), activations that
            are not finite (by their layer), a checkpoint of another model, of other features or
            batches.
    """
    if memory is not None and not isinstance(memory, Memory):
        raise TypeError(f"memory: expected nbl.Memory or None, got {type(memory).__name__}")
    if features not in ("pre-norm", "post-norm"):
        raise ValueError(f"features: expected 'pre-norm' or 'post-norm', got {features!r}")
    family_of(model)
    check_dtype(model)
    if sequential and (checkpoint is not None or layers_at_once is not None):
        raise ValueError("sequential: expected no checkpoint and no layers_at_once beside it")
    if not sequential and (refit_mlp or (ridge, bias, rank) != (1e-4, True, None)):
        raise ValueError("ridge, bias, rank, refit_mlp: expected sequential=True beside them")
    if sequential:
        check_sequential(model, refit_mlp=refit_mlp)
    if layers_at_once is not None and (type(layers_at_once) is not int or layers_at_once < 1):
        raise ValueError(f"layers_at_once: expected a positive int, got {layers_at_once!r}")
    if layers is None:
        linearized = linearized_layers(model)
        layers = [i for i in range(model.config.num_hidden_layers) if i not in linearized]
    layers = check_layers(model, layers)
    check_attention(model, layers)
    if not layers:
        raise ValueError("layers: none to observe")
    seen = {"features": features, "memory": memory, "progress": progress}
    if sequential:
        own = {"ridge": ridge, "bias": bias, "rank": rank, "refit_mlp": refit_mlp}
        return fit_sequentially(model, batches, layers, **seen, **own)
    if layers_at_once is None or layers_at_once >= len(layers):
        stored = {"checkpoint": checkpoint, "checkpoint_seconds": checkpoint_seconds}
        return measure_moments(model, batches, layers, **seen, **stored)
    batches = batches if isinstance(batches, list | tuple) else list(batches)
    parts = []
    for start in range(0, len(layers), layers_at_once):
        group = sorted(layers)[start : start + layers_at_once]
        folder = None
        if checkpoint is not None:
            folder = Path(checkpoint) / "layers-{}".format("-".join(map(str, group)))
        stored = {"checkpoint": folder, "checkpoint_seconds": checkpoint_seconds}
        parts.append(measure_moments(model, batches, group, **seen, **stored).to("cpu"))
    return parts[0].join_layers(parts[1:])


def _nothing_yet(
    model: PreTrainedModel, layers: list[int], features: str, memory: Memory | None
) -> Calibration:
    """Of these layers, no token counted."""
    decoder = model.model.layers
    return Calibration(
        model_type=model_type_of(model),
        num_hidden_layers=model.config.num_hidden_layers,
        hidden_size=model.config.hidden_size,
        features=features,
        layers=layers,
        fingerprint=fingerprint(model),
        memory=memory,
        device={i: execution_device(decoder[i].input_layernorm) for i in layers},
    )


def measure_moments(
    model: PreTrainedModel,
    batches: Iterable[Any],
    layers: list[int],
    *,
    features: str,
    memory: Memory | None,
    progress: bool | Callable[[int, int | None], None] = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
) -> Calibration:
    """One pass over the batches: :func:`calibrate`, whose arguments are checked."""
    cal = _nothing_yet(model, layers, features, memory)
    store = _Checkpoint(checkpoint, cal, checkpoint_seconds)
    done = cal.batches, cal.batches_digest
    cal.batches, cal.batches_digest = 0, ""

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        report = stack.enter_context(progress_bar(progress, count_tokens(batches)))
        interrupted = stack.enter_context(
            _deferred_interrupt() if store.folder else nullcontext(lambda: False)
        )
        under_way: list[Batch] = []  # for the hooks
        for i in layers:
            _observe(model.model.layers[i], i, cal, under_way, stack)
        tokens = 0
        try:
            for number, batch in enumerate(read_batches(batches, model)):
                read = digest(cal.batches_digest.encode(), *batch_bytes(batch))
                resumed = number < done[0]
                if number + 1 == done[0] and read != done[1]:
                    raise ValueError(f"{store.folder}: this checkpoint counted other batches")
                store.valid = False
                if not resumed:
                    under_way[:] = [batch]
                    model.model(**batch.inputs, use_cache=False)
                cal.batches, cal.batches_digest = number + 1, read
                store.valid = number + 1 >= done[0]
                if not resumed:
                    store.save_if_due()
                tokens += batch.tokens
                report(tokens)
                if interrupted():
                    raise KeyboardInterrupt
        except BaseException:
            store.save_before_raising()
            raise
        if cal.batches < done[0]:
            raise ValueError(
                f"{store.folder}: this checkpoint counted {done[0]} batches, "
                f"there are {cal.batches} now"
            )
    store.save()
    _warn_few_tokens(cal)
    return cal


def fit_sequentially(
    model: PreTrainedModel,
    batches: Iterable[Any],
    layers: list[int],
    *,
    features: str,
    memory: Memory | None,
    progress: bool | Callable[[int, int | None], None] = False,
    refit_mlp: bool,
    **options: Any,
) -> Calibration:
    """:func:`calibrate` with sequential=True, whose arguments are checked. options: ridge, bias,
    rank."""
    cal = _nothing_yet(model, layers, features, memory)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        read = []
        for batch in read_batches(batches, model):
            read.append(batch)
            cal.batches_digest = digest(cal.batches_digest.encode(), *batch_bytes(batch))
        report = stack.enter_context(progress_bar(progress, sum(batch.tokens for batch in read)))
        cal.down_proj = calibrate_sequentially(
            model, read, cal, **options, refit_mlp=refit_mlp, report=report
        )
    cal.batches, cal.sequential = len(read), options
    _warn_few_tokens(cal)
    return cal


def _warn_few_tokens(cal: Calibration) -> None:
    dimensions = cal.hidden_size * (1 if cal.memory is None else cal.memory.branches)
    if cal.tokens < _TOKENS_PER_DIMENSION * dimensions:
        warnings.warn(
            f"{cal.tokens} tokens are few for {dimensions} feature dimensions; "
            f"{_TOKENS_PER_DIMENSION * dimensions} or more are advised",
            stacklevel=4,
        )


def _observe(
    layer: torch.nn.Module,
    layer_id: int,
    cal: Calibration,
    under_way: list[Batch],
    stack: ExitStack,
) -> None:
    """Hooks one decoder layer until the stack closes: its norm sees x and f, its attention y."""
    seen: list[tuple[Tensor, Tensor]] = []

    def norm_hook(module: Any, args: tuple[Tensor, ...], f: Tensor) -> None:
        seen[:] = [(args[0], f)]

    def attention_hook(module: Any, args: Any, output: tuple[Tensor, ...]) -> None:
        x, f = seen.pop()
        batch = under_way[0]
        where = (t if t is None else t.to(x.device) for t in (batch.attention_mask, batch.starts))
        cal.update(layer_id, x, f, output[0], *where)

    stack.callback(layer.input_layernorm.register_forward_hook(norm_hook).remove)
    stack.callback(layer.self_attn.register_forward_hook(attention_hook).remove)


class _Checkpoint:
    """The stored state of a calibration under way. Without a folder it does nothing."""

    def __init__(
        self, folder: str | os.PathLike[str] | None, cal: Calibration, seconds: float
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.cal = cal
        self.seconds = seconds
        self.valid = False  # the sums stand at the end of a batch
        self.saved_batches = 0
        self.took = 0.0
        self.last = time.monotonic()
        # The tensor file is written last: without it nothing was stored yet.
        if self.folder is not None and (self.folder / TENSOR_FILE).exists():
            stored = Calibration.load(self.folder)
            for name in SAME:
                if getattr(stored, name) != getattr(cal, name):
                    raise ValueError(
                        f"{self.folder}: this checkpoint is of another calibration, it differs in "
                        f"{name}: {getattr(stored, name)!r} there, {getattr(cal, name)!r} here"
                    )
            cal.load_sums(stored)
            self.saved_batches = stored.batches

    def save(self) -> None:
        if self.folder is not None and self.cal.batches > self.saved_batches:
            start = time.monotonic()
            self.cal.save(self.folder)
            self.saved_batches = self.cal.batches
            self.last = time.monotonic()
            self.took = self.last - start

    def save_if_due(self) -> None:
        if time.monotonic() - self.last >= max(self.seconds, 20 * self.took):
            self.save()

    def save_before_raising(self) -> None:
        if self.valid:
            self.save()


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of the batch, where the sums are right; a second one does not."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
