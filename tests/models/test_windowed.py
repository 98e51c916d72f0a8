"""Windows: layers that see the last tokens and the first ones give what the stock layers give under
a mask that says so."""

from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager

import nbl
import pytest
import torch
from nbl.layers.cache import MOST_ROLLED_BACK, WindowCacheLayer
from nbl.layers.ring import attend_prompt
from nbl.upstream import CACHE, output_cache
from tiny import linearize_tiny, make_token_batches
from tolerance import assert_rounding_only, max_error
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")  # as many as these tests need

WINDOW = nbl.Window(5, 2)
WINDOWS = [WINDOW, nbl.Window(1, 0), nbl.Window(7, 0), nbl.Window(3, 4), nbl.Window(100, 1)]
LAYERS = [0, 2]
NEW = 10


def visible(window, mask, starts=None):
    """(B, T, T) bool, token by token: what the text of nbl.Window says. Padding sees itself."""
    rows, length = mask.shape
    seen = torch.zeros(rows, length, length, dtype=torch.bool)
    for row in range(rows):
        own, text, count = [], 0, 0
        for t in range(length):
            if starts is not None and starts[row, t]:
                text, count = text + 1, 0
            own.append((text, count) if mask[row, t] else None)
            count += int(mask[row, t])
        for i, a in enumerate(own):
            seen[row, i, i] = True
            for m, b in enumerate(own[: i + 1]):
                if a and b and a[0] == b[0]:
                    seen[row, i, m] = a[1] - b[1] < window.size or b[1] < window.sinks
    return seen


