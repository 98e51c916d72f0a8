"""An optimized model computes what it computed before, in every mode, and can be undone."""

from __future__ import annotations

import copy
import pickle

import nbl
import pytest
import torch
import transformers
from nbl.layers.fused import FusedHead, FusedLayer
from nbl.upstream import CACHE
from tiny import MIXES
from tolerance import exact_copy, max_error
from torch import nn
from transformers import DynamicCache, StaticCache

import nbl_kernels as nk

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")  # as many as these tests need

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def launches(monkeypatch):
    """The fused operators called, in order; the list can be cleared."""
    names = []

    def recording(name, function):
        def call(*args, **kwargs):
            names.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("norm_linear", "norm_swiglu", "residual_linear"):
        monkeypatch.setattr(nk, name, recording(name, getattr(nk, name)))
    return names


def assert_rounding_only(fused, plain, exact):
    """Error against float64 at most twice that of the unpatched model, in float32 too."""
    assert fused.dtype == plain.dtype and fused.shape == plain.shape
    rounding = torch.finfo(plain.dtype).eps / 2 * exact.abs().max().item()
    assert max_error(fused, exact) <= 2 * max(max_error(plain, exact), rounding)


def storages(model):
    """{address: bytes} of the memory behind the parameters."""
    found = [p.untyped_storage() for p in model.parameters()]
    return {s.data_ptr(): s.nbytes() for s in found}


def is_optimized(model):
    kinds = {isinstance(layer, FusedLayer) for layer in model.model.layers}
    assert len(kinds) == 1 and type(model.lm_head) is (FusedHead if True in kinds else nn.Linear)
    return True in kinds


@torch.no_grad()
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_logits_differ_by_rounding(family, dtype, mix, build, token_batches):
    model = build(family, mix, dtype)
    fused_model = nbl.optimize(copy.deepcopy(model))
    ids = token_batches(1, batch_size=16, length=32, seed=1)[0]
    exact = exact_copy(model)(ids).logits
    assert_rounding_only(fused_model(ids).logits, model(ids).logits, exact)

    def stepwise(model):  # few rows: other products than those of many
        cache, parts = DynamicCache(config=model.config), []
        for start in range(0, 32):
            out = model(ids[:, start : start + 1], **{CACHE: cache})
            parts.append(out.logits)
        return torch.cat(parts, dim=1)

    assert_rounding_only(stepwise(fused_model), stepwise(model), exact)


@torch.no_grad()
@pytest.mark.parametrize("features", ["pre-norm", "post-norm"])
def test_reduced_rank(features, tiny_model, token_batches, ids):
    model = tiny_model()
    cal = nbl.calibrate(model, token_batches(4), progress=False, features=features)
    nbl.linearize(model, cal, [1, 2], rank=5)
    plain, exact = model(ids).logits, exact_copy(model)(ids).logits
    assert_rounding_only(nbl.optimize(model)(ids).logits, plain, exact)


@torch.no_grad()
def test_launches(build, ids, launches):
    model = nbl.optimize(build())
    model(ids)
    linear = ["residual_linear", "norm_swiglu", "residual_linear"]
    attention = ["norm_linear", *linear]
    assert launches == linear + linear[1:] + linear + attention  # 1 is dropped, 3 has attention
    launches.clear()
    model(ids[:, :1])
    assert len(launches) == 13  # and the head


