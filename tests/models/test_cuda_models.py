"""Models on a GPU: calibrated, linearized, generating, as the same model does on the CPU."""

from __future__ import annotations

import warnings

import devices
import nbl
import pytest
import torch
from devices import cuda_path, full_precision
from tolerance import assert_rounding_only

pytestmark = devices.needs_gpu


@pytest.fixture(autouse=True)
def exact_products():
    with full_precision():
        yield


@pytest.mark.parametrize("features", ["post-norm", "pre-norm"])
@pytest.mark.parametrize("path", ["kernel", "plain"])
def test_model_from_text_to_tokens(path, features, tiny_model, token_batches):
    """Calibrated, linearized and run on the GPU: as the same model does on the CPU."""
    with cuda_path("all", path):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tokens are few")
            model = tiny_model("llama").to("cuda")
            calibration = nbl.calibrate(model, token_batches(20), features=features, progress=False)
            expected = nbl.calibrate(
                tiny_model("llama"), token_batches(20), features=features, progress=False
            )
            for layer, bound in expected.cca_bounds().items():
                assert calibration.cca_bounds()[layer] == pytest.approx(bound, rel=1e-3)
            nbl.linearize(model, calibration, [1, 3])
        prompt = token_batches(1, batch_size=2, length=9, seed=5)[0].to("cuda")
        with torch.no_grad():
            ids = model.generate(prompt, max_new_tokens=8, do_sample=False)
            greedy = prompt
            for _ in range(8):
                logits = model(greedy, use_cache=False).logits
                greedy = torch.cat([greedy, logits[:, -1:].argmax(-1)], dim=-1)
            assert torch.equal(ids, greedy)
            on_gpu = model(ids, use_cache=False).logits.cpu()
            model.cpu()
            on_cpu_logits = model(ids.cpu(), use_cache=False).logits
        torch.testing.assert_close(on_gpu, on_cpu_logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("path", ["kernel", "plain"])
def test_model_generates_by_the_runner(path, cuda_graphs, family, tiny_model, token_batches):
    """The tokens of the CPU, for prompts of different lengths."""
    prompts = [row[cut:] for row, cut in zip(token_batches(1, length=9, seed=5)[0], (0, 3, 7, 0))]
    expected = nbl.Runner(tiny_model(family), 4, 40).generate(prompts, 12)
    with cuda_path("all", path):
        runner = nbl.Runner(tiny_model(family).to("cuda"), 4, 40, cuda_graphs=cuda_graphs)
        for _ in range(2):
            assert torch.equal(torch.stack(runner.generate(prompts, 12)), torch.stack(expected))


@torch.no_grad()
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_model_runs_with_flashinfer(window, cuda_graphs, tiny_model, token_batches):
    """Prompts, and token by token, across pages: as exact as with PyTorch's attention."""
    pytest.importorskip("flashinfer")
    config = {"hidden_size": 256, "head_dim": 64, "sliding_window": window}
    config["initializer_range"] = 0.08  # of wider layers, so that no rounding decides the rest
    ids = token_batches(1, batch_size=3, length=60, seed=5)[0].to("cuda")
    prompts = [ids[0], ids[1, 31:], ids[2, 58:]]
    double = tiny_model("mistral", torch.bfloat16, **config).double().to("cuda")
    exact = [double(p[None]).logits[0] for p in prompts]
    model = tiny_model("mistral", torch.bfloat16, **config).to("cuda")
    runners = [
        nbl.Runner(model, 3, 80, attention=a, cuda_graphs=cuda_graphs, prefill_chunk=90)
        for a in ("flashinfer", "sdpa")
    ]
    for length in (None, 7):
        ours, theirs = (r.logits(prompts, prompt_length=length) for r in runners)
        for row in zip(ours, theirs, exact):
            assert_rounding_only(*row)
