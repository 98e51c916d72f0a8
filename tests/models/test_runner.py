"""Runner: the tokens of model.generate, on a cache that only the kept layers have."""

from __future__ import annotations

import copy
import sys
import types

import nbl
import pytest
import torch
from flashinfer_double import PagedAttention
from nbl.runner.attention import load_flashinfer
from nbl.runner.requests import Sampler
from nbl.upstream import CACHE
from tiny import MIXES
from tolerance import assert_rounding_only, exact_copy, max_error
from transformers import DynamicCache

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")  # as many as these tests need

NEW = 12


@pytest.fixture(params=MIXES)
def mix(request):
    return request.param


@pytest.fixture
def prompts(padded):
    ids, mask = padded
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]


def expected_tokens(model, padded, **kwargs):
    ids, mask = padded
    kwargs = {"max_new_tokens": NEW, "do_sample": False} | kwargs
    return model.generate(ids, attention_mask=mask, **kwargs)[:, ids.shape[1] :]


@pytest.fixture
def as_graphs(monkeypatch):
    """Makes a runner decode by the step that CUDA graphs capture: fixed buffers, masks, buckets."""

    def change(runner):
        monkeypatch.setattr("nbl.runner.graphs._SMALLEST_BUCKET", 4)
        runner._graphs = runner._new_graphs()
        runner._graphs.run = runner._graphs.step
        for cache in (runner.keys, runner.values):
            cache.fill_(float("nan"))  # as an earlier call may leave it

    return change


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
def test_tokens_are_those_of_generate(family, mix, static, build, padded, prompts, as_graphs):
    model = build(family, mix)
    expected = expected_tokens(model, padded)
    runner = nbl.Runner(model, 4, 40)
    if static:
        as_graphs(runner)
    new = runner.generate(prompts, NEW)
    assert [t.dtype for t in new] == [torch.long] * 3
    assert torch.equal(torch.stack(new), expected)
    ids, mask = padded
    assert torch.equal(torch.stack(runner.generate(ids, NEW, attention_mask=mask)), expected)
    assert torch.equal(runner.generate([prompts[0]], NEW)[0], expected[0])  # alone, no padding
    assert torch.equal(torch.stack(list(runner.stream(prompts, NEW)), 1), expected)
    assert torch.equal(expected_tokens(model, padded), expected)  # the optimized model itself


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("features", ["pre-norm", "post-norm"])
def test_every_kind_of_map(features, rank, tiny_model, token_batches, padded, prompts):
    model = tiny_model()
    cal = nbl.calibrate(model, token_batches(4), progress=False, features=features)
    nbl.linearize(model, cal, [0, 3], rank=rank)
    expected = expected_tokens(model, padded)
    assert torch.equal(torch.stack(nbl.Runner(model, 4, 40).generate(prompts, NEW)), expected)