@contextmanager
def masked(model, layers, seen):
    """A context in which the stock attention of these layers is given this mask."""

    def hook(module, args, kwargs):
        return args, kwargs | {"attention_mask": seen[:, None]}

    with ExitStack() as stack:
        for i in layers:
            attention = model.model.layers[i].self_attn
            handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def logits_under(model, layers, window, inputs):
    """Of the stock model whose layers are given the window's mask."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    starts = None
    if "position_ids" in inputs:
        positions = inputs["position_ids"]
        starts = torch.diff(positions, prepend=positions[:, :1] - 1) != 1
    with masked(model, layers, visible(window, mask, starts)):
        return model(**inputs, use_cache=False).logits


def texts(length=24):
    """{name: the inputs of a forward pass}."""
    ids = make_token_batches(1, batch_size=3, length=length, seed=3)[0]
    left, right, holes = (torch.ones_like(ids) for _ in range(3))
    left[1, :7], left[2, : length - 2] = 0, 0
    right[1, -5:], right[2, 4:] = 0, 0
    holes[0, 3:9], holes[1, 0], holes[2, ::3] = 0, 0, 0
    positions = torch.cat([torch.arange(n) for n in (9, 1, length - 10)]).expand(3, -1)
    return {
        "plain": {"input_ids": ids},
        "left": {"input_ids": ids, "attention_mask": left},
        "right": {"input_ids": ids, "attention_mask": right},
        "holes": {"input_ids": ids, "attention_mask": holes},
        "packed": {"input_ids": ids, "position_ids": positions},
    }


def greedy(model, ids, **kwargs):
    for _ in range(NEW):
        logits = model(ids, use_cache=False, **kwargs).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=-1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("name", texts())
def test_the_mask_that_it_stands_for(family, name, tiny_model):
    inputs = texts()[name]
    stock, exact = tiny_model(family), tiny_model(family).double()
    model = linearize_tiny(tiny_model(family), LAYERS, window=WINDOW)
    plain, exact = (logits_under(m, LAYERS, WINDOW, inputs) for m in (stock, exact))
    actual = model(**inputs, use_cache=False).logits
    there = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert_rounding_only(actual[there], plain[there], exact[there])
    assert max_error(actual[there], stock(**inputs).logits[there]) > 0.01  # which is not the whole


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 64, 65, 300])
def test_attention_in_blocks(window, length):
    """Whatever of a text comes before, and with padding in front."""
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))

    def expected(mask):
        seen = visible(window, mask)[:, None]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=0.4, enable_gqa=True
        ).transpose(1, 2)

    whole = torch.ones(2, length, dtype=torch.bool)
    assert torch.allclose(attend_prompt(q, k, v, window, 0.4), expected(whole))
    first = torch.tensor([0, -(length // 3)])
    padded = torch.arange(length) >= -first[:, None]
    y = attend_prompt(q, k, v, window, 0.4, first=first)
    assert torch.allclose(y[padded], expected(padded)[padded])
    for cut in {length // 2, min(3, length - 1)}:
        before = tuple(t[:, :, max(0, cut - window.size + 1) : cut] for t in (k, v))
        sinks = tuple(F.pad(t, (0, 0, 0, 4))[:, :, : window.sinks] for t in (k, v))
        rest, first = (t[:, :, cut:] for t in (q, k, v)), torch.tensor([cut])
        y = attend_prompt(*rest, window, 0.4, first=first, before=before, sinks=sinks)
        assert torch.allclose(y, expected(whole)[:, cut:])


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", ["plain", "left", "holes"])
def test_a_cache_in_pieces(window, name, tiny_model):
    """Single tokens, few and many at a time, from a cache of any origin."""
    inputs = texts(70)[name]
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    model = linearize_tiny(tiny_model(), [0, 1, 3], window=window)
    expected = model(**inputs, use_cache=False).logits
    exact = linearize_tiny(tiny_model(), [0, 1, 3], window=window).double()
    exact = exact(**inputs, use_cache=False).logits
    there = mask.bool()
    caches = (None, DynamicCache(), StaticCache(config=model.config, max_cache_len=80))
    for sizes, cache in zip(([1] * 70, [40, 1, 1, 28], [3, 17, 1, 49]), caches):
        parts, end = [], 0
        for size in sizes:
            start, end = end, end + size
            own = {"attention_mask": mask[:, :end]} if name != "plain" else {}
            out = model(ids[:, start:end], **{CACHE: cache}, **own, use_cache=True)
            cache = output_cache(out)
            parts.append(out.logits)
        if name != "holes":  # whose positions transformers counts by slots where there is a cache
            assert_rounding_only(torch.cat(parts, 1)[there], expected[there], exact[there])
        assert cache.get_seq_length() == 70
        entry = cache.layers[0]
        slots = window.slots + MOST_ROLLED_BACK + 1
        assert isinstance(entry, WindowCacheLayer) and entry.keys.shape[2] <= max(slots, 17)
        assert cache.layers[2].keys.shape[2] >= 70


@torch.no_grad()
def test_its_cache_stays_of_one_size(tiny_model):
    model = linearize_tiny(tiny_model(), [0, 1, 2, 3], window=WINDOW)
    sizes = []
    for length in (4, 60, 120):
        cache = output_cache(model(make_token_batches(1, 2, length)[0], use_cache=True))
        sizes.append(nbl.cache_bytes(cache).keys_values)
    token = 4 * 2 * 2 * 8 * 4 * 2  # layers, keys and values, heads, dimensions, bytes, rows
    assert sizes[1:] == [(WINDOW.slots + MOST_ROLLED_BACK + 1) * token] * 2
    assert sizes[0] < sizes[1] and nbl.windowed_layers(model) == [0, 1, 2, 3]
    assert nbl.linearized_layers(model) == []


@torch.no_grad()
@pytest.mark.parametrize("layers", [[0], [1, 3], [0, 1, 2, 3]], ids=str)
def test_generate(family, layers, tiny_model, padded_inputs):
    model = linearize_tiny(tiny_model(family), layers, window=WINDOW)
    options = {"max_new_tokens": NEW, "do_sample": False}
    ids, mask = padded_inputs["input_ids"], padded_inputs["attention_mask"]
    alone = greedy(model, ids[:1])
    assert torch.equal(model.generate(ids[:1], **options), alone)
    both = model.generate(**padded_inputs, **options)
    assert torch.equal(both[:1], alone)
    assert torch.equal(both[1:, 4:], greedy(model, ids[1:, mask[1] == 1]))
    static = model.generate(**padded_inputs, **options, cache_implementation="static")
    assert torch.equal(static, both)
    chunked = model.generate(**padded_inputs, **options, prefill_chunk_size=4)
    assert torch.equal(chunked, both)
    beams = {**options, "num_beams": 3}
    searched = model.generate(**padded_inputs, **beams)
    assert torch.equal(searched, model.generate(**padded_inputs, **beams, use_cache=False))
    drafted = model.generate(ids[:1], **options, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted, alone)
    assert torch.equal(model.generate(ids[:1], **options, assistant_model=tiny_model()), alone)


@torch.no_grad()
def test_a_window_drafts_for_its_original(tiny_model, ids):
    stock = tiny_model()
    draft = linearize_tiny(copy.deepcopy(stock), [0, 2], window=nbl.Window(2, 1))
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = stock.generate(ids[:1], **options)
    assert torch.equal(stock.generate(ids[:1], **options, assistant_model=draft), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "left"])
@pytest.mark.parametrize("seen", [20, 60], ids=["growing", "full"])
def test_crop(seen, name, tiny_model):
    """Back by as much as can be; then nothing is as if the tokens had never been."""
    inputs = texts(70)[name]
    ids, mask = inputs["input_ids"], inputs.get("attention_mask", None)
    model = linearize_tiny(tiny_model(), LAYERS, window=WINDOW)

    def run(start, end, cache):
        own = {} if mask is None else {"attention_mask": mask[:, :end]}
        return model(ids[:, start:end], **own, **{CACHE: cache}, use_cache=True)

    def after_crops(*removed):
        cache = output_cache(run(0, seen, DynamicCache()))
        for count in removed:
            cache.crop(-count)
        end = seen - sum(removed)
        assert cache.get_seq_length() == end
        return torch.cat([run(end, end + 3, cache).logits, run(end + 3, 66, cache).logits], 1)

    whole = seen == 20 and mask is None  # everything is there still
    for removed in ([1], [9, 4], [15], *([[seen - 1]] if whole else [])):
        end = seen - sum(removed)
        expected = torch.cat([run(0, end + 3, None).logits[:, -3:], run(0, 66, None).logits], 1)
        actual = after_crops(*removed)
        there = slice(None) if mask is None else slice(0, 2)  # the last row has come to its padding
        assert torch.allclose(actual[there, 3:], expected[there, 3 + end + 3 :], atol=1e-4)
        assert torch.allclose(actual[there, :3], expected[there, :3], atol=1e-4)
    if seen == 60:
        cache = output_cache(run(0, seen, DynamicCache()))
        with pytest.raises(ValueError, match="layer 0 sees a window, of which at most 31 tokens"):
            cache.crop(-40)


@torch.no_grad()
def test_operations_on_a_cache(tiny_model, padded_inputs):
    model = linearize_tiny(tiny_model(), [0, 3], window=nbl.Window(3, 1))
    ids, mask = padded_inputs["input_ids"], padded_inputs["attention_mask"]
    for own in ({}, {"attention_mask": mask}):
        expected = model(ids, **own, use_cache=False).logits[[1, 0, 0], -1]
        first = {name: t[:, :8] for name, t in own.items()}
        cache = output_cache(model(ids[:, :8], **first, use_cache=True))
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([0, 1, 4]))
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        rows = torch.tensor([1, 0, 0])
        more = {name: t[rows] for name, t in own.items()}
        out = model(ids[rows, 8:], **more, **{CACHE: cache}).logits[:, -1]
        assert torch.allclose(out, expected, atol=1e-4)
    static = StaticCache(config=model.config, max_cache_len=16)
    for _ in range(2):
        out = model(ids, attention_mask=mask, **{CACHE: static}).logits[[1, 0, 0], -1]
        assert torch.allclose(out, expected, atol=1e-4)
        static.reset()
    with pytest.raises(ValueError, match="layer 0: expected keys of shape"):
        model(ids[:, :1].repeat(2, 1), **{CACHE: output_cache(model(ids, use_cache=True))})


@torch.no_grad()
def test_compiled_decode_step(tiny_model, ids):
    """One graph, whatever the length."""
    torch.compiler.reset()  # of what other tests compiled, there is a limit to how much
    model = linearize_tiny(tiny_model(), LAYERS, window=nbl.Window(3, 1))
    cache = StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model, backend="eager", fullgraph=True)
    for i in range(ids.shape[1]):
        out = step(ids[:, i : i + 1], **{CACHE: cache})
    expected = model(ids, use_cache=False).logits[:, -1:]
    assert torch.allclose(out.logits, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("layers", [[1], [0, 1, 2, 3]], ids=str)
def test_runner(window, layers, family, tiny_model, padded, monkeypatch):
    model = linearize_tiny(tiny_model(family), layers, window=window)
    ids, mask = padded
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask}
    expected = model.generate(ids, **options)[:, ids.shape[1] :]
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]
    runner = nbl.Runner(model, 3, 40, prefill_chunk=12)
    assert torch.equal(torch.stack(runner.generate(prompts, NEW)), expected)
    assert torch.equal(runner.generate(prompts[:1], NEW)[0], expected[0])
    bounded, token = min(window.size, 40) + window.sinks + 1, 2 * 3 * 2 * 8 * 4
    assert runner.kv_cache_bytes == token * (len(layers) * bounded + (4 - len(layers)) * 40)
    # the step that CUDA graphs capture
    monkeypatch.setattr("nbl.runner.graphs._SMALLEST_BUCKET", 4)
    runner._graphs = runner._new_graphs()
    runner._graphs.run = runner._graphs.step
    assert torch.equal(torch.stack(runner.generate(prompts, NEW)), expected)


@torch.no_grad()
def test_runner_on_a_long_prompt(tiny_model):
    ids = make_token_batches(1, 2, 100)[0]
    model = linearize_tiny(tiny_model(), [0, 2, 3], window=nbl.Window(20, 3))
    expected = model(ids, use_cache=False).logits
    exact = linearize_tiny(tiny_model(), [0, 2, 3], window=nbl.Window(20, 3)).double()
    exact = exact(ids, use_cache=False).logits
    for chunk, prompt in ((2048, 100), (34, 60), (6, 33)):
        runner = nbl.Runner(model, 2, 100, prefill_chunk=chunk)
        actual = torch.stack(runner.logits(ids, prompt_length=prompt))
        assert_rounding_only(actual, expected, exact)


@torch.no_grad()
def test_drafting_beside_windows(tiny_model, token_batches, padded):
    """A draft's passes and rejected tokens leave the rings of its original as they were."""
    model = linearize_tiny(tiny_model(), [0, 2], window=nbl.Window(4, 1))
    cal = nbl.calibrate(model, token_batches(4), layers=[1, 2], progress=False)
    draft = nbl.draft_model(model, cal, [1, 2])
    ids, mask = padded
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask)]
    runner = nbl.Runner(model, 3, 60, draft=draft)
    expected = runner.generate(prompts, 40)
    assert [t.tolist() for t in runner.generate(prompts, 40, draft_layers=2)] == [
        t.tolist() for t in expected
    ]
    assert runner.last_draft.proposed > runner.last_draft.accepted


