"""What a calibration measured: sums over tokens, and what follows from them."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import nbl_kernels as nk

from ..checks import check_model
from ..layers.linearized import linear_layer, map_spec
from ..layers.spec import LayerSpec, layer_specs, linearized_layers
from ..layers.windowed import windowed_layer
from ..memory import Memory, MemoryMap
from ..models import model_type_of
from ..window import Window
from .ranking import CRITERIA, Greedy, LayerScore, greedy, loss_scores, ordered
from .store import (
    FORMAT,
    FORMAT_VERSION,
    JSON_FILE,
    TENSOR_FILE,
    digest,
    parse_header,
    write_atomically,
)

__all__ = ["SAME", "Calibration"]

# In what calibrations agree that can be added up.
SAME = ("model_type", "hidden_size", "features", "memory", "layers", "fingerprint")
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
        # Per layer: the sums of cos(x, z), ||x||² and 1 / ||x||² over tokens, float64. The last is
        # NaN in files of versions that did not keep it.
        self._sums = {}
        for i in self.layers:
            where = None if device is None else device[i]
            sizes = {"block_dim": block_dim, "device": where}
            if memory is None:
                accumulator = nk.CovarianceAccumulator(hidden_size, hidden_size, **sizes)
            else:
                filters = {"lags": memory.lags, "decays": memory.decays}
                accumulator = nk.MemoryAccumulator(hidden_size, hidden_size, **filters, **sizes)
            self._accumulators[i] = accumulator
            self._sums[i] = torch.zeros(3, dtype=torch.float64, device=where)

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
        """E||x||². A few tokens of enormous norm may make most of it."""
        return self._mean(layer)[1]

    def mean_inverse_square(self, layer: int) -> float:
        """E[1 / ||x||²], tokens with x = 0 left out; NaN in calibrations that did not keep it."""
        return self._mean(layer)[2]

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
        criterion: Literal["greedy", "loss", "residual", "cca", "nmse", "cosine"] = "residual",
        *,
        model: PreTrainedModel | None = None,
        batches: Iterable[Any] | None = None,
        ridge: float = 1e-4,
        bias: bool = True,
        rank: int | None = None,
        count: int | None = None,
        window: Window | None = None,
    ) -> list[LayerScore]:
        """The layers in the order in which to replace them, ties by their id.

        residual: E||y - W f - b||² · E[1 / ||x||²], what the map misses relative to each token's
        own residual stream, which is what the next norm sees. (The mean of the quotients
        themselves, to some per cent: e and x are nearly independent. The quotient of the means is
        not: a few tokens of enormous norm would decide it.)
        nmse: E||y - W f - b||² / tr C_yy.
        cca: Σᵢ(1 - ρᵢ²), ρ the canonical correlations of f and x + y; the paper's bound (Thm 3.2).
        cosine: 1 - E cos(x, x + y), by which layers are dropped.
        loss: the rise of the mean negative log-likelihood on `batches` when this layer alone of
        `model` is replaced; layers that are linearized in the model already are left out. The model
        is afterwards what it was.

        greedy: `count` layers (default: half of those that are ranked), one after another: each
        time the one that adds the least to the loss on `batches`, those before it replaced. The
        score is what the layers up to it add together: what layers add alone does not add up
        (:func:`nbl.calibration.ranking.greedy` says what it costs).

        ridge, bias and rank are those of the maps (:meth:`solve`); cca and cosine know no map.
        window: loss and greedy measure this :class:`nbl.Window` in place of a map.
        """
        if criterion not in CRITERIA:
            raise ValueError(f"criterion: expected one of {', '.join(CRITERIA)}, got {criterion!r}")
        options = {"ridge": ridge, "bias": bias, "rank": rank}
        if criterion == "greedy":
            scores = self.greedy(model, batches, count, window=window, **options).together
        elif criterion == "loss":
            self._check_measured(criterion, model, batches)
            replacements = self._replacements(model, window, **options)
            scores = loss_scores(model, replacements, batches)
        elif criterion == "cca":
            scores = self.cca_bounds()
        elif criterion == "cosine":
            scores = {i: 1.0 - self.mean_cosine(i) for i in self.layers}
        else:
            scores = {i: float(solved.nmse) for i, solved in self.solve(**options).items()}
            if criterion == "residual":
                scores = {i: nmse * self._relative_power(i) for i, nmse in scores.items()}
        return ordered(scores, criterion)

    def greedy(
        self,
        model: PreTrainedModel | None,
        batches: Iterable[Any] | None,
        count: int | None = None,
        *,
        ridge: float = 1e-4,
        bias: bool = True,
        rank: int | None = None,
        window: Window | None = None,
    ) -> Greedy:
        """The criterion greedy, with what the first step measured: (together, alone)."""
        self._check_measured("greedy", model, batches)
        options = {"ridge": ridge, "bias": bias, "rank": rank}
        replacements = self._replacements(model, window, **options)
        most = len(replacements)
        count = max(1, most // 2) if count is None else count
        if type(count) is not int or not 1 <= count <= most:
            raise ValueError(f"count: expected a number from 1 to {most}, got {count!r}")
        cheap = self.rank("residual", **options)
        likely = [score.layer for score in cheap if score.layer in replacements]
        return greedy(model, replacements, batches, count, likely)

    def _check_measured(self, criterion: str, model: Any, batches: Any) -> None:
        if model is None or batches is None:
            raise ValueError(
                f'criterion "{criterion}" measures the model: it needs model= and batches='
            )
        check_model(model)
        self.check_model(model)

    def check_model(self, model: PreTrainedModel) -> None:
        """ValueError unless this was measured on a model of this type and size."""
        config = model.config
        ours = (model_type_of(model), config.hidden_size, config.num_hidden_layers)
        theirs = (self.model_type, self.hidden_size, self.num_hidden_layers)
        if ours != theirs:
            raise ValueError(
                "the calibration is of another model: (model type, hidden size, layers) are "
                f"{theirs} there and {ours} here"
            )

    # --- put together and stored ---

    def merge(self, other: Calibration) -> Calibration:
        """Adds the sums of another calibration of the same model, in place: as if one had read the
        batches of both. Returns self. ValueError: another model, other features or layers."""
        if not isinstance(other, Calibration):
            raise TypeError(f"expected a Calibration, got {type(other).__name__}")
        if self.sequential is not None or other.sequential is not None:
            raise ValueError("sequential calibrations cannot be merged: their maps are solved")
        for name in SAME:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(f"these calibrations differ in {name}: {ours!r} and {theirs!r}")
        for i in self.layers:
            self._accumulators[i].merge(other._accumulators[i])
            self._sums[i] += other._sums[i].to(self._sums[i].device)
        self.batches += other.batches
        self.batches_digest = digest(self.batches_digest.encode(), other.batches_digest.encode())
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
            tensors[f"layers.{i}.cosine_and_square"] = self._sums[i][:2]
            tensors[f"layers.{i}.inverse_square"] = self._sums[i][2:]
        tensors |= {f"layers.{i}.down_proj": weight for i, weight in self.down_proj.items()}
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        write_atomically(folder / JSON_FILE, lambda path: path.write_text(header + "\n"))
        write_atomically(
            folder / TENSOR_FILE, lambda path: save_file(tensors, path, {FORMAT: header})
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Calibration:
        """Reads what :meth:`save` wrote. FileNotFoundError, or ValueError: not such a folder, or an
        incomplete one."""
        folder = Path(folder)
        for name in (JSON_FILE, TENSOR_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: no calibration there, {name} is missing")
        parse_header((folder / JSON_FILE).read_bytes(), folder / JSON_FILE)
        path = folder / TENSOR_FILE
        try:
            with safe_open(path, "pt") as file:
                header = parse_header((file.metadata() or {}).get(FORMAT, ""), path)
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
            unknown = torch.full((1,), math.nan, dtype=torch.float64)
            sums = [
                tensors[f"layers.{i}.cosine_and_square"],
                tensors.get(f"layers.{i}.inverse_square", unknown),
            ]
            if [(s.shape, s.dtype) for s in sums] != [((n,), torch.float64) for n in (2, 1)]:
                raise ValueError(f"layers.{i}: expected 2 and 1 float64 sums, got {sums}")
            self._accumulators[i].load_state_dict(state)
            self._sums[i].copy_(torch.cat(sums))

    def _header(self) -> dict[str, Any]:
        more: dict[str, Any] = {}  # than the first version knew
        if self.memory is not None:
            more["memory"] = asdict(self.memory)
        if self.sequential is not None:
            more |= {"sequential": self.sequential, "down_proj": sorted(self.down_proj)}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION if more else 1,
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

    def _relative_power(self, layer: int) -> float:
        """tr(C_yy) · E[1 / ||x||²]."""
        moments = self.moments(layer, decays=())  # of a memory's features as few as there can be
        inverse = self.mean_inverse_square(layer)
        if math.isnan(inverse):
            warnings.warn(
                "this calibration is of a version that kept no E[1 / ||x||²]: residual is relative "
                "to E||x||², which a few tokens may decide; calibrate again",
                stacklevel=4,
            )
            inverse = 1 / self.mean_square(layer)
        return float(moments.cov_tt.diagonal().sum()) * inverse

    @torch.no_grad()
    def _replacements(
        self, model: PreTrainedModel, window: Window | None = None, **options: Any
    ) -> dict[int, nn.Module]:
        """What takes the place of every calibrated layer of a model that still has attention; with
        a window, all of it."""
        if window is not None:
            spec, done = LayerSpec.of_window(window), layer_specs(model.config)
            layers = [i for i in self.layers if i not in done]
            return {i: windowed_layer(model.model.layers[i], spec, i) for i in layers}
        layers = [i for i in self.layers if i not in linearized_layers(model)]
        kind = {"features": self.features, "bias": options["bias"], "rank": options["rank"]}
        return {
            i: linear_layer(model.model.layers[i], map_spec(solved, **kind), solved, i)
            for i, solved in self.solve(**options, layers=layers).items()
        }

    # --- used by calibrate ---

    def load_sums(self, other: Calibration) -> None:
        """Replaces the sums by those of another one of the same layers, which read the same."""
        for i in self.layers:
            self._accumulators[i].load_state_dict(other._accumulators[i].state_dict())
            self._sums[i].copy_(other._sums[i])
        self.batches, self.batches_digest = other.batches, other.batches_digest

    def to(self, device: str) -> Calibration:
        """Moves the sums, in place."""
        for i in self.layers:
            self._accumulators[i] = self._accumulators[i].to(device)
            self._sums[i] = self._sums[i].to(device)
        return self

    def join_layers(self, others: Iterable[Calibration]) -> Calibration:
        """With the layers of others, which read the same batches."""
        for other in others:
            self._accumulators |= other._accumulators
            self._sums |= other._sums
        self.layers = sorted(self._accumulators)
        return self

    def update(
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
        squares = x.square().sum(-1)
        inverse = torch.where(squares > 0, 1 / squares, 0).sum(dtype=torch.float64)
        self._sums[layer] += torch.stack((cosine, squares.sum(dtype=torch.float64), inverse))

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


def _unbatch(result: nk.Lmmse, n: int) -> nk.Lmmse:
    return nk.Lmmse(
        weight=result.weight[n],
        bias=None if result.bias is None else result.bias[n],
        nmse=result.nmse[n],
        ridge=result.ridge[n],
        factors=None if result.factors is None else tuple(t[n] for t in result.factors),
    )
