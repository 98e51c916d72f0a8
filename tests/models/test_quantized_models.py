"""nbl.optimize(model, weights=…): what the plain model with the rounded weights computes, in less
memory, and never anything else without a word."""

from __future__ import annotations

import copy
import io
import weakref

import nbl
import pytest
import torch
import transformers
from nbl.layers.fused import FusedLayer
from nbl.layers.quantized import QuantizedLinear
from nbl.upstream import CACHE
from tiny import MIXES
from tolerance import assert_rounding_only, exact_copy
from torch import nn
from transformers import DynamicCache

import nbl_kernels as nk

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")  # as many as these tests need

FORMATS = ["int8", "fp8", "int4"]
NEW = 12


@pytest.fixture(params=FORMATS)
def weights(request):
    return request.param


@torch.no_grad()
def rounded_copy(model, weights):
    """The model, with the values that quantized weights mean; the embedding keeps its own."""
    twin = copy.deepcopy(model)
    if twin.lm_head.weight is twin.model.embed_tokens.weight:
        twin.lm_head.weight = nn.Parameter(twin.lm_head.weight.clone())
    for linear in twin.modules():
        if isinstance(linear, nn.Linear):
            values, scale = nk.quantize(linear.weight, weights)
            linear.weight.copy_(nk.dequantize(values, scale, linear.in_features, torch.float64))
    return twin


