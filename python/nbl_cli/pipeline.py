"""What commands do between their options and their tables: calibrate, choose, measure."""

import functools
from dataclasses import dataclass
from pathlib import Path

import nbl
import torch
import transformers
from nbl import measure
from nbl.text import count_tokens, token_batches

from .models import length_limit
from .options import CALIBRATION_TOKENS, LOSS_TOKENS, PAPER
from .scores import disagreements, order
from .show import progress
from .streams import err, out


@dataclass(frozen=True)
class Plan:
    """How to calibrate and choose, after presets and defaults; None: as fits the model."""

    features: str | None
    criterion: str | None
    length: int | None
    batch_size: int | None
    max_tokens: int | None
    memory: nbl.Memory | None = None

    @classmethod
    def from_options(
        cls,
        preset,
        features,
        criterion,
        length,
        batch_size,
        max_tokens,
        drop,
        given,
        has_text,
        memory=None,
    ):
        """Explicit options, then the preset, then the defaults. `given`: a calibration or None."""
        base = PAPER if preset else {}
        features = features or base.get("features")
        if given and features and features != given.features:
            raise ValueError(
                f"features: expected {given.features}, as the calibration has, got {features}"
            )
        if given and memory is not None and memory != given.memory:
            raise ValueError(
                f"memory: expected {given.memory}, as the calibration has, got {memory}"
            )
        fallback = "cosine" if drop else "loss" if has_text else "residual"
        return cls(
            features or (given.features if given else "post-norm"),
            criterion or base.get("criterion") or fallback,
            length,
            batch_size,
            max_tokens or base.get("max_tokens") or CALIBRATION_TOKENS,
            given.memory if given else memory,
        )

    def batches(self, model, tokenizer, documents, max_tokens: int | None = None) -> list:
        limit = length_limit(model)
        length = self.length or min(PAPER["length"], limit)
        if length > limit:
            raise ValueError(f"length: expected at most {limit}, the model's limit, got {length}")
        batch_size = self.batch_size or max(1, 2048 // length)
        return token_batches(
            tokenizer,
            documents,
            length=length,
            batch_size=batch_size,
            max_tokens=max_tokens or self.max_tokens,
        )

    def calibrate(self, model, batches, checkpoint: Path | None = None):
        with progress() as bars:
            return nbl.calibrate(
                model,
                bars(batches, "calibrating"),
                features=self.features,
                memory=self.memory,
                progress=False,
                checkpoint=checkpoint,
            )


def choose_and_measure(
    model,
    calibration,
    plan,
    asked,
    batches,
    eval_batches,
    *,
    bias=True,
    ridge=1e-4,
    rank=None,
    drop=False,
    sweep=False,
    sequential=False,
    refit_mlp=False,
) -> tuple[dict, dict, nbl.Calibration]:
    """(scores, choice, points, notes and speed of the record, the maps of the chosen layers, the
    calibration that these are from).

    `asked` is a number of layers or their ids. The model is as it was afterwards.
    """
    by_number = isinstance(asked, int)
    sample = _first(batches, LOSS_TOKENS) if by_number and plan.criterion == "loss" else None
    with progress() as bars:
        scores = measure.score_layers(
            calibration,
            model=model,
            ridge=ridge,
            bias=bias,
            rank=rank,
            batches=sample and bars(sample, "ranking layers", passes=len(calibration.layers) + 1),
        )
    chosen = order(scores[plan.criterion])[:asked] if by_number else asked
    choice = {
        "method": "drop" if drop else "nbl",
        "layers": chosen,
        "criterion": plan.criterion if by_number else "the user",
    }
    if sequential and chosen:
        fitted = {"ridge": ridge, "bias": bias, "rank": rank, "refit_mlp": refit_mlp}
        with progress() as bars:
            calibration = nbl.calibrate(
                model,
                bars(batches, "fitting layer by layer"),
                features=calibration.features,
                memory=calibration.memory,
                layers=chosen,
                sequential=True,
                progress=False,
                **fitted,
            )
    maps = calibration.solve(ridge=ridge, bias=bias, rank=rank, layers=chosen)
    if not drop:
        choice |= {
            "features": calibration.features,
            "bias": bias,
            "rank": rank,
            "ridge": ridge,
            "ridge_used": {layer: float(maps[layer].ridge) for layer in chosen},
            "nmse": {layer: float(maps[layer].nmse) for layer in chosen},
            "sequential": sequential,
            "refit_mlp": refit_mlp,
        }
        if calibration.memory is not None:
            choice["memory"] = {
                "lags": calibration.memory.lags,
                "decays": {layer: maps[layer].decays for layer in chosen},
            }
    options = {"bias": bias, "rank": rank, "maps": maps}
    choices = [chosen[:m] for m in range(1, len(chosen) + 1)] if sweep else [chosen]
    record = {
        "scores": scores,
        "choice": choice,
        "notes": disagreements(scores, None if sweep else len(chosen)) if by_number else [],
    }
    with progress() as bars:
        passes = 1 + 3 * len(choices)
        record["points"] = measure.measure_points(
            model,
            calibration,
            choices,
            order(scores["cosine"]),
            batches=eval_batches,
            options=options,
            drop=drop,
            watch=bars.together("measuring perplexity", passes),
        )
    if eval_batches:
        err.print("measuring speed ...", style="dim")
        new_tokens, repetitions = 32, 5
        prompt = eval_batches[0][:1, : max(1, min(256, length_limit(model) - new_tokens))]
        speeds = measure.compare_speed(
            model,
            [
                functools.partial(
                    measure.variant, model, calibration, point["layers"], options, drop=drop
                )
                for point in record["points"]
            ],
            prompt,
            new_tokens=new_tokens,
            repetitions=repetitions,
        )
        for point, speed in zip(record["points"], speeds, strict=True):
            point.update(speed)
        record["speed"] = {
            "prompt_tokens": prompt.shape[1],
            "new_tokens": new_tokens,
            "batch": 1,
            "repetitions": repetitions,
        }
    return record, maps, calibration


def _first(batches: list, tokens: int) -> list:
    """Batches that hold about the first so many tokens: whole sequences, at least one."""
    kept = []
    for batch in batches:
        left = tokens - count_tokens(kept)
        if left <= 0:
            break
        kept.append(batch[: max(1, left // batch.shape[1])])
    return kept


class _Printer(transformers.TextStreamer):
    """Prints where results go, not to sys.stdout, which libraries write to."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="\n" if stream_end else "", file=out.file, flush=True)


def continue_text(
    model, tokenizer, ids, max_new_tokens: int, *, stream: bool = False, **sampling
) -> dict:
    """Generates; with `stream`, prints the text as it grows."""
    printer = _Printer(tokenizer, skip_special_tokens=True)
    watch = measure.Stopwatch(printer.put if stream else None)
    ids = ids.to(model.device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.inference_mode():
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=0 if pad is None else pad,
            streamer=watch,
            **sampling,
        )
    if stream:
        printer.end()
    new = tokens[0, ids.shape[1] :]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "prefill_tokens_per_second": ids.shape[1] / watch.prefill,
        "decode_tokens_per_second": watch.decode and 1 / watch.decode,
    }


def calibration_part(plan: Plan, batches: list, sources: list[str]) -> dict:
    return {
        "text": sources,
        "tokens": count_tokens(batches),
        "length": batches[0].shape[1],
        "features": plan.features,
    }


def evaluation_part(batches: list, sources: list[str]) -> dict:
    return {"text": sources, "tokens": count_tokens(batches), "length": batches[0].shape[1]}