@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_prefill_in_chunks(chunk, build, padded, prompts):
    model = build(mix="dense")
    expected = expected_tokens(model, padded)
    runner = nbl.Runner(model, 4, 40, prefill_chunk=chunk)
    assert torch.equal(torch.stack(runner.generate(prompts, NEW)), expected)
    assert torch.equal(runner.generate(prompts[:1], NEW)[0], expected[0])


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("chunk", [4, 100])
def test_sliding_windows(family, static, chunk, build, padded, prompts, as_graphs):
    if family == "llama":
        pytest.skip("Llama has no sliding window")
    config = {"use_sliding_window": True, "max_window_layers": 2} if "qwen" in family else {}
    model = build(family, "dense", sliding_window=6, **config)
    expected = torch.stack(
        [model.generate(torch.tensor([p]), max_new_tokens=NEW)[0, len(p) :] for p in prompts]
    )
    assert not torch.equal(expected, expected_tokens(build(family, "dense"), padded))
    runner = nbl.Runner(model, 4, 40, prefill_chunk=chunk)
    if static:
        as_graphs(runner)
    assert torch.equal(torch.stack(runner.generate(prompts, NEW)), expected)
    assert torch.equal(runner.generate(prompts[:1], NEW)[0], expected[0])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 100.0,
        },
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0},
    ],
    ids=lambda r: r["rope_type"],
)
def test_rotary_scaling(rope, build, padded, prompts):
    model = build(mix="dense", rope_parameters=rope)
    expected = expected_tokens(model, padded)
    assert torch.equal(torch.stack(nbl.Runner(model, 4, 40).generate(prompts, NEW)), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
def test_logits_differ_by_rounding(family, dtype, static, build, token_batches, as_graphs):
    """Teacher forcing, as prompt and token by token: error against float64 at most twice that of
    transformers."""
    model = build(family, "dense", dtype)
    ids = token_batches(1, batch_size=16, length=32, seed=1)[0]
    exact = copy.deepcopy(model).double()(ids).logits
    cache, plain = DynamicCache(config=model.config), []
    for i in range(ids.shape[1]):
        plain.append(model(ids[:, i : i + 1], **{CACHE: cache}).logits)
    plain = torch.cat(plain, dim=1)
    at_once = model(ids).logits
    runner = nbl.Runner(model, 16, 40)
    if static:
        as_graphs(runner)
    rounding = torch.finfo(dtype).eps / 2 * exact.abs().max().item()
    for length, reference in ((None, at_once), (1, plain)):
        logits = torch.stack(runner.logits(ids, prompt_length=length))
        assert logits.dtype == dtype
        assert max_error(logits, exact) <= 2 * max(max_error(reference, exact), rounding)


@torch.no_grad()
@pytest.mark.parametrize("prompt_length", [None, 1, 5])
def test_logits_of_ragged_prompts(family, prompt_length, build, prompts):
    model = build(family)
    plain, exact = (
        [m(torch.tensor([p])).logits[0] for p in prompts] for m in (model, exact_copy(model))
    )
    runner = nbl.Runner(model, 3, 16)
    for logits in zip(runner.logits(prompts, prompt_length=prompt_length), plain, exact):
        assert_rounding_only(*logits)


def test_cache_belongs_to_the_kept_layers(family, build, prompts):
    runners = {mix: nbl.Runner(build(family, mix), 2, 40) for mix in MIXES}
    layer = 2 * 2 * 2 * 40 * 8 * 4  # keys and values, rows, heads, slots, head_dim, bytes
    sizes = {mix: runner.kv_cache_bytes for mix, runner in runners.items()}
    assert sizes == {"dense": 4 * layer, "mixed": layer, "linear": 0}
    keys = runners["mixed"].keys
    runners["mixed"].generate(prompts[:2], NEW)
    assert runners["mixed"].keys is keys and keys.shape == (1, 2, 2, 40, 8)


def test_stop_tokens(build, padded, prompts):
    model = build()
    free = expected_tokens(model, padded)
    runner = nbl.Runner(model, 4, 40)
    stops = [int(free[0, 3]), int(free[1, 5])]
    rows = [r.tolist() for r in free]
    ends = [min((r.index(s) + 1 for s in stops if s in r), default=NEW) for r in rows]
    assert min(ends) < NEW
    new = runner.generate(prompts, NEW, stop=stops)
    assert [t.tolist() for t in new] == [r[:n] for r, n in zip(rows, ends)]
    steps = torch.stack(list(runner.stream(prompts, NEW, stop=stops)), 1)
    assert steps.shape[1] == max(ends)
    for step, row, n in zip(steps.tolist(), rows, ends):
        assert step == row[:n] + [-1] * (max(ends) - n)
    one = runner.generate(prompts, NEW, stop=stops[0])[0]
    assert one.tolist() == rows[0][: rows[0].index(stops[0]) + 1]
    # the default is the model's own
    model.generation_config.eos_token_id = stops
    assert [len(t) for t in runner.generate(prompts, NEW)] == ends
    assert [len(t) for t in runner.generate(prompts, NEW, stop=[])] == [NEW] * 3


def test_sampling_is_reproducible_and_respects_its_limits(build, prompts):
    runner = nbl.Runner(build(), 4, 40)

    def draw(**kwargs):
        return torch.stack(runner.generate(prompts, NEW, **kwargs))

    assert torch.equal(draw(temperature=1.0, seed=3), draw(temperature=1.0, seed=3))
    assert not torch.equal(draw(temperature=1.0, seed=3), draw(temperature=1.0, seed=4))
    torch.manual_seed(0)
    first = draw(temperature=1.0)
    assert not torch.equal(first, draw(temperature=1.0))
    torch.manual_seed(0)
    assert torch.equal(first, draw(temperature=1.0))
    greedy = draw()
    assert torch.equal(draw(temperature=2.0, top_k=1), greedy)
    assert torch.equal(draw(temperature=2.0, top_p=1e-6), greedy)
    assert torch.equal(draw(temperature=1e-4), greedy)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.7}], ids=str
)
def test_sampled_frequencies(options, build):
    """Those of transformers' own logits processors."""
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 12)
    scores = TemperatureLogitsWarper(0.7)(None, logits)
    if "top_k" in options:
        scores = TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = TopPLogitsWarper(options["top_p"])(None, scores)
    p = scores.softmax(-1)[0]
    n = 20000
    sampler = Sampler(0.7, options.get("top_k"), options.get("top_p"), 0, torch.device("cpu"))
    counts = torch.bincount(sampler(logits.expand(n, -1)), minlength=12)
    assert not counts[p == 0].any()
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1e-6).all()