def held_bytes(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def linears_of(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear | QuantizedLinear)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_logits_are_those_of_the_rounded_weights(family, mix, dtype, weights, build, ids):
    model = build(family, mix, dtype)
    plain = rounded_copy(model, weights)
    # rounded once more where the model is not float32: what PyTorch would compute with
    exact = (
        rounded_copy(exact_copy(model), weights) if dtype == torch.bfloat16 else exact_copy(plain)
    )
    nbl.optimize(model, weights=weights)
    assert all(type(m) is QuantizedLinear and m.format == weights for m in linears_of(model))
    expected = exact(ids).logits
    assert_rounding_only(model(ids).logits, plain(ids).logits, expected)
    parts, cache = [], DynamicCache(config=model.config)
    for i in range(ids.shape[1]):
        parts.append(model(ids[:, i : i + 1], **{CACHE: cache}).logits)
    assert_rounding_only(torch.cat(parts, 1), plain(ids).logits, expected)
    assert nbl.linearized_layers(model) == sorted(MIXES[mix][0] + MIXES[mix][1])


@torch.no_grad()
@pytest.mark.parametrize("features", ["pre-norm", "post-norm"])
def test_maps_of_reduced_rank(features, tiny_model, token_batches, ids):
    model = tiny_model()
    cal = nbl.calibrate(model, token_batches(4), progress=False, features=features)
    nbl.linearize(model, cal, [1, 2], rank=5)
    plain = rounded_copy(model, "int8")
    expected = exact_copy(plain)(ids).logits
    nbl.optimize(model, weights="int8")
    assert_rounding_only(model(ids).logits, plain(ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("config", [{"attention_bias": True}, {"mlp_bias": True}], ids=str)
def test_biases_stay_what_they_are(config, build, ids):
    model = build(**config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    plain = rounded_copy(model, "int4")
    expected = exact_copy(plain)(ids).logits
    assert_rounding_only(
        nbl.optimize(model, weights="int4")(ids).logits, plain(ids).logits, expected
    )


@torch.no_grad()
@pytest.mark.parametrize("mix", MIXES)
def test_generation(family, mix, weights, build, padded_inputs):
    model = build(family, mix)
    plain = rounded_copy(model, weights)
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = plain.generate(**padded_inputs, **options)
    nbl.optimize(model, weights=weights)
    assert torch.equal(model.generate(**padded_inputs, **options), expected)
    static = model.generate(**padded_inputs, **options, cache_implementation="static")
    assert torch.equal(static, expected)
    runner = nbl.Runner(model, 2, 40)
    mask = padded_inputs["attention_mask"]
    new = runner.generate(padded_inputs["input_ids"], NEW, attention_mask=mask)
    assert torch.equal(torch.stack(new), expected[:, mask.shape[1] :])
    assert all(type(m) is QuantizedLinear for m in linears_of(model))  # Runner leaves them alone
    beams = options | {"num_beams": 3}
    assert torch.equal(
        model.generate(**padded_inputs, **beams), plain.generate(**padded_inputs, **beams)
    )


@torch.no_grad()
def test_compiles_without_graph_breaks(weights, build, ids):
    model = nbl.optimize(build(), weights=weights)
    expected = model(ids).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids, use_cache=False).logits, expected)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_memory_falls(mix, tied, optimized, weights, build, ids):
    model = build(mix=mix, tie_word_embeddings=tied)
    if optimized:
        nbl.optimize(model)
    before, embedding = held_bytes(model), model.model.embed_tokens.weight
    linears = linears_of(model)
    sizes = [(m.weight.nbytes, *m.weight.shape) for m in linears]
    gone = [weakref.ref(m.weight) for m in linears if m.weight is not embedding]
    gone += [weakref.ref(layer) for layer in vars(model).get("_nbl_original_layers", {}).values()]
    del linears
    nbl.optimize(model, weights=weights)
    assert not any(ref() for ref in gone)

    bits = {
        "int8": lambda n, k: n * k + 4 * n,
        "fp8": lambda n, k: n * k + 4 * n,
        "int4": lambda n, k: -(-k // 128) * n * (64 + 2),
    }[weights]
    smaller = sum(bits(n, k) for _, n, k in sizes)
    larger = sum(size for size, *_ in sizes) - (embedding.nbytes if tied else 0)
    assert held_bytes(model) == before - larger + smaller
    norms = [m for name, m in model.named_modules() if "norm" in name]
    others = sum(m.weight.nbytes for m in norms)
    others += sum(m.bias.nbytes for m in linears_of(model) if m.bias is not None)
    assert nbl.weight_bytes(model) == smaller + others
    assert model.get_memory_footprint() == held_bytes(model)
    model(ids)  # packs nothing anew
    assert held_bytes(model) == before - larger + smaller


def test_bytes_of_a_decode_step(tiny_model):
    for tied in (False, True):
        model = tiny_model(tie_word_embeddings=tied)
        expected = sum(p.nbytes for p in model.parameters())
        embedding = model.model.embed_tokens.weight.nbytes
        assert nbl.weight_bytes(model) == expected - (0 if tied else embedding)
        assert nbl.weight_bytes(nbl.optimize(model)) == expected - (0 if tied else embedding)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_restore_with_the_originals_kept(
    family, when, optimized, tied, tiny_model, token_batches, ids, padded_inputs
):
    model = tiny_model(family, tie_word_embeddings=tied)
    cal = nbl.calibrate(model, token_batches(4), progress=False)
    expected, state = model(ids).logits, copy.deepcopy(model.state_dict())
    parameters, classes = dict(model.named_parameters()), [type(m) for m in model.modules()]
    memory = held_bytes(model)
    if optimized:
        nbl.optimize(model)
    if when == "before":
        nbl.linearize(model, cal, [0, 2])
    assert nbl.optimize(model, weights="int4", keep_original=True) is model
    if when == "after":
        nbl.linearize(model, cal, [0, 2])
        assert isinstance(model.model.layers[2].linear, QuantizedLinear)
    assert not torch.equal(model(ids).logits, expected)
    if optimized:  # what was kept follows the model
        model.to(torch.float64).to(torch.float32)
    assert nbl.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert not any({"_packs", "_original"} & set(vars(m)) for m in model.modules())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert held_bytes(model) == memory
    assert torch.equal(model(ids).logits, expected)
    assert model.generate(**padded_inputs, max_new_tokens=3).shape == (2, 12)


@torch.no_grad()
@pytest.mark.parametrize("mix", MIXES)
def test_restore_without_them_is_refused(mix, build, token_batches, ids):
    model = nbl.optimize(build(mix=mix), weights="int8")
    cal = nbl.calibrate(build(mix="dense"), token_batches(4), progress=False)
    for _ in range(2):
        expected = model(ids).logits
        with pytest.raises(ValueError, match="its original weights are gone: load the model again"):
            nbl.restore(model)
        assert all(isinstance(layer, FusedLayer) for layer in model.model.layers)
        assert torch.equal(model(ids).logits, expected)
        nbl.linearize(model, cal, [3])
        assert vars(model)["_nbl_original_layers"] == {}  # of no use any more


@torch.no_grad()
def test_restore_of_a_checkpoint_with_maps(build, ids, tmp_path):
    build().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = model(ids).logits
    nbl.optimize(model, weights="fp8", keep_original=True)
    assert torch.equal(nbl.restore(model)(ids).logits, expected)
    assert nbl.linearized_layers(model) == [0, 1, 2]


@pytest.mark.parametrize("mix", MIXES)
def test_saving_is_refused_before_anything_is_written(mix, weights, build, tmp_path):
    model = nbl.optimize(build(mix=mix), weights=weights, keep_original=True)
    with pytest.raises(ValueError, match=f"quantized to {weights}, which a checkpoint cannot hold"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    nbl.restore(model).save_pretrained(tmp_path / "out")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@torch.no_grad()
def test_state_dicts_are_exchanged_within_a_format_only(build, ids):
    model, other = (nbl.optimize(build(), weights="int8") for _ in range(2))
    state = copy.deepcopy(model.state_dict())
    expected = model(ids).logits
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(ids).logits, expected)
    for foreign in (build().state_dict(), nbl.optimize(build(), weights="int4").state_dict()):
        for strict in (True, False):
            with pytest.raises(
                RuntimeError, match=r"down_proj.weight: expected torch.int8 of shape"
            ):
                copy.deepcopy(model).load_state_dict(foreign, strict=strict)


@torch.no_grad()
def test_weights_follow_the_model(weights, build, ids):
    model = nbl.optimize(build(), weights=weights)
    expected = model(ids).logits
    file = io.BytesIO()  # not pickle.dumps, which PyTorch does not support in fp8
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(ids).logits, expected) and held_bytes(twin) == held_bytes(model)
    before = [t.clone() for t in model.buffers()]
    model.to(torch.bfloat16)
    numbers = [m.weight.dtype for m in linears_of(model)]
    assert set(numbers) == {
        dict(int8=torch.int8, fp8=torch.float8_e4m3fn, int4=torch.uint8)[weights]
    }
    assert model(ids).logits.dtype == torch.bfloat16
    dense = nbl.optimize(build(mix="dense"), weights=weights).double()
    assert dense(ids).logits.dtype == torch.float64  # no kernel: transformers' code
    for a, b in zip(model.buffers(), before, strict=True):
        if a.dtype == b.dtype:
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_gradients_go_through_the_weights(build, ids):
    model = build(mix="mixed", tie_word_embeddings=True)
    plain = rounded_copy(model, "int8")
    exact = exact_copy(plain)
    nbl.optimize(model, weights="int8")
    grads = []
    for m in (model, plain, exact):
        m(ids, labels=ids).loss.backward()
        grads.append([p.grad for name, p in m.named_parameters() if "norm" in name])
    for a, p, e in zip(*grads, strict=True):
        assert_rounding_only(a, p, e)
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_autocast(build, ids):
    model = build("qwen2", "dense")
    plain = rounded_copy(model, "int8")
    exact = exact_copy(plain)(ids).logits
    nbl.optimize(model, weights="int8")
    with torch.autocast("cpu", torch.bfloat16):
        expected, logits = plain(ids).logits, model(ids).logits
    assert (logits - exact).abs().max() <= 2 * (expected - exact).abs().max()


@torch.no_grad()
def test_calibration_of_a_quantized_model(build, token_batches, ids):
    """Works: in transformers' code, by the rounded weights; the new maps are quantized too."""
    model = build(mix="dense")
    plain = rounded_copy(model, "int8")
    nbl.optimize(model, weights="int8")
    batches = token_batches(4)
    ours = nbl.calibrate(model, batches, progress=False)
    theirs = nbl.calibrate(plain, batches, progress=False)
    exact = nbl.calibrate(rounded_copy(build(mix="dense"), "int8"), batches, progress=False)
    for layer in range(4):
        a, p = (c.moments(layer).cov_tf for c in (ours, theirs))
        assert torch.equal(p, exact.moments(layer).cov_tf)
        assert (a - p).norm() <= 1e-5 * p.norm()
    losses = ours.rank("loss", model=model, batches=batches)
    assert len(losses) == 4 and all(isinstance(m, QuantizedLinear) for m in linears_of(model))
    nbl.linearize(model, ours, 2)
    assert all(isinstance(m, QuantizedLinear) for m in linears_of(model))
    assert len(nbl.linearized_layers(model)) == 2 and model(ids).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("order", ["draft first", "draft later", "optimized, draft, quantized"])
def test_drafts(order, weights, build, token_batches, padded_inputs, tmp_path):
    """The draft shares the quantized weights, its maps are quantized, and the tokens stay."""
    model = build(mix="dense")
    cal = nbl.calibrate(model, token_batches(4), progress=False)
    expected = rounded_copy(model, weights).generate(**padded_inputs, max_new_tokens=NEW)[:, 9:]
    if order.startswith("optimized"):
        nbl.optimize(model)
    if order == "draft later":
        nbl.optimize(model, weights=weights)
    draft = nbl.draft_model(model, cal, [1, 3])
    nbl.optimize(model, weights=weights)
    runner = nbl.Runner(model, 2, 40, draft=draft)
    for layers in (1, 2):
        new = runner.generate(
            padded_inputs["input_ids"],
            NEW,
            attention_mask=padded_inputs["attention_mask"],
            draft_layers=layers,
        )
        assert torch.equal(torch.stack(new), expected)
    assert all(isinstance(m, QuantizedLinear) for m in linears_of(draft))
    shared = {t.untyped_storage().data_ptr() for t in model.buffers()}
    assert {
        t.untyped_storage().data_ptr() for n, t in draft.named_buffers() if "mlp" in n
    } <= shared
    with pytest.raises(ValueError, match="cannot hold"):
        draft.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_quantized_is_refused(tiny_model, token_batches):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"weights: expected None or one of int8, fp8, int4.*int3"):
        nbl.optimize(model, weights="int3")
    with pytest.raises(ValueError, match="keep_original: expected weights beside it"):
        nbl.optimize(model, keep_original=True)
    broken, wrapped, adapted = (tiny_model() for _ in range(3))
    broken.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")
    wrapped.model.layers[1].self_attn.k_proj = nn.Sequential(nn.Linear(32, 16))
    wrapped.model.layers[1].self_attn.k_proj.weight = None
    nbl.optimize(adapted).model.layers[1].mlp.down_proj = nn.Sequential(nn.Linear(48, 32))
    adapted.model.layers[1].mlp.down_proj.weight = None
    for bad, words in {
        broken: "layers.2.mlp.up_proj.weight: expected finite weights",
        wrapped: r"layers.1.self_attn.k_proj: expected a plain nn.Linear, got Sequential",
        adapted: r"layers.1.mlp.down_proj: expected a plain nn.Linear, got Sequential",
    }.items():
        with pytest.raises(ValueError, match=words):
            nbl.optimize(bad, weights="int8")
        assert not any(isinstance(m, QuantizedLinear) for m in bad.modules())
    draft = nbl.draft_model(model, nbl.calibrate(model, token_batches(4), progress=False), [1])
    with pytest.raises(ValueError, match="the model is a draft"):
        nbl.optimize(draft, weights="int8")
    nbl.optimize(model, weights="int8")
    nbl.optimize(model)
    nbl.optimize(model, weights="int8")  # nothing left to do
    with pytest.raises(ValueError, match="weights: expected None, they are int8 already"):
        nbl.optimize(model, weights="int4")
