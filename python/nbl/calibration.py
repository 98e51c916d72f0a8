"""calibrate: one forward pass over text, all attention layers observed at once, moments kept.

Per layer and token, x is the residual stream in, f the features (x, or RMSNorm(x) with the layer's
weight), y the attention output before the residual add, z = x + y. Only sums over tokens are kept:
those of f, y, z and their products in an ``nk.CovarianceAccumulator``, and of cos(x, z) and ||x||².
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

import nbl_kernels as nk

from .batches import Batch, count_tokens, read_batches
from .evaluation import eval_mode
from .fused import check_plain
from .linearization import check_dtype, check_layers, check_one_device
from .memory import Memory, MemoryMap
from .models import family_of, linearized_layers, model_type_of
from .ranking import LayerScore, rank_layers
from .sequential import calibrate_sequentially
from .upstream import execution_device

__all__ = ["Calibration", "calibrate"]

_FORMAT = "nbl-calibration"
_FORMAT_VERSION = 2  # 1: without a memory, not sequential; still written for those
_JSON_FILE = "calibration.json"
_TENSOR_FILE = "calibration.safetensors"
# With fewer tokens per feature dimension the maps fit the text rather than the language.
_TOKENS_PER_DIMENSION = 50
# In what calibrations agree that can be added up.
_SAME = ("model_type", "hidden_size", "features", "memory", "layers", "fingerprint")
# Working memory of one batched solve.
_SOLVE_BYTES = 2 << 30


class Calibration:
    """What :func:`calibrate` measured: the moments of every observed layer.

    Attributes: model_type (the stock one), num_hidden_layers, hidden_size, features, memory, layers
    (ids), tokens, fingerprint (of the model's configuration and weights), sequential (None, or the
    ridge, bias and rank of the maps, which belong together), down_proj ({layer: what its down
    projection is refitted to}).
    """

    def __init__(
        self,
        *,
        model_type: str,
        num_hidden_layers: int,
        hidden_size: int,
        features: str,
        layers: Iterable[int],
        fingerprint: str,
        memory: Memory | None = None,
        device: Mapping[int, torch.device] | None = None,
    ) -> None:
        self.model_type = model_type
        self.num_hidden_layers = num_hidden_layers
        self.hidden_size = hidden_size
        self.features = features
        self.memory = memory
        self.layers = sorted(layers)
        self.fingerprint = fingerprint
        self.batches = 0
        self.batches_digest = ""
        # What sequential maps were solved with, and the down projections that were refitted.
        self.sequential: dict[str, Any] | None = None
        self.down_proj: dict[int, Tensor] = {}
        self._solved: dict[int, nk.Lmmse] = {}
        self._solved_with: tuple[float, bool, int | None] | None = None
        self._decays: dict[tuple[Any, ...], tuple[float, ...]] = {}  # chosen for a layer
        # z carries information beside f only where f is not x: then C_zf and C_zz follow from the
        # rest.
        block_dim = hidden_size if features == "post-norm" else 0
        self._accumulators = {}
        self._sums = {}  # per layer: the sums of cos(x, z) and of ||x||² over tokens, float64
        for i in self.layers:
            where = None if device is None else device[i]
            sizes = {"block_dim": block_dim, "device": where}
            if memory is None:
                accumulator = nk.CovarianceAccumulator(hidden_size, hidden_size, **sizes)
            else:
                filters = {"lags": memory.lags, "decays": memory.decays}
                accumulator = nk.MemoryAccumulator(hidden_size, hidden_size, **filters, **sizes)
            self._accumulators[i] = accumulator
            self._sums[i] = torch.zeros(2, dtype=torch.float64, device=where)

    @property
    def tokens(self) -> int:
        """Tokens counted; padding is not."""
        return int(self._accumulators[self.layers[0]].count) if self.layers else 0

    def __repr__(self) -> str:
        return (
            f"Calibration({self.model_type}, hidden_size={self.hidden_size}, layers={self.layers}, "
            f"features={self.features!r}, memory={self.memory}, tokens={self.tokens})"
        )

    # --- what it says about a layer ---

    def moments(self, layer: int, *, decays: Iterable[float] | None = None) -> nk.Moments:
        """Means and covariances of a layer, float64: f, y and, with post-norm features, z.

        With a memory, of φ in place of f, and always of z; decays: only these of its averages.
        """
        self._check(layer)
        if self.memory is None:
            return self._accumulators[layer].moments()
        residual = self.features == "pre-norm"
        return self._accumulators[layer].moments(decays=decays, residual_block=residual)

    def decays(
        self, layer: int, *, ridge: float = 1e-4, bias: bool = True, rank: int | None = None
    ) -> tuple[float, ...]:
        """The decays of a layer's map: those with the least NMSE, where the memory is to choose."""
        if self.memory is None:
            return ()
        choices = list(self.memory.choices())
        if len(choices) == 1:
            return choices[0]
        key = (layer, ridge, bias, rank)
        if key not in self._decays:
            errors = {}
            for decays in choices:
                options = {"ridge": ridge, "bias": bias, "rank": rank}
                solved = self._named(nk.lmmse_solve, {layer: decays}, **options)
                errors[decays] = float(solved.nmse[0])
            self._decays[key] = min(choices, key=errors.__getitem__)
        return self._decays[key]

    def mean_cosine(self, layer: int) -> float:
        """Mean over tokens of cos(x, x + y): near 1 where the attention changes little."""
        return self._mean(layer)[0]

    def mean_square(self, layer: int) -> float:
        """E||x||²."""
        return self._mean(layer)[1]

    def cca_bounds(self) -> dict[int, float]:
        """{layer: Σᵢ(1 - ρᵢ²)}, ρ the canonical correlations of f (φ) and z (Thm 3.2)."""
        bounds = {}
        for group in self._groups(self.layers):
            values = self._named(nk.cca_bound, {i: self.decays(i) for i in group})
            bounds |= {i: float(value) for i, value in zip(group, values, strict=True)}
        return bounds

    def solve(
        self,
        *,
        ridge: float = 1e-4,
        bias: bool = True,
        rank: int | None = None,
        layers: Iterable[int] | None = None,
    ) -> dict[int, nk.Lmmse]:
        """The best linear maps y ≈ W f + b: W = C_yf C_ff⁻¹, b = E[y] - W E[f] (Prop. 3.1).

        Args:
            ridge: added to C_ff, relative to its mean diagonal.
            bias: False: no b, and uncentered second moments.
            rank: W ≈ U V, the optimal one of this rank in the metric of C_ff.
            layers: which of them, default all.

        Returns:
            {layer: nk.Lmmse}, float64: weight (d, d), bias (d,) or None, nmse, ridge as used,
            factors. With a memory {layer: nbl.memory.MemoryMap}, φ in place of f: weight (d, P d),
            and the lags and decays of the layer.
            Kept for the next call with the same arguments.

        Raises:
            ValueError: naming the layer, when its moments have no finite solution; other arguments
                than those of a sequential calibration.
        """
        layers = list(self.layers) if layers is None else list(layers)
        for i in layers:
            self._check(i)
        asked = {"ridge": ridge, "bias": bias, "rank": rank}
        if self.sequential is not None and asked != self.sequential:
            raise ValueError(
                f"this calibration is sequential, its maps are those of {self.sequential}, which "
                f"those above were fitted on; got {asked}"
            )
        if self._solved_with != (ridge, bias, rank):
            self._solved, self._solved_with = {}, (ridge, bias, rank)
        for group in self._groups([i for i in layers if i not in self._solved]):
            options = {"ridge": ridge, "bias": bias, "rank": rank}
            decays = {i: self.decays(i, **options) for i in group}
            result = self._named(nk.lmmse_solve, decays, **options)
            for n, (i, own) in enumerate(decays.items()):
                solved = _unbatch(result, n)
                if self.memory is not None:
                    solved = MemoryMap(**vars(solved), lags=self.memory.lags, decays=own)
                self._solved[i] = solved
        return {i: self._solved[i] for i in layers}

    def rank(
        self,
        criterion: Literal["loss", "residual", "cca", "nmse", "cosine"] = "residual",
        *,
        model: PreTrainedModel | None = None,
        batches: Iterable[Any] | None = None,
        ridge: float = 1e-4,
        bias: bool = True,
        rank: int | None = None,
    ) -> list[LayerScore]:
        """The layers in the order in which to replace them, ties by their id.

        residual: E||y - W f - b||² / E||x||², what the map misses relative to the residual stream.
        nmse: E||y - W f - b||² / tr C_yy.
        cca: Σᵢ(1 - ρᵢ²), ρ the canonical correlations of f and x + y; the paper's bound (Thm 3.2).
        cosine: 1 - E cos(x, x + y), by which layers are dropped.
        loss: the rise of the mean negative log-likelihood on `batches` when this layer alone of
        `model` is replaced; layers that are linearized in the model already are left out. The model
        is afterwards what it was.

        ridge, bias and rank are those of the maps (:meth:`solve`); cca and cosine know no map.
        """
        options = {"ridge": ridge, "bias": bias, "rank": rank}
        return rank_layers(self, criterion, model=model, batches=batches, **options)

    # --- put together and stored ---

    def merge(self, other: Calibration) -> Calibration:
        """Adds the sums of another calibration of the same model, in place: as if one had read the
        batches of both. Returns self. ValueError: another model, other features or layers."""
        if not isinstance(other, Calibration):
            raise TypeError(f"expected a Calibration, got {type(other).__name__}")
        if self.sequential is not None or other.sequential is not None:
            raise ValueError("sequential calibrations cannot be merged: their maps are solved")
        for name in _SAME:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(f"these calibrations differ in {name}: {ours!r} and {theirs!r}")
        for i in self.layers:
            self._accumulators[i].merge(other._accumulators[i])
            self._sums[i] += other._sums[i].to(self._sums[i].device)
        self.batches += other.batches
        self.batches_digest = _digest(self.batches_digest.encode(), other.batches_digest.encode())
        self._solved.clear()
        self._decays.clear()
        return self

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes calibration.json (what it is) and calibration.safetensors (the sums) to a folder.

        The second file holds a copy of the first: it alone is replaced in one step, so a folder
        that was saved to before is at every moment either as it was or as it is now.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        header = json.dumps(self._header(), indent=1)
        tensors = {}
        for i in self.layers:
            state = self._accumulators[i].state_dict()
            tensors |= {f"layers.{i}.moments.{name}": t for name, t in state.items()}
            tensors[f"layers.{i}.cosine_and_square"] = self._sums[i]
        tensors |= {f"layers.{i}.down_proj": weight for i, weight in self.down_proj.items()}
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        _write_atomically(folder / _JSON_FILE, lambda path: path.write_text(header + "\n"))
        _write_atomically(
            folder / _TENSOR_FILE, lambda path: save_file(tensors, path, {_FORMAT: header})
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Calibration:
        """Reads what :meth:`save` wrote. FileNotFoundError, or ValueError: not such a folder, or an
        incomplete one."""
        folder = Path(folder)
        for name in (_JSON_FILE, _TENSOR_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: no calibration there, {name} is missing")
        _parse_header((folder / _JSON_FILE).read_bytes(), folder / _JSON_FILE)
        path = folder / _TENSOR_FILE
        try:
            with safe_open(path, "pt") as file:
                header = _parse_header((file.metadata() or {}).get(_FORMAT, ""), path)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged or not a safetensors file: {error}") from error
        try:
            return cls._from_header(header, tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"{path}: not a complete calibration: {error!r}") from error

    @classmethod
    def _from_header(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
        names = (
            "model_type",
            "num_hidden_layers",
            "hidden_size",
            "features",
            "layers",
            "fingerprint",
        )
        memory = header.get("memory")
        if memory is not None:
            memory = Memory(tuple(memory["lags"]), tuple(memory["decays"]), memory["choose"])
        cal = cls(**{name: header[name] for name in names}, memory=memory)
        cal.batches = header["batches"]
        cal.batches_digest = header["batches_digest"]
        cal.sequential = header.get("sequential")
        cal.down_proj = {i: tensors[f"layers.{i}.down_proj"] for i in header.get("down_proj", [])}
        cal._load_tensors(tensors)
        if cal.tokens != header["tokens"]:
            raise ValueError(f"tokens: {header['tokens']} in the header, {cal.tokens} in the sums")
        return cal

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for i in self.layers:
            prefix = f"layers.{i}.moments."
            state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            sums = tensors[f"layers.{i}.cosine_and_square"]
            if sums.shape != (2,) or sums.dtype != torch.float64:
                raise ValueError(f"layers.{i}.cosine_and_square: expected 2 float64, got {sums}")
            self._accumulators[i].load_state_dict(state)
            self._sums[i].copy_(sums)

    def _header(self) -> dict[str, Any]:
        more: dict[str, Any] = {}  # than the first version knew
        if self.memory is not None:
            more["memory"] = asdict(self.memory)
        if self.sequential is not None:
            more |= {"sequential": self.sequential, "down_proj": sorted(self.down_proj)}
        return {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION if more else 1,
            "nbl_version": nk.__version__,
            "model_type": self.model_type,
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "features": self.features,
            **more,
            "layers": self.layers,
            "fingerprint": self.fingerprint,
            "tokens": self.tokens,
            "batches": self.batches,
            "batches_digest": self.batches_digest,
        }

    # --- used by calibrate ---

    def _to(self, device: str) -> Calibration:
        """Moves the sums, in place."""
        for i in self.layers:
            self._accumulators[i] = self._accumulators[i].to(device)
            self._sums[i] = self._sums[i].to(device)
        return self

    def _joined(self, others: Iterable[Calibration]) -> Calibration:
        """With the layers of others, which read the same batches."""
        for other in others:
            self._accumulators |= other._accumulators
            self._sums |= other._sums
        self.layers = sorted(self._accumulators)
        return self

    def _update(
        self,
        layer: int,
        x: Tensor,
        f: Tensor,
        y: Tensor,
        mask: Tensor | None,
        starts: Tensor | None,
    ) -> None:
        z = x + y
        seen = (f, y, z) if self.features == "post-norm" else (x, y)
        sequences = {} if self.memory is None else {"starts": starts}
        try:
            self._accumulators[layer].update(*seen, mask=mask, **sequences)
        except RuntimeError as error:  # above all: an activation that is not finite
            raise ValueError(f"batch {self.batches}, layer {layer}: {error}") from error
        if mask is not None:
            x, z = x[mask], z[mask]
        x, z = x.float(), z.float()
        cosine = F.cosine_similarity(x, z, dim=-1).sum(dtype=torch.float64)
        square = x.square().sum(-1).sum(dtype=torch.float64)
        self._sums[layer] += torch.stack((cosine, square))

    def _mean(self, layer: int) -> list[float]:
        self._check(layer)
        if self.tokens == 0:
            raise ValueError("no token was counted")
        return (self._sums[layer] / self.tokens).tolist()

    def _check(self, layer: int) -> None:
        if layer not in self._accumulators:
            raise ValueError(f"layer {layer} is not in the calibration, which has {self.layers}")

    def _groups(self, layers: list[int]) -> Iterator[list[int]]:
        """As many layers at a time as the solver's memory allows."""
        branches = 1 if self.memory is None else self.memory.branches
        size = max(1, _SOLVE_BYTES // (10 * 8 * (branches * self.hidden_size) ** 2))
        for start in range(0, len(layers), size):
            yield layers[start : start + size]

    def _named(
        self, function: Callable[..., Any], group: dict[int, tuple[float, ...]], **kwargs: Any
    ) -> Any:
        """function(moments of the group's layers, with these decays); where it fails, one by one,
        to name the layer."""
        if self.tokens < 2:
            raise ValueError(f"moments need 2 tokens or more, the calibration has {self.tokens}")
        try:
            return function([self.moments(i, decays=d) for i, d in group.items()], **kwargs)
        except (ValueError, RuntimeError):
            for i, decays in group.items():
                try:
                    function(self.moments(i, decays=decays), **kwargs)
                except (ValueError, RuntimeError) as error:
                    raise ValueError(f"layer {i}: {error}") from error
            raise


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
            already, so that it makes up for their errors (:mod:`nbl.sequential`). Two passes over
            `batches` (three with refit_mlp), which are kept in memory with two hidden states per
            token. The calibration is for exactly these layers and the following options, of which
            the others know nothing.
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
    if layers_at_once is not None and (type(layers_at_once) is not int or layers_at_once < 1):
        raise ValueError(f"layers_at_once: expected a positive int, got {layers_at_once!r}")
    linearized = set(linearized_layers(model))
    if layers is None:
        layers = [i for i in range(model.config.num_hidden_layers) if i not in linearized]
    layers = check_layers(model, layers)
    if linearized & set(layers):
        raise ValueError(f"layers {sorted(linearized & set(layers))} have no attention: linearized")
    if not layers:
        raise ValueError("layers: none to observe")
    if layers_at_once is not None and layers_at_once < len(layers):
        batches = batches if isinstance(batches, list | tuple) else list(batches)
        parts = []
        for start in range(0, len(layers), layers_at_once):
            group = sorted(layers)[start : start + layers_at_once]
            folder = None
            if checkpoint is not None:
                folder = Path(checkpoint) / "layers-{}".format("-".join(map(str, group)))
            part = calibrate(
                model,
                batches,
                features=features,
                memory=memory,
                layers=group,
                checkpoint=folder,
                checkpoint_seconds=checkpoint_seconds,
                progress=progress,
            )
            parts.append(part._to("cpu"))
        return parts[0]._joined(parts[1:])

    decoder = model.model.layers
    cal = Calibration(
        model_type=model_type_of(model),
        num_hidden_layers=model.config.num_hidden_layers,
        hidden_size=model.config.hidden_size,
        features=features,
        layers=layers,
        fingerprint=fingerprint(model),
        memory=memory,
        device={i: execution_device(decoder[i].input_layernorm) for i in layers},
    )
    if sequential:
        options = {"ridge": ridge, "bias": bias, "rank": rank}
        _calibrate_sequentially(model, batches, cal, progress, refit_mlp=refit_mlp, **options)
        _warn_few_tokens(cal)
        return cal
    store = _Checkpoint(checkpoint, cal, checkpoint_seconds)
    done = cal.batches, cal.batches_digest
    cal.batches, cal.batches_digest = 0, ""

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        report = stack.enter_context(_progress(progress, count_tokens(batches)))
        interrupted = stack.enter_context(
            _deferred_interrupt() if store.folder else nullcontext(lambda: False)
        )
        under_way: list[Batch] = []  # for the hooks
        for i in layers:
            _observe(decoder[i], i, cal, under_way, stack)
        tokens = 0
        try:
            for number, batch in enumerate(read_batches(batches, model)):
                digest = _digest(cal.batches_digest.encode(), *_batch_bytes(batch))
                resumed = number < done[0]
                if number + 1 == done[0] and digest != done[1]:
                    raise ValueError(f"{store.folder}: this checkpoint counted other batches")
                store.valid = False
                if not resumed:
                    under_way[:] = [batch]
                    model.model(**batch.inputs, use_cache=False)
                cal.batches, cal.batches_digest = number + 1, digest
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


def _warn_few_tokens(cal: Calibration) -> None:
    dimensions = cal.hidden_size * (1 if cal.memory is None else cal.memory.branches)
    if cal.tokens < _TOKENS_PER_DIMENSION * dimensions:
        warnings.warn(
            f"{cal.tokens} tokens are few for {dimensions} feature dimensions; "
            f"{_TOKENS_PER_DIMENSION * dimensions} or more are advised",
            stacklevel=3,
        )


def _calibrate_sequentially(
    model: PreTrainedModel,
    batches: Iterable[Any],
    cal: Calibration,
    progress: bool | Callable[[int, int | None], None],
    *,
    refit_mlp: bool,
    **options: Any,
) -> None:
    check_one_device(model)
    if refit_mlp:
        for i, layer in enumerate(model.model.layers):
            check_plain(layer, f"refit_mlp: model.layers.{i}")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        read = []
        for batch in read_batches(batches, model):
            read.append(batch)
            cal.batches_digest = _digest(cal.batches_digest.encode(), *_batch_bytes(batch))
        report = stack.enter_context(_progress(progress, sum(batch.tokens for batch in read)))
        cal.down_proj = calibrate_sequentially(
            model, read, cal, **options, refit_mlp=refit_mlp, report=report
        )
    cal.batches, cal.sequential = len(read), options


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of what the model computes: its configuration and 256 elements of every weight."""
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        # what it is called, how it is run and what a token means do not matter
        if key not in ("architectures", "dtype", "transformers_version", "use_cache")
        and not key.startswith(("_", "output_"))
        and not key.endswith("_token_id")
    }
    digest = hashlib.blake2b(
        json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16
    )
    for name, tensor in model.model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for plain in _plain_tensors(tensor.detach()):
            flat = plain.flatten()
            step = max(1, flat.numel() // 256)
            sample = flat[::step][:256].to("cpu")
            digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Those that hold the numbers of one: itself, what a tensor of torchao's is made of, or none
    where accelerate keeps them on the disk."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _plain_tensors(getattr(tensor, name))
    elif tensor.device.type != "meta":
        yield tensor


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
        cal._update(layer_id, x, f, output[0], *where)

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
        if self.folder is not None and (self.folder / _TENSOR_FILE).exists():
            stored = Calibration.load(self.folder)
            for name in _SAME:
                if getattr(stored, name) != getattr(cal, name):
                    raise ValueError(
                        f"{self.folder}: this checkpoint is of another calibration, it differs in "
                        f"{name}: {getattr(stored, name)!r} there, {getattr(cal, name)!r} here"
                    )
            for i in cal.layers:
                cal._accumulators[i].load_state_dict(stored._accumulators[i].state_dict())
                cal._sums[i].copy_(stored._sums[i])
            cal.batches = self.saved_batches = stored.batches
            cal.batches_digest = stored.batches_digest

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


@contextmanager
def _progress(
    progress: bool | Callable[[int, int | None], None], total: int | None
) -> Iterator[Callable[[int], None]]:
    if callable(progress):
        yield lambda tokens: progress(tokens, total)
    elif not progress:
        yield lambda tokens: None
    else:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        class Speed(ProgressColumn):
            def render(self, task: Any) -> Text:
                speed = task.finished_speed or task.speed
                return Text("" if speed is None else f"{speed:,.0f} tokens/s")

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} tokens"),
            Speed(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("calibrating", total=total)
            yield lambda tokens: bar.update(task, completed=tokens)


def _unbatch(result: nk.Lmmse, n: int) -> nk.Lmmse:
    return nk.Lmmse(
        weight=result.weight[n],
        bias=None if result.bias is None else result.bias[n],
        nmse=result.nmse[n],
        ridge=result.ridge[n],
        factors=None if result.factors is None else tuple(t[n] for t in result.factors),
    )


def _batch_bytes(batch: Batch) -> Iterator[bytes]:
    yield repr(tuple(batch.input_ids.shape)).encode()
    for tensor in (batch.input_ids, batch.attention_mask, batch.position_ids):
        if tensor is not None:
            yield tensor.cpu().contiguous().numpy().tobytes()


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _parse_header(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not a calibration file, or cut short") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a calibration file")
    if header.get("format_version") not in (1, _FORMAT_VERSION):
        raise ValueError(
            f"{path}: format version {header.get('format_version')!r}, "
            f"this nbl reads 1 and {_FORMAT_VERSION}"
        )
    return header


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """At `path` there is at every moment the old file or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