@torch.no_grad()
def test_checkpoint(family, tiny_model, ids, tmp_path):
    stock = tiny_model(family)
    whole = stock(ids).logits
    model = linearize_tiny(stock, [3], window=WINDOW)
    nbl.linearize(model, None, [1], window=nbl.Window(3, 0))
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and nbl.windowed_layers(loaded) == [1, 3]
    assert loaded.model.layers[3].self_attn.spec.window == WINDOW
    assert torch.equal(loaded(ids).logits, expected)
    # the attention is all there
    nbl.restore(loaded)
    assert torch.equal(loaded(ids).logits, whole) and loaded.config.model_type == family
    assert set(model.state_dict()) == set(stock.state_dict())
    nbl.restore(model)
    assert torch.equal(model(ids).logits, whole)


@torch.no_grad()
def test_beside_maps(tiny_model, token_batches, ids, tmp_path):
    """A map in the place of a window, a window in the place of a map, and back."""
    model = tiny_model()
    whole = model(ids).logits
    cal = nbl.calibrate(model, token_batches(4), progress=False)
    nbl.linearize(model, cal, [1, 2])
    maps = model(ids).logits
    nbl.linearize(model, None, [2, 3], window=WINDOW)
    assert (nbl.linearized_layers(model), nbl.windowed_layers(model)) == ([1], [2, 3])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="layer 1 has no attention that could see a window"):
        nbl.linearize(loaded, None, [1], window=WINDOW)
    nbl.restore(nbl.optimize(model))
    assert torch.equal(model(ids).logits, whole)
    nbl.linearize(model, None, [2], window=WINDOW)
    nbl.linearize(model, cal, [1, 2])
    assert torch.equal(model(ids).logits, maps)
    # a calibration of a model with windows sees their attention
    nbl.linearize(nbl.restore(model), None, [0, 2], window=nbl.Window(1, 0))
    other = nbl.calibrate(model, token_batches(4), progress=False)
    assert not torch.equal(other.moments(2).cov_tt, cal.moments(2).cov_tt)


