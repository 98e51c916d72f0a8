"""What a type checker makes of the public names: mypy reads this file, nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import nbl
from torch import Tensor
from transformers import PreTrainedModel

import nbl_kernels as nk


def kernels(x: Tensor, w: Tensor, b: Tensor, tables: tuple[Tensor, Tensor], at: Tensor) -> None:
    assert_type(nk.residual_linear(x, w, b, norm_weight=b, norm_eps=1e-6), Tensor)
    assert_type(nk.norm_linear(x, b, w), Tensor)
    assert_type(nk.norm_swiglu(x, b, w), Tensor)
    assert_type(nk.rope_append(x, *tables, at, at, w, w), Tensor)
    assert_type(nk.rope_tables(64, 128, theta=1e4), tuple[Tensor, Tensor])
    assert_type(nk.memory_linear(x, w, w, b, state=b), Tensor)
    assert_type(nk.memory_scan(x, w, w, b, state=b, lags=(1,), decays=(0.9,)), Tensor)
    assert_type(nk.memory_features(x, (1,), (0.9,)), Tensor)
    codes, scale = nk.quantize(w, "int8")
    assert_type(nk.dequantize(codes, scale, 64, x.dtype), Tensor)
    accumulator = nk.CovarianceAccumulator(64, 64)
    accumulator.update(x, x, mask=at)
    moments = accumulator.moments()
    assert_type(moments, nk.Moments)
    solved = nk.lmmse_solve(moments, ridge=1e-4, rank=8)
    assert_type(solved, nk.Lmmse)
    assert_type(solved.weight, Tensor)
    assert_type(solved.bias, Tensor | None)
    assert_type(nk.cca_bound([moments]), Tensor)
    assert_type(nk.canonical_correlations(moments), Tensor)
    nk.MemoryAccumulator(64, 64).update(x, x, starts=at)
    assert_type(nk.build_info(), dict[str, object])
    assert_type(nk.cuda_paths(), dict[str, str])
    assert_type(nk.include_dir(), Path)
    nk.set_cuda_path("linear", "plain")


def models(model: PreTrainedModel, tokenizer: object, batches: list[Tensor]) -> None:
    calibration = nbl.calibrate(model, batches, memory=nbl.Memory(), progress=False)
    assert_type(calibration, nbl.Calibration)
    assert_type(calibration.rank("residual"), list[nbl.LayerScore])
    assert_type(calibration.solve(rank=8), dict[int, nk.Lmmse])
    assert_type(nbl.linearize(model, calibration, 4, criterion="cca"), PreTrainedModel)
    assert_type(nbl.linearized_layers(model), list[int])
    assert_type(nbl.drop(nbl.restore(model), [1, 2]), PreTrainedModel)
    assert_type(nbl.optimize(model, weights="int8"), PreTrainedModel)
    assert_type(nbl.perplexity(model, batches).value, float)
    assert_type(nbl.weight_bytes(model), int)
    assert_type(nbl.draft_model(model, calibration, 4), PreTrainedModel)
    assert_type(nbl.linearize(model, None, [1], window=nbl.Window(128, 1)), PreTrainedModel)
    assert_type(nbl.windowed_layers(model), list[int])
    made = nbl.plan(model, calibration, batches, context=4096, batch=8, speedup=1.3)
    assert_type(made, nbl.Plan)
    assert_type(made.layers, dict[int, str])
    assert_type(made.apply(model), PreTrainedModel)
    done = nbl.compress(model, tokenizer, ["a text"], layers=4)
    assert_type(done, nbl.Compressed)
    assert_type(done.layers, list[int])
    assert_type(done.plan, nbl.Plan | None)
    questions = nbl.tasks.load_questions("piqa.jsonl", limit=100)
    assert_type(questions, list[nbl.tasks.Question])
    found = nbl.tasks.answer(model, tokenizer, questions, style="continuation")
    assert_type(found, nbl.tasks.Accuracy)
    assert_type(found.right, Tensor)
    assert_type(nbl.tasks.compare(found, found).stderr, float)
    assert_type(nbl.tasks.log_likelihoods(model, tokenizer, questions), list[Tensor])
    keys = nbl.tasks.passkey(model, tokenizer, lengths=[256, 512], samples=2)
    assert_type(keys, dict[int, nbl.tasks.Accuracy])
    healed = nbl.heal(model, None, batches, steps=100, rank=8)
    assert_type(healed, nbl.Healed)
    assert_type(healed.after, float)
    runner = nbl.Runner(model, max_batch_size=1, max_length=64)
    for tokens in runner.stream(batches[0], 8):
        assert_type(tokens, Tensor)
