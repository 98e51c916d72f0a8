"""generate on a linearized model: with a cache as without one, and the cache has nothing for the
linearized layers."""

from __future__ import annotations

import copy

import nbl
import pytest
import torch
from nbl.models import EmptyCacheLayer
from nbl.upstream import CACHE, output_cache
from tiny import linearize_tiny, make_tiny_model
from tolerance import assert_rounding_only, exact_copy
from transformers import Cache, DynamicCache, StaticCache

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")  # as many as these tests need

ALL = [0, 1, 2, 3]
NEW = 10
# which layers are linearized: the first, which transformers asks for the length; others; every one
CHOICES = [[0], [1, 3], [0, 1, 2], ALL]


@pytest.fixture(params=CHOICES, ids=lambda layers: "-".join(map(str, layers)))
def layers(request):
    return request.param


# how the linearized layers are made: without and with a memory
KINDS = {"": {}, "memory": {"memory": nbl.Memory(lags=(1, 2), decays=(0.8,)), "rank": 6}}


@pytest.fixture(params=KINDS)
def linearized(request):
    def make(layers, family="llama", **config):
        return linearize_tiny(make_tiny_model(family, **config), layers, **KINDS[request.param])

    return make


@pytest.fixture
def prompt(token_batches):
    return token_batches(1, batch_size=1, length=9, seed=5)[0]


def greedy(model, ids, **kwargs):
    """New tokens by argmax of whole forward passes, without a cache and without generate."""
    for _ in range(kwargs.pop("max_new_tokens", NEW)):
        logits = model(ids, use_cache=False, **kwargs).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=-1)
    return ids


def generate(model, ids=None, **kwargs):
    kwargs = {"max_new_tokens": NEW, "do_sample": False} | kwargs
    return model.generate(ids, **kwargs)


def cached_bytes(cache: Cache) -> list[int]:
    tensors = [(e.keys, e.values) for e in cache.layers]
    return [sum(t.nbytes for t in pair if t is not None) for pair in tensors]


@torch.no_grad()
def test_greedy(family, layers, linearized, prompt):
    model = linearized(layers, family)
    expected = greedy(model, prompt)
    assert torch.equal(generate(model, prompt), expected)
    assert torch.equal(generate(model, prompt, use_cache=False), expected)
    assert torch.equal(generate(model, prompt, cache_implementation="static"), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "cache_implementation": "static"},
        {"do_sample": True, "num_beams": 2},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("chosen", [[0], ALL], ids=str)
def test_modes_of_generation(chosen, options, linearized, padded_inputs):
    model = linearized(chosen)
    results = []
    plain = {
        k: v for k, v in options.items() if k not in ("cache_implementation", "prefill_chunk_size")
    }
    for kwargs in (options, plain | {"use_cache": False}):
        torch.manual_seed(0)
        results.append(generate(model, **padded_inputs, **kwargs))
    assert torch.equal(*results)


@torch.no_grad()
def test_left_padding(family, layers, linearized, padded_inputs):
    model = linearized(layers, family)
    ids, mask = padded_inputs["input_ids"], padded_inputs["attention_mask"]
    both = generate(model, **padded_inputs)
    static = generate(model, **padded_inputs, cache_implementation="static")
    for i in range(2):
        alone = greedy(model, ids[i : i + 1, mask[i] == 1])
        assert torch.equal(both[i, mask[i].argmax() :], alone[0])
        assert torch.equal(static[i, mask[i].argmax() :], alone[0])


@torch.no_grad()
@pytest.mark.parametrize(
    "cache_kind", ["none", "empty", "config", "stock config", "static", "stock static"]
)
def test_continuing_from_a_cache(cache_kind, layers, linearized, tiny_model, prompt):
    """Caches of every origin, those made for the stock model included, over three calls."""
    model = linearized(layers)
    stock = tiny_model().config
    cache = {
        "none": lambda: None,
        "empty": DynamicCache,
        "config": lambda: DynamicCache(config=model.config),
        "stock config": lambda: DynamicCache(config=stock),
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
        "stock static": lambda: StaticCache(config=stock, max_cache_len=32),
    }[cache_kind]()
    expected = model(prompt, use_cache=False).logits
    parts, start = [], 0
    for end in (4, 5, 9):
        out = model(prompt[:, start:end], **{CACHE: cache}, use_cache=True)
        cache, start = output_cache(out), end
        parts.append(out.logits)
        assert int(cache.get_seq_length()) == end
    exact = exact_copy(model)(prompt, use_cache=False).logits
    assert_rounding_only(torch.cat(parts, 1), expected, exact)
    sizes = cached_bytes(cache)
    assert [i for i, size in enumerate(sizes) if size == 0] == layers
    # and generate goes on from there
    longer = torch.cat([prompt, prompt[:, :2]], dim=-1)
    assert torch.equal(generate(model, longer, **{CACHE: cache}), greedy(model, longer))


@torch.no_grad()
def test_generate_with_the_users_cache(layers, linearized, prompt):
    model = linearized(layers)
    expected = greedy(model, prompt)
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=40)):
        assert torch.equal(generate(model, prompt, **{CACHE: cache}), expected)
        assert int(cache.get_seq_length()) == prompt.shape[1] + NEW - 1
    cache = DynamicCache(config=model.config)
    model(prompt[:, :5], **{CACHE: cache})
    saved = copy.deepcopy(cache)  # a stored prefix, used twice
    for prefix in (cache, saved):
        assert torch.equal(generate(model, prompt, **{CACHE: prefix}), expected)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 6])