@torch.no_grad()
@pytest.mark.parametrize("weights", [None, "int8"])
def test_optimize(weights, family, tiny_model, ids):
    stock = tiny_model(family, torch.float32 if weights else torch.bfloat16)
    whole = stock(ids).logits
    nbl.optimize(stock, weights=weights, keep_original=weights is not None)
    model = linearize_tiny(stock, LAYERS, window=nbl.Window(4, 1))
    fused = model(ids, use_cache=False).logits
    if weights is None:
        plain = linearize_tiny(tiny_model(family, torch.bfloat16), LAYERS, window=nbl.Window(4, 1))
        exact = copy.deepcopy(plain).double()
        assert_rounding_only(fused, plain(ids).logits, exact(ids).logits)
    tokens = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(tokens[:, 11:], torch.stack(nbl.Runner(model, 2, 40).generate(ids, NEW)))
    assert torch.equal(nbl.restore(model)(ids).logits, whole)


def test_gradients(tiny_model):
    for name, inputs in texts().items():
        stock = tiny_model().double()
        there = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        expected = logits_under(stock, LAYERS, WINDOW, inputs)[there].square().sum()
        expected = torch.autograd.grad(expected, list(stock.parameters()))
        model = linearize_tiny(tiny_model(), LAYERS, window=WINDOW).double()
        for cached in (False, True) if name != "packed" else (False,):
            actual = model(**inputs, use_cache=cached).logits[there].square().sum()
            actual = torch.autograd.grad(actual, list(model.parameters()))
            for a, b in zip(actual, expected, strict=True):
                assert torch.allclose(a, b, rtol=1e-6, atol=1e-8 * b.abs().max().item()), name