def test_streams(build, padded, prompts):
    runner = nbl.Runner(build(), 4, 40)
    expected = torch.stack(runner.generate(prompts, NEW))
    first, second = runner.stream(prompts, NEW), runner.stream(prompts[:1], NEW)
    assert torch.equal(torch.stack(list(first), 1), expected)  # nothing runs before it is asked for
    assert torch.equal(torch.stack(list(second), 1), expected[:1])
    # an unfinished stream blocks nothing, and cannot go on with another's cache
    stream = runner.stream(prompts, NEW)
    for i in range(3):
        assert torch.equal(next(stream), expected[:, i])
    assert torch.equal(torch.stack(runner.generate(prompts, NEW)), expected)
    with pytest.raises(RuntimeError, match="a newer call of the runner took its cache"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    # at its end a stream needs the cache no more
    stream = runner.stream(prompts, 2)
    for _ in range(2):
        next(stream)
        last = runner.generate(prompts, NEW) if _ == 1 else None
    assert list(stream) == [] and torch.equal(torch.stack(last), expected)
    stream = runner.stream(prompts, NEW)
    next(stream)
    stream.close()
    assert torch.is_grad_enabled()  # nothing leaks out of a suspended stream


def test_tokens_can_be_used_anywhere(build, prompts):
    runner = nbl.Runner(build(), 4, 40)
    for tokens in runner.stream(prompts, 3):
        tokens += 1  # no inference tensor
    for logits in runner.logits(prompts):
        assert logits.shape[-1] == 97


def test_two_runners_share_the_weights(build, prompts):
    model = build()
    a, b = nbl.Runner(model, 4, 40), nbl.Runner(model, 3, 64)
    expected = torch.stack(a.generate(prompts, NEW))
    for x, y in zip(a.stream(prompts, NEW), b.stream(prompts, NEW)):  # interleaved
        assert torch.equal(x, y)
    assert torch.equal(torch.stack(b.generate(prompts, NEW)), expected)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([[1, 2]], 39), {}, ValueError, "prompt of 2 tokens and 39 new ones.*max_length 40"),
        (([[1]] * 5, 4), {}, ValueError, "prompts: got 5.*max_batch_size 4"),
        (([], 4), {}, ValueError, "prompts: expected at least one"),
        (([[]], 4), {}, ValueError, r"prompts\[0\]: expected at least one token"),
        (([[1], [97]], 4), {}, ValueError, r"prompts\[1\]: expected token ids from 0 to 96"),
        (([[-1]], 4), {}, ValueError, "from 0 to 96"),
        (([1, 2], 4), {}, TypeError, "sequence of sequences"),
        (("text", 4), {}, TypeError, "sequence of sequences"),
        (([[0.5]], 4), {}, TypeError, "integers"),
        ((torch.ones(3, dtype=torch.long), 4), {}, ValueError, r"\(B, T\)"),
        (([[1]], 0), {}, ValueError, "max_new_tokens"),
        (([[1]], 2.0), {}, ValueError, "max_new_tokens"),
        (([[1]], 2), {"attention_mask": torch.ones(1, 1)}, ValueError, "attention_mask"),
        (([[1]], 2), {"temperature": -1}, ValueError, "temperature"),
        (([[1]], 2), {"temperature": float("nan")}, ValueError, "temperature"),
        (([[1]], 2), {"top_k": 5}, ValueError, "need a temperature"),
        (([[1]], 2), {"temperature": 1, "top_k": 0}, ValueError, "top_k"),
        (([[1]], 2), {"temperature": 1, "top_p": 0.0}, ValueError, "top_p"),
        (([[1]], 2), {"stop": ["a"]}, ValueError, "stop"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(arguments, options, error, words, build):
    runner = nbl.Runner(build(), 4, 40)
    stream = runner.stream([[5, 6, 7]], NEW)
    first = next(stream)
    with pytest.raises(error, match=words):
        runner.stream(*arguments, **options)  # at the call, not at the first step
    with pytest.raises(error, match=words):
        runner.generate(*arguments, **options)
    rest = list(stream)  # undisturbed
    assert torch.equal(torch.stack([first, *rest], 1)[0], runner.generate([[5, 6, 7]], NEW)[0])


def test_the_cache_can_be_filled_to_the_last_slot(build, padded):
    model = build(mix="dense")
    runner = nbl.Runner(model, 3, 11 + NEW)
    expected = expected_tokens(model, padded)
    ids, mask = padded
    assert torch.equal(torch.stack(runner.generate(ids, NEW, attention_mask=mask)), expected)
    assert len(runner.logits([[3] * 23])[0]) == 23
    with pytest.raises(ValueError, match="prompt of 24 tokens exceed"):
        runner.logits([[3] * 24])
    with pytest.raises(ValueError, match="prompt_length"):
        runner.logits([[3] * 4], prompt_length=5)


def test_a_changed_model_is_noticed(build, tiny_model, token_batches, prompts):
    model = build(mix="dense")
    runner = nbl.Runner(model, 4, 40)
    expected = torch.stack(runner.generate(prompts, NEW))
    with torch.no_grad():  # weights may change: they are read where they are
        for parameter in model.parameters():
            parameter.data = parameter.data * 0.9
    changed = torch.stack(runner.generate(prompts, NEW))
    assert not torch.equal(changed, expected)
    fresh = tiny_model()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(changed, torch.stack(nbl.Runner(fresh, 4, 40).generate(prompts, NEW)))

    handle = model.model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="layer 1 has hooks"):
        runner.generate(prompts, NEW)
    handle.remove()
    nbl.restore(model)
    with pytest.raises(RuntimeError, match="make a new one"):
        runner.generate(prompts, NEW)
    nbl.optimize(model)
    assert torch.equal(torch.stack(runner.generate(prompts, NEW)), changed)
    nbl.drop(model, [2])
    with pytest.raises(RuntimeError, match="make a new one"):
        runner.logits(prompts)
    runner = nbl.Runner(model, 4, 40)
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="make a new one"):
        runner.generate(prompts, NEW)