def test_sliding_windows(family, window, layers, linearized, padded_inputs):
    if family == "llama":
        pytest.skip("Llama has no sliding window")
    config = {"use_sliding_window": True, "max_window_layers": 2} if "qwen" in family else {}
    model = linearized(layers, family, sliding_window=window, **config)
    expected = greedy(model, padded_inputs["input_ids"][:1], max_new_tokens=NEW)
    assert torch.equal(generate(model, padded_inputs["input_ids"][:1]), expected)
    beams = {"num_beams": 2}
    assert torch.equal(
        generate(model, **padded_inputs, **beams),
        generate(model, **padded_inputs, use_cache=False, **beams),
    )
    static = generate(model, padded_inputs["input_ids"][:1], cache_implementation="static")
    assert torch.equal(static, expected)


@torch.no_grad()
@pytest.mark.parametrize("chosen", [[0], [3], [0, 3], [1, 2]], ids=str)
def test_full_attention_after_sliding(chosen, linearized, prompt):
    """The first entry with keys is a sliding one; the full mask is sized by another."""
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = {"use_sliding_window": True, "sliding_window": 6, "layer_types": types}
    model = linearized(chosen, "qwen3", **config)
    expected = greedy(model, prompt)
    assert torch.equal(generate(model, prompt), expected)
    assert torch.equal(generate(model, prompt, cache_implementation="static"), expected)


@torch.no_grad()
def test_kv_bytes(family, layers, linearized, tiny_model, prompt):
    def cache_of(model):
        return output_cache(model(prompt, use_cache=True))

    dense = cached_bytes(cache_of(tiny_model(family)))
    cache = cache_of(linearized(layers, family))
    assert len(set(dense)) == 1 and dense[0] == 2 * 4 * 2 * 8 * prompt.shape[1]
    assert cached_bytes(cache) == [0 if i in layers else dense[0] for i in ALL]
    assert [isinstance(e, EmptyCacheLayer) for e in cache.layers] == [i in layers for i in ALL]


@torch.no_grad()
def test_assisted_generation(layers, linearized, tiny_model, prompt):
    stock, model = tiny_model(), linearized(layers)
    expected = greedy(stock, prompt)
    # the draft is the stock model, linearized: greedy output stays that of the stock model
    assert torch.equal(generate(stock, prompt, assistant_model=model), expected)
    assert torch.equal(generate(model, prompt, assistant_model=stock), greedy(model, prompt))
    assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=2), greedy(model, prompt))


@torch.no_grad()
def test_cache_operations(layers, linearized, padded_inputs):
    model = linearized(layers)
    ids = padded_inputs["input_ids"][:1].repeat(2, 1)
    expected, exact = (m(ids, use_cache=False).logits[:, -1] for m in (model, exact_copy(model)))
    cache = output_cache(model(ids[:, :8], use_cache=True))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-3)
    assert cache.get_seq_length() == 5
    out = model(ids[:, 5:], **{CACHE: cache})
    assert_rounding_only(out.logits[:, -1], expected, exact)
    list(cache)
    static = StaticCache(config=model.config, max_cache_len=16)
    for _ in range(2):
        out = model(ids, **{CACHE: static})
        assert_rounding_only(out.logits[:, -1], expected, exact)
        static.reset()
        assert int(static.get_seq_length()) == 0


def test_an_offloading_cache_fetches_the_next_keys(linearized, prompt):
    cache = output_cache(linearized([0, 2])(prompt, use_cache=True))
    fetched = []
    for i in (1, 3):
        cache.layers[i].prefetch = lambda i=i: fetched.append(i)
    cache.layers[2].prefetch()
    cache.layers[0].prefetch()
    assert fetched == [3, 1]
    output_cache(linearized(ALL)(prompt, use_cache=True)).layers[1].prefetch()  # nothing to fetch


@torch.no_grad()
def test_cache_between_models(linearized, tiny_model, prompt):
    """A cache filled by the stock model goes on in the linearized one, not the other way round."""
    stock, model = tiny_model(), linearized([0, 2])
    cache = output_cache(stock(prompt[:, :8], use_cache=True))
    out = model(prompt[:, 8:], **{CACHE: cache})
    assert cache.get_seq_length() == 9 and out.logits.isfinite().all()
    with pytest.raises(ValueError, match="layer 0 is linearized"):
        stock(prompt[:, 8:], **{CACHE: cache})
    everywhere = linearized(ALL)
    cache = output_cache(stock(prompt[:, :8], use_cache=True))
    everywhere(prompt[:, 8:], **{CACHE: cache})
    assert cache.get_seq_length() == 9 and sum(cached_bytes(cache)) == 0


@torch.no_grad()
def test_from_embeddings(layers, linearized, prompt):
    model = linearized(layers)
    embeddings = model.get_input_embeddings()(prompt)
    tokens = generate(model, inputs_embeds=embeddings)
    assert torch.equal(tokens, greedy(model, prompt)[:, prompt.shape[1] :])


@torch.no_grad()
def test_compiled_decode_step(linearized, prompt):
    """The step that transformers compiles for a static cache: one graph, whatever the length."""
    torch.compiler.reset()  # of what other tests compiled, there is a limit to how much
    model = linearized([0, 2])
    cache = StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model, backend="eager", fullgraph=True)
    for i in range(prompt.shape[1]):
        out = step(prompt[:, i : i + 1], **{CACHE: cache})
    models = (model, exact_copy(model))
    assert_rounding_only(out.logits, *(m(prompt, use_cache=False).logits[:, -1:] for m in models))


@torch.no_grad()
def test_right_after_restore(linearized, tiny_model, prompt):
    model = linearized(ALL)
    generate(model, prompt)
    assert torch.equal(generate(nbl.restore(model), prompt), generate(tiny_model(), prompt))