@torch.no_grad()
def test_layers_are_chosen_by_what_windows_cost(tiny_model, token_batches):
    model = tiny_model()
    batches = token_batches(2)
    cal = nbl.calibrate(model, batches, progress=False)
    window = nbl.Window(2, 0)
    measured = {"model": model, "batches": batches, "window": window}
    base = nbl.perplexity(model, batches).nll
    alone = {}
    for i in range(4):
        nbl.linearize(model, None, [i], window=window)
        alone[i] = nbl.perplexity(model, batches).nll - base
        nbl.restore(model)
    found = {s.layer: s.score for s in cal.rank("loss", **measured)}
    assert found == pytest.approx(alone, abs=1e-6)
    order = [s.layer for s in cal.rank("greedy", **measured, count=2)]
    assert order[0] == min(alone, key=alone.get)
    nbl.linearize(model, cal, 2, criterion="greedy", batches=batches, window=window)
    assert nbl.windowed_layers(model) == sorted(order)
    # a number means so many more of those that see everything
    nbl.linearize(model, cal, 2, window=window)
    assert nbl.windowed_layers(model) == [0, 1, 2, 3]
    assert type(nbl.restore(model)) is type(tiny_model())


def test_what_is_refused(tiny_model, token_batches, tmp_path):
    for size, sinks, name in (
        (0, 1, "size"),
        (2.5, 1, "size"),
        (4, -1, "sinks"),
        (4, True, "sinks"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            nbl.Window(size, sinks)
    model = tiny_model()
    with pytest.raises(ValueError, match="cal: expected a calibration to choose 2 layers"):
        nbl.linearize(model, None, 2, window=WINDOW)
    with pytest.raises(ValueError, match="cal: expected a calibration; only a window"):
        nbl.linearize(model, None, [1])
    with pytest.raises(ValueError, match="window: expected no maps"):
        nbl.linearize(model, None, [1], window=WINDOW, maps={})
    with pytest.raises(ValueError, match="out of range"):
        nbl.linearize(model, None, [4], window=WINDOW)
    assert type(model) is type(tiny_model())
    narrow = tiny_model("mistral", sliding_window=6)
    with pytest.raises(ValueError, match="at most 6 tokens, which is what layer 1 sees already"):
        nbl.linearize(narrow, None, [1], window=nbl.Window(8))
    nbl.linearize(narrow, None, [1], window=nbl.Window(6))
    nbl.linearize(model, None, [1], window=WINDOW)
    with pytest.raises(ValueError, match="no pages for the windows of layers"):
        model.init_continuous_batching()
    causal = torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()
    ids = token_batches(1, 1)[0]
    with pytest.raises(ValueError, match="token_mask of that shape"):
        model(ids, attention_mask=causal)
    told = model(ids, attention_mask=causal, token_mask=torch.ones(1, 32), use_cache=False)
    assert torch.equal(told.logits, model(ids, use_cache=False).logits)
    with pytest.raises(ValueError, match="layer 1 is linearized"):
        tiny_model()(ids, **{CACHE: output_cache(model(ids, use_cache=True))})
    broken = copy.deepcopy(model.config)
    for entry, wrong in (({"kind": "window"}, "size"), ({"kind": "drop", "size": 3}, "window")):
        broken.nbl["layers"]["1"] = entry
        with pytest.raises(ValueError, match=wrong):
            type(broken)(**broken.to_dict())
