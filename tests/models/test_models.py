"""A linearized model computes what the same maps compute in plain PyTorch, and can be undone."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import nbl
import pytest
import torch
import transformers
from nbl.models import FAMILIES, LayerSpec, LinearizedDecoderLayer
from tolerance import max_error
from torch.nn import functional as F

import nbl_kernels as nk

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")  # as many as these tests need

LAYERS = [0, 2]


def calibrate(model, batches, **kwargs):
    return nbl.calibrate(model, batches, progress=False, **kwargs)


@contextmanager
def plain_maps(model, maps, features="post-norm"):
    """The stock model, each attention output replaced by W f + b by a hook."""
    handles = []
    for i, solved in maps.items():
        layer = model.model.layers[i]
        seen = {}

        def norm_hook(module, args, output, seen=seen):
            seen["f"] = output if features == "post-norm" else args[0]

        def attention_hook(module, args, output, seen=seen, solved=solved):
            if solved is None:
                return torch.zeros_like(seen["f"]), None
            like = seen["f"].dtype
            tensors = (t.to(like) for t in (solved.factors or (solved.weight,))[::-1])
            y = seen["f"]
            for weight in tensors:
                y = F.linear(y, weight)
            return (y if solved.bias is None else y + solved.bias.to(like)), None

        handles += [
            layer.input_layernorm.register_forward_hook(norm_hook),
            layer.self_attn.register_forward_hook(attention_hook),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rounded(solved, dtype):
    """The map as the model holds it, so that both sides start from the same numbers."""

    def cast(t):
        return None if t is None else t.to(dtype).double()

    factors = None if solved.factors is None else tuple(map(cast, solved.factors))
    return nk.Lmmse(cast(solved.weight), cast(solved.bias), solved.nmse, solved.ridge, factors)


def assert_logits_as_plain(model, ids, maps, features):
    """Error against float64 at most twice that of plain PyTorch in the same dtype."""
    dtype = model.dtype
    linearized = model(ids).logits
    stock = nbl.restore(model)
    maps = {i: None if s is None else rounded(s, dtype) for i, s in maps.items()}
    with plain_maps(stock, maps, features):
        plain = stock(ids).logits
    exact_model = copy.deepcopy(stock).double()
    with plain_maps(exact_model, maps, features):
        exact = exact_model(ids).logits
    assert linearized.dtype == dtype
    assert max_error(plain, exact) > 0
    assert max_error(linearized, exact) <= 2 * max_error(plain, exact)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("features", "bias", "rank"),
    [
        ("post-norm", True, None),
        ("pre-norm", False, None),
        ("post-norm", False, 5),
        ("pre-norm", True, 5),
    ],
)
def test_logits_equal_plain_pytorch(
    family, dtype, features, bias, rank, tiny_model, token_batches, ids
):
    model = tiny_model(family, dtype)
    cal = calibrate(model, token_batches(), features=features)
    maps = cal.solve(bias=bias, rank=rank, layers=LAYERS)
    before = model(ids).logits
    assert nbl.linearize(model, cal, LAYERS, bias=bias, rank=rank) is model
    assert max_error(model(ids).logits, before.double()) > 0.01
    assert_logits_as_plain(model, ids, maps, features)


@torch.no_grad()
def test_drop_equals_zeroed_attention(family, tiny_model, ids):
    model = nbl.drop(tiny_model(family), [1, 3])
    assert nbl.linearized_layers(model) == [1, 3]
    assert_logits_as_plain(model, ids, {1: None, 3: None}, "post-norm")


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 6])
def test_alternating_and_sliding_attention(family, window, tiny_model, token_batches, ids):
    if family == "llama" and window:
        pytest.skip("Llama has no sliding window")
    # Qwen: full attention below max_window_layers, sliding from there on
    config = {"use_sliding_window": True, "max_window_layers": 2} if "qwen" in family else {}
    model = tiny_model(family, sliding_window=window, **config)
    cal = calibrate(model, token_batches())
    for layers in ([0], [3], [0, 1], [2, 3]):
        nbl.linearize(model, cal, layers)
        assert_logits_as_plain(model, ids, cal.solve(layers=layers), "post-norm")


@torch.no_grad()
def test_restore_gives_back_the_very_model(family, tiny_model, token_batches, ids):
    model = tiny_model(family)
    before = model(ids).logits
    layers = list(model.model.layers)
    classes = type(model), type(model.model), type(model.config)
    config, config_dict = model.config, model.config.to_dict()
    keys = list(model.state_dict())
    cal = calibrate(model, token_batches())
    nbl.linearize(model, cal, [0, 1])
    assert type(model).__name__.startswith("Nbl") and model.config.model_type == f"nbl_{family}"
    assert not any("self_attn" in k for k in model.state_dict() if ".0." in k or ".1." in k)
    assert sum(p.numel() for p in model.parameters()) == sum(
        t.numel() for t in model.state_dict().values()
    )
    nbl.linearize(model, cal, [1, 2], bias=False)  # 1 gets another map, 2 is added
    nbl.drop(model, [3])
    assert nbl.linearized_layers(model) == [0, 1, 2, 3]
    assert model.model.layers[1].linear.bias is None
    assert model.model.layers[0].linear.bias is not None
    assert nbl.restore(model) is model
    assert (type(model), type(model.model), type(model.config)) == classes
    assert all(a is b for a, b in zip(model.model.layers, layers, strict=True))
    assert model.config is config and model.config.to_dict() == config_dict
    assert list(model.state_dict()) == keys
    assert nbl.linearized_layers(model) == []
    assert torch.equal(model(ids).logits, before)
    assert nbl.restore(model) is model  # nothing left to undo


@torch.no_grad()
def test_originals_follow_the_model_at_restore(tiny_model, token_batches, ids):
    model = tiny_model()
    cal = calibrate(model, token_batches())
    nbl.linearize(model, cal, [0, 1])
    model.bfloat16().train()
    twin = copy.deepcopy(model)
    nbl.restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(m.training for m in model.modules())
    assert torch.equal(model(ids).logits, tiny_model().bfloat16().train()(ids).logits)
    assert nbl.linearized_layers(twin) == [0, 1]
    nbl.restore(twin)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert twin.model.layers[0] is not model.model.layers[0]


@torch.no_grad()
def test_hidden_states_and_attentions(family, tiny_model, token_batches, ids):
    model = tiny_model(family, attn_implementation="eager")
    cal = calibrate(model, token_batches())
    for hooked_before in (False, True):
        if hooked_before:  # transformers installs its capturing hooks once, on the layers of then
            model(ids, output_hidden_states=True)
        nbl.linearize(model, cal, [0, 2])
        states = model(ids, output_hidden_states=True, output_attentions=True)
        seen = {}
        handles = [
            layer.register_forward_hook(lambda m, a, out, i=i, seen=seen: seen.update({i: out}))
            for i, layer in enumerate(model.model.layers)
        ]
        model(ids)
        for handle in handles:
            handle.remove()
        assert len(states.hidden_states) == 5
        for i in range(3):
            assert torch.equal(states.hidden_states[i + 1], seen[i])
        assert len(states.attentions) == 2  # of the layers that have attention
        nbl.restore(model)
        assert len(model(ids, output_hidden_states=True).hidden_states) == 5


def test_gradients_with_and_without_checkpointing(family, tiny_model, token_batches, ids):
    model = tiny_model(family)
    cal = calibrate(model, token_batches())
    nbl.linearize(model, cal, [0, 1, 3])
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        assert torch.allclose(gradient, gradients[1][name]), name
    nbl.restore(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    model(ids, labels=ids).loss.backward()


@torch.no_grad()
def test_compiles_without_graph_breaks(tiny_model, token_batches, ids):
    torch.compiler.reset()  # of what other tests compiled, there is a limit to how much
    model = tiny_model()
    cal = calibrate(model, token_batches())
    nbl.linearize(model, cal, [0, 3])
    nbl.drop(model, [1])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids, use_cache=False).logits, model(ids).logits)


def test_registry(family):
    entry = FAMILIES[family]
    config = transformers.AutoConfig.for_model(f"nbl_{family}", num_hidden_layers=2)
    assert type(config) is entry.nbl_config and config.nbl["layers"] == {}
    for cls in (entry.nbl_config, entry.nbl_model, entry.nbl_causal_lm):
        assert pickle.loads(pickle.dumps(cls)) is cls
    assert issubclass(entry.nbl_causal_lm, entry.causal_lm)


def test_model_from_config(tiny_model, ids):
    config = nbl.models.NblLlamaConfig(
        **tiny_model().config.to_dict()
        | {"nbl": nbl.models.config_entry({0: LayerSpec("linear"), 2: LayerSpec("drop")})}
    )
    state = torch.get_rng_state()
    model = transformers.AutoModelForCausalLM.from_config(config)
    kinds = [isinstance(layer, LinearizedDecoderLayer) for layer in model.model.layers]
    assert kinds == [True, False, True, False]
    assert not model.model.layers[0].linear.weight.any()  # zeros until set, no random numbers
    assert model(ids).logits.shape == (2, 11, config.vocab_size)
    torch.set_rng_state(state)
    base = transformers.AutoModel.from_config(config)
    assert type(base) is nbl.models.NblLlamaModel
    assert base(ids).last_hidden_state.shape == (2, 11, config.hidden_size)


def test_unsupported_models_are_refused_by_name(tiny_model, token_batches):
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)
    )
    cal = calibrate(tiny_model(), token_batches(2))
    for call in (lambda: nbl.linearize(gpt2, cal, [0]), lambda: calibrate(gpt2, [])):
        with pytest.raises(ValueError, match=r"'gpt2'.*llama, mistral, qwen2, qwen3"):
            call()

    class Special(transformers.LlamaForCausalLM):
        pass

    special = Special(tiny_model().config)
    with pytest.raises(ValueError, match="Special"):
        nbl.drop(special, [0])
    with pytest.raises(ValueError, match="float64"):
        nbl.linearize(tiny_model().double(), cal, [0])
    with pytest.raises(ValueError, match="Linear"):
        nbl.restore(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        ([4], ValueError, "out of range"),
        ([-1], ValueError, "out of range"),
        ([1, 1], ValueError, "twice"),
        ([True], TypeError, "layer ids"),
        (True, TypeError, "layer ids"),
        ("12", TypeError, "layer ids"),
        ([0.0], TypeError, "layer ids"),
        (None, TypeError, "layer ids"),
        (5, ValueError, "from 0 to 3"),
        (-1, ValueError, "from 0 to 3"),
        ([3], ValueError, "not in the calibration"),
    ],
)
def test_bad_layers_leave_the_model_untouched(layers, error, words, tiny_model, token_batches, ids):
    model = tiny_model()
    cal = calibrate(model, token_batches(2), layers=[0, 1, 2])
    before = model(ids).logits
    with pytest.raises(error, match=words):
        nbl.linearize(model, cal, layers)
    assert type(model) is transformers.LlamaForCausalLM and not hasattr(model.config, "nbl")
    assert torch.equal(model(ids).logits, before)


def test_maps_are_checked(tiny_model, token_batches):
    model = tiny_model()
    cal = calibrate(model, token_batches())
    maps = cal.solve()
    bad = {1: nk.Lmmse(maps[1].weight[:, :5], maps[1].bias, maps[1].nmse, maps[1].ridge)}
    with pytest.raises(ValueError, match=r"maps\[1\]: expected shapes"):
        nbl.linearize(model, cal, [1], maps=bad)
    with pytest.raises(ValueError, match="no map for layer 2"):
        nbl.linearize(model, cal, [2], maps={1: maps[1]})
    with pytest.raises(ValueError, match="bias=False"):
        nbl.linearize(model, cal, [1], maps=maps, bias=False)
    with pytest.raises(ValueError, match="no factors"):
        nbl.linearize(model, cal, [1], maps=maps, rank=3)
    infinite = {1: nk.Lmmse(maps[1].weight * 1e300, maps[1].bias, maps[1].nmse, maps[1].ridge)}
    with pytest.raises(ValueError, match=r"layer 1.*not finite"):
        nbl.linearize(model, cal, [0, 1], maps=maps | infinite)
    assert type(model) is transformers.LlamaForCausalLM
    nbl.linearize(model, cal, [1, 2], maps=maps)
    assert torch.equal(model.model.layers[1].linear.weight, maps[1].weight.float())


def test_calibration_of_another_model_is_refused(tiny_model, token_batches):
    cal = calibrate(tiny_model(), token_batches(2))
    for other in (tiny_model("mistral"), tiny_model(num_hidden_layers=5)):
        with pytest.raises(ValueError, match="another model"):
            nbl.linearize(other, cal, [0])


def test_model_over_several_devices_is_refused(tiny_model):
    model = tiny_model()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(ValueError, match="one device"):
        nbl.drop(model, [0])


def test_a_number_of_layers_takes_the_first_of_the_ranking(tiny_model, token_batches):
    model = tiny_model()
    cal = calibrate(model, token_batches())
    order = [score.layer for score in cal.rank("cca")]
    nbl.linearize(model, cal, 2, criterion="cca")
    assert nbl.linearized_layers(model) == sorted(order[:2])
    nbl.linearize(model, cal, 1, criterion="cca")  # one more, of those with attention
    assert nbl.linearized_layers(model) == sorted(order[:3])
    nbl.restore(model)
    nbl.linearize(model, cal, 0)
    assert type(model) is transformers.LlamaForCausalLM


@torch.no_grad()
def test_user_hooks_stay_with_the_depth(tiny_model, token_batches, ids):
    model = tiny_model()
    cal = calibrate(model, token_batches())
    calls = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    nbl.linearize(model, cal, [1])
    model(ids)
    assert len(calls) == 1
    handle.remove()
    model(ids)
    nbl.restore(model)
    model(ids)
    assert len(calls) == 1