@torch.no_grad()
@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}], ids=str)
def test_biases(biases, build, ids):
    model = build(**biases)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    fused = nbl.optimize(copy.deepcopy(model))
    assert_rounding_only(fused(ids).logits, model(ids).logits, exact_copy(model)(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("mix", MIXES)
def test_restore_gives_back_the_very_model(family, mix, tiny_model, token_batches, ids):
    model = tiny_model(family)
    before, parameters = model(ids).logits, dict(model.named_parameters())
    modules, classes = list(model.modules()), [type(m) for m in model.modules()]
    memory, state = sorted(storages(model).values()), copy.deepcopy(model.state_dict())
    linear, dropped = MIXES[mix]
    cal = nbl.calibrate(model, token_batches(4), progress=False)
    for optimize_first in (False, True):
        if optimize_first:
            nbl.optimize(model)
        if linear:
            nbl.linearize(model, cal, linear)
            nbl.drop(model, dropped)
        assert is_optimized(model) == optimize_first
        assert nbl.optimize(model) is model and nbl.optimize(model) is model and is_optimized(model)
        assert nbl.linearized_layers(model) == sorted(linear + dropped)
        assert not torch.equal(model(ids).logits, before)
        assert nbl.restore(model) is model and not is_optimized(model)
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert [type(m) for m in modules] == classes
        assert not any({"_packs", "_inside"} & set(vars(m)) for m in modules)
        assert all(p is parameters[n] for n, p in model.named_parameters())
        assert sorted(storages(model).values()) == memory
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert torch.equal(model(ids).logits, before)
        assert nbl.restore(model) is model  # nothing left to undo


@torch.no_grad()
def test_order_does_not_matter(build, tiny_model, token_batches, ids):
    first = nbl.optimize(build())
    second = nbl.optimize(tiny_model())
    cal = nbl.calibrate(second, token_batches(4), progress=False)
    nbl.linearize(second, cal, [0, 2])
    nbl.linearize(second, cal, [1])
    nbl.drop(second, [1])  # a map is dropped
    assert is_optimized(second)
    assert torch.equal(second(ids).logits, first(ids).logits)
    assert sum(storages(second).values()) == sum(storages(build()).values())


@torch.no_grad()
def test_no_second_copy_of_the_weights(family, build):
    model = build(family)
    total = sum(storages(model).values())
    nbl.optimize(model)
    assert sum(storages(model).values()) == total
    packed = [p for layer in model.model.layers for p in layer._packs]
    assert {t.untyped_storage().data_ptr() for p in packed for t in (p.weight, *p._views)} <= set(
        storages(model)
    )
    assert (
        sum(p.numel() for p in model.parameters())
        == model.num_parameters()
        == sum(t.numel() for t in build(family).parameters())
    )


@torch.no_grad()
def test_weights_follow_the_model(build, ids):
    """.to(), .data, load_state_dict (by copy and by assignment), in-place changes."""
    model = nbl.optimize(build())
    state = copy.deepcopy(model.state_dict())
    assert list(state) == list(build().state_dict())

    def plain():
        twin = build().to(model.dtype)
        twin.load_state_dict(model.state_dict())
        return twin(ids).logits

    def assert_same():  # and nothing is in memory twice
        fused = model(ids).logits
        tolerance = 16 * torch.finfo(model.dtype).eps
        assert max_error(fused, plain().double()) <= tolerance * fused.abs().max()
        assert sum(storages(model).values()) == model.dtype.itemsize * model.num_parameters()

    before = model(ids).logits
    model.load_state_dict({n: t * 0.7 for n, t in state.items()})
    assert not torch.equal(model(ids).logits, before)
    assert_same()
    model.load_state_dict({n: (t * 0.9).clone() for n, t in state.items()}, assign=True)
    assert_same()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 1.1
    assert_same()
    for parameter in model.parameters():
        parameter.mul_(0.8)
    assert_same()
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    packs = [pack for layer in model.model.layers for pack in layer._packs]
    assert {pack.weight.dtype for pack in packs} == {torch.bfloat16}
    assert_same()
    model.load_state_dict(state)
    assert_same()
    dense = nbl.optimize(build(mix="dense")).double()  # no kernel: transformers' code
    assert dense(ids).logits.dtype == torch.float64


@torch.no_grad()
def test_copies_and_pickles(build, ids):
    model = nbl.optimize(build(mix="dense"))
    before = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_optimized(twin) and torch.equal(twin(ids).logits, before)
        assert not set(storages(twin)) & set(storages(model))
        assert sum(storages(twin).values()) == sum(storages(model).values())
        pack = twin.model.layers[0]._packs[0]
        assert pack.parent is twin.model.layers[0].self_attn
        twin.model.layers[0].self_attn.q_proj.weight.zero_()
        assert not torch.equal(twin(ids).logits, before)
        nbl.restore(twin)
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mix", ["dense", "mixed"])
def test_save_pretrained_writes_the_ordinary_checkpoint(mix, tied, build, ids, tmp_path):
    model = build(mix=mix, tie_word_embeddings=tied)
    before = model(ids).logits
    nbl.optimize(model).save_pretrained(tmp_path)
    assert is_optimized(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight or not tied
    assert torch.equal(loaded(ids).logits, before) and not is_optimized(loaded)
    # a checkpoint's maps have no original: optimize can be undone, they cannot
    fused = nbl.optimize(loaded)(ids).logits
    assert torch.equal(fused, model(ids).logits)
    nbl.restore(loaded)
    assert torch.equal(loaded(ids).logits, before)
    if mix == "mixed":
        with pytest.raises(ValueError, match="loaded from a checkpoint"):
            nbl.restore(loaded)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 2, "cache_implementation": "static"},
        {"do_sample": True, "top_k": 20},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("mix", ["dense", "mixed"])
def test_generate(mix, options, attention, build, padded_inputs, launches):
    model = build(mix=mix, attn_implementation=attention)
    kwargs = {"max_new_tokens": 10, "do_sample": False} | padded_inputs | options
    torch.manual_seed(0)
    expected = model.generate(**kwargs)
    nbl.optimize(model)
    launches.clear()
    torch.manual_seed(0)
    assert torch.equal(model.generate(**kwargs), expected)
    assert "norm_swiglu" in launches


@torch.no_grad()
def test_generate_in_every_family(family, build, padded_inputs):
    model = build(family)
    expected = model.generate(**padded_inputs, max_new_tokens=10)
    assert torch.equal(nbl.optimize(model).generate(**padded_inputs, max_new_tokens=10), expected)


@torch.no_grad()
def test_sliding_windows(family, build, padded_inputs):
    if family == "llama":
        pytest.skip("Llama has no sliding window")
    config = {"use_sliding_window": True, "max_window_layers": 2} if "qwen" in family else {}
    model = build(family, mix="dense", sliding_window=6, **config)
    for options in ({}, {"cache_implementation": "static"}):
        expected = model.generate(**padded_inputs, max_new_tokens=10, **options)
        nbl.optimize(model)
        assert torch.equal(model.generate(**padded_inputs, max_new_tokens=10, **options), expected)
        nbl.restore(model)


@torch.no_grad()
def test_assisted_generation(build, tiny_model, ids):
    stock, model = tiny_model(), nbl.optimize(build())
    expected = stock.generate(ids[:1], max_new_tokens=10)
    assert torch.equal(stock.generate(ids[:1], max_new_tokens=10, assistant_model=model), expected)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_attentions(family, attention, build, ids, launches):
    model = build(family, attn_implementation=attention)
    expected, exact = (m(ids, output_hidden_states=True) for m in (model, exact_copy(model)))
    nbl.optimize(model)
    launches.clear()
    states = model(ids, output_hidden_states=True)
    assert launches.count("norm_swiglu") == 4
    assert len(states.hidden_states) == 5
    for outs in zip(states.hidden_states, expected.hidden_states, exact.hidden_states):
        assert_rounding_only(*outs)
    launches.clear()
    model(ids)  # the hooks that transformers left behind change nothing
    assert launches.count("norm_swiglu") == 4
    if attention == "eager":
        attentions = model(ids, output_attentions=True).attentions
        nbl.restore(model)
        nbl.drop(model, [0, 1, 2])
        assert len(attentions) == 1 and attentions[0].shape == (2, 4, 11, 11)
        model.config.output_attentions = True
        assert len(nbl.optimize(model)(ids).attentions) == 1


@torch.no_grad()
def test_compiles_without_graph_breaks(family, build, ids):
    model = nbl.optimize(build(family))
    expected = model(ids).logits
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(compiled(ids, use_cache=False).logits, expected)
    assert targets.count("nbl.norm_swiglu_inference") == 4
    torch._dynamo.reset()
    cache = StaticCache(config=model.config, max_cache_len=16)
    step = torch.compile(model, backend="eager", fullgraph=True)
    for i in range(ids.shape[1]):
        out = step(ids[:, i : i + 1], **{CACHE: cache})
    assert_rounding_only(out.logits, expected[:, -1:], exact_copy(model)(ids).logits[:, -1:])
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_with_hooks_inside_a_layer(build, ids):
    model = nbl.optimize(build())
    expected, exact = model(ids).logits, exact_copy(model)(ids).logits
    calls = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    compiled = torch.compile(model, backend="eager")
    assert_rounding_only(compiled(ids).logits, expected, exact)
    assert len(calls) == 4
    torch._dynamo.reset()


def test_gradients_are_those_of_the_plain_model(family, build, ids, launches):
    model = build(family)
    gradients = []
    for optimized in (False, True):
        for training in (False, True):
            if optimized:
                nbl.optimize(model)
            model.train(training)
            model.zero_grad()
            launches.clear()
            model(ids, labels=ids).loss.backward()
            assert "norm_swiglu" not in launches
            gradients.append([p.grad.clone() for p in model.parameters()])
    for grads in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, gradients[0]))
    with torch.no_grad():
        before = model.eval()(ids).logits
        torch.optim.SGD(model.parameters(), lr=0.1).step()  # in place: through the views
        after = model(ids).logits
        plain = model.train()(ids).logits  # transformers' code
        exact = exact_copy(model)(ids).logits
    assert not torch.equal(before, after)
    assert_rounding_only(after, plain, exact)