def test_qwen3_norms_follow_the_model(build, prompts):
    model = build("qwen3", "dense")
    runner = nbl.Runner(model, 4, 40)
    runner.generate(prompts, 1)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_norm.weight.mul_(3)
    expected = nbl.Runner(model, 4, 40).generate(prompts, NEW)
    assert all(map(torch.equal, runner.generate(prompts, NEW), expected))


def test_a_model_in_training_mode(build, prompts):
    model = build(mix="dense", attention_dropout=0.5)
    runner = nbl.Runner(model, 4, 40)
    expected = runner.generate(prompts, NEW)
    model.train()
    assert all(map(torch.equal, runner.generate(prompts, NEW), expected))


def test_bad_runners(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match="max_batch_size: expected a positive int, got 0"):
        nbl.Runner(model, 0, 10)
    with pytest.raises(ValueError, match="max_length"):
        nbl.Runner(model, 1, 10.0)
    with pytest.raises(ValueError, match="prefill_chunk"):
        nbl.Runner(model, 1, 10, prefill_chunk=0)
    with pytest.raises(ValueError, match="cuda_graphs: the model is on cpu"):
        nbl.Runner(model, 1, 10, cuda_graphs=True)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    with pytest.raises(ValueError, match="'dynamic'"):
        nbl.Runner(tiny_model(rope_parameters=rope), 1, 10)
    with pytest.raises(ValueError, match="unsupported"):
        nbl.Runner(torch.nn.Linear(2, 2), 1, 10)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"lm_head: expected a plain nn\.Linear, got Sequential"):
        nbl.Runner(model, 1, 10)


def test_buckets(build):
    graphs = nbl.Runner(build(), 1, 1000)._new_graphs()
    sizes = [graphs.bucket(n) for n in (1, 128, 129, 256, 257, 513, 1000)]
    assert sizes == [128, 128, 256, 256, 512, 1000, 1000]
    assert nbl.Runner(build(), 1, 40)._new_graphs().bucket(3) == 40


# --- FlashInfer ----------------------------------------------------------------------------------