def test_frozen_weights_are_fused_with_gradients_enabled(build, ids, launches):
    model = nbl.optimize(build()).requires_grad_(False)
    launches.clear()
    model(ids)
    assert launches.count("norm_swiglu") == 4
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


@torch.no_grad()
def test_autocast(build, ids):
    model = build(mix="dense")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        assert torch.equal(nbl.optimize(model)(ids).logits, expected)


@torch.no_grad()
def test_calibration_of_an_optimized_model(tiny_model, token_batches):
    plain = nbl.calibrate(tiny_model(), token_batches(4), progress=False)
    fused = nbl.calibrate(nbl.optimize(tiny_model()), token_batches(4), progress=False)
    assert fused.layers == plain.layers
    for layer, solved in plain.solve().items():
        assert torch.equal(fused.solve()[layer].weight, solved.weight)


@torch.no_grad()
def test_hooks_and_replaced_modules_inside_a_layer(build, ids, launches):
    model = nbl.optimize(build(mix="dense"))
    before, exact = model(ids).logits, exact_copy(model)(ids).logits
    layer = model.model.layers[1]
    for module in (layer, layer.self_attn, layer.mlp.up_proj, layer.input_layernorm):
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        launches.clear()
        assert_rounding_only(model(ids).logits, before, exact)
        assert len(seen) == 1
        assert launches.count("norm_swiglu") == (4 if module is layer else 3)
        handle.remove()

    class Adapter(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        @property
        def weight(self):
            return self.linear.weight

        def forward(self, x):
            return self.linear(x) + 1

    for parent, name in ((layer.self_attn, "v_proj"), (layer.mlp, "down_proj")):
        linear = getattr(parent, name)
        setattr(parent, name, Adapter(linear))
        adapted = model(ids).logits
        assert not torch.allclose(adapted, before, rtol=1e-2)
        model.to(torch.float32)
        setattr(parent, name, linear)
        assert torch.equal(model(ids).logits, before)


def test_what_cannot_be_optimized_is_refused_by_name(tiny_model, build):
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
    )
    spread, shared, wrapped, replaced, mixed = (tiny_model() for _ in range(5))
    spread.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    shared.model.layers[2].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    wrapped.model.layers[1].self_attn.k_proj = nn.Sequential(nn.Linear(32, 16))
    wrapped.model.layers[1].self_attn.k_proj.weight = None
    replaced.model.layers[3].mlp.forward = lambda x: x
    mixed.model.layers[1].input_layernorm.double()
    for model, words in {
        gpt2: r"'gpt2'.*llama, mistral, qwen2, qwen3",
        spread: "one device",
        shared: r"layers.2.mlp.up_proj.weight is shared with model.layers.0.mlp.up_proj.weight",
        wrapped: r"layers.1.self_attn.k_proj: expected a plain nn.Linear, got Sequential",
        replaced: r"layers.3: the forward of mlp was replaced",
        mixed: r"layers.1: expected weights of one dtype",
        tiny_model(hidden_act="gelu"): "hidden_act: expected 'silu', got 'gelu'",
        tiny_model().double(): "float64",
    }.items():
        with pytest.raises(ValueError, match=words):
            nbl.optimize(model)
        assert not any(isinstance(m, FusedLayer | FusedHead) for m in model.modules())