@pytest.fixture
def flashinfer(monkeypatch):
    """nbl.Runner(…, attention="flashinfer") on the CPU, in float32: the same tokens exactly."""
    monkeypatch.setattr(PagedAttention, "made", [])
    module = types.SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=PagedAttention)
    monkeypatch.setattr("nbl.runner.runner.load_flashinfer", lambda device, dtype: module)
    return PagedAttention


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("chunk", [2048, 9, 3])
@pytest.mark.parametrize("mix", MIXES)
def test_flashinfer_tokens_are_those_of_sdpa(
    mix, chunk, static, family, build, prompts, flashinfer, as_graphs
):
    model = build(family, mix)
    runner = nbl.Runner(model, 4, 40, attention="flashinfer", prefill_chunk=chunk)
    if static:
        as_graphs(runner)
    plain = nbl.Runner(model, 4, 40)
    expected = plain.generate(prompts, NEW)
    for _ in range(2):  # what the first call leaves does not matter to the second
        new = runner.generate(prompts, NEW)
        assert torch.equal(torch.stack(new), torch.stack(expected))
    assert torch.equal(runner.generate([prompts[2]], NEW)[0], plain.generate([prompts[2]], NEW)[0])
    kept = sum(k is not None for k in runner._stack.kept)
    for wrapper in flashinfer.made:
        assert wrapper.runs == kept * wrapper.plans  # one plan serves all layers
        assert wrapper.use_cuda_graph <= static
    if kept:
        assert any(wrapper.use_cuda_graph for wrapper in flashinfer.made) == static


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("window", [1, 6, 100])
def test_flashinfer_sliding_windows(window, static, build, prompts, flashinfer, as_graphs):
    """Two of the four layers have one."""
    config = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": window}
    model = build("qwen2", "dense", **config)
    runner = nbl.Runner(model, 4, 40, attention="flashinfer", prefill_chunk=15)
    if static:
        as_graphs(runner)
    expected = nbl.Runner(model, 4, 40).generate(prompts, NEW)
    assert torch.equal(torch.stack(runner.generate(prompts, NEW)), torch.stack(expected))
    assert {wrapper.window_left for wrapper in flashinfer.made} == {-1, window - 1}


def test_flashinfer_long_texts_take_many_pages(build, flashinfer, token_batches):
    """To the last slot of the last row: the last page reaches over the end of the cache."""
    model = build("llama", "dense")
    ids = token_batches(1, batch_size=2, length=70, seed=3)[0]
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    runner = nbl.Runner(model, 2, 75, attention="flashinfer", prefill_chunk=40)
    plain = nbl.Runner(model, 2, 75)
    for options in ({"attention_mask": mask}, {}):
        for a, b in zip(runner.generate(ids, 5, **options), plain.generate(ids, 5, **options)):
            assert torch.equal(a, b)
    assert max(len(wrapper.buffers[2]) for wrapper in flashinfer.made) >= 2 * 4


@torch.no_grad()
def test_flashinfer_logits_of_every_token(build, prompts, flashinfer, as_graphs):
    """Rows that are padding when others have begun among them."""
    model = build("llama", "dense")
    double = copy.deepcopy(model).double()
    exact = [double(torch.tensor([p])).logits[0] for p in prompts]
    plain = [model(torch.tensor([p])).logits[0] for p in prompts]
    for static in (False, True):
        runner = nbl.Runner(model, 3, 40, attention="flashinfer")
        if static:
            as_graphs(runner)
        for length in (None, 1, 5):
            logits = runner.logits(prompts, prompt_length=length)
            for row in zip(logits, plain, exact):
                assert_rounding_only(*row)


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
def test_flashinfer_drafts(static, build, prompts, flashinfer, token_batches, as_graphs):
    """Several tokens of every row at once, on top of what was appended before."""
    model = build("llama", "dense")
    calibration = nbl.calibrate(model, token_batches(4), progress=False)
    draft = nbl.draft_model(model, calibration, layers=2)
    runner = nbl.Runner(model, 3, 40, draft=draft, attention="flashinfer")
    if static:
        as_graphs(runner)
    expected = nbl.Runner(model, 3, 40).generate(prompts, NEW)
    for tokens in (None, 3):
        new = runner.generate(prompts, NEW, draft_layers=2, draft_tokens=tokens)
        assert torch.equal(torch.stack(new), torch.stack(expected))


def test_flashinfer_reads_nothing_that_was_not_written(build, prompts, flashinfer):
    """NaN in everything that no token has written."""
    model = build("llama", "dense")
    expected = nbl.Runner(model, 4, 40).generate(prompts, NEW)
    runner = nbl.Runner(model, 4, 40, attention="flashinfer")
    for cache in (runner.keys, runner.values):
        cache.fill_(float("nan"))
    assert torch.equal(torch.stack(runner.generate(prompts, NEW)), torch.stack(expected))


def test_flashinfer_errors_name_the_argument(tiny_model, monkeypatch):
    with pytest.raises(ValueError, match='attention: expected "sdpa" or "flashinfer"'):
        nbl.Runner(tiny_model(), 1, 10, attention="fa2")
    with pytest.raises(ValueError, match=r'attention: "flashinfer" needs a GPU, .* on cpu'):
        nbl.Runner(tiny_model(), 1, 10, attention="flashinfer")
    gpu = torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r'"flashinfer" needs bfloat16 or .* is torch\.float32'):
        load_flashinfer(gpu, torch.float32)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ImportError, match=r'attention: "flashinfer" is not installed: pip install'):
        load_flashinfer(gpu, torch.bfloat16)
