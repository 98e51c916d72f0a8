"""Whatever is attached to a map, to its norm, or inside a fused or quantized layer takes part:
hooks, a replaced forward, parametrizations, exchanged modules; before and after optimize."""

from __future__ import annotations

import copy

import nbl
import pytest
import torch
from tiny import MAPS, linearize_tiny, make_tiny_model
from torch import nn
from torch.nn.utils import parametrize

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")

STATES = {
    "plain": lambda model: model,
    "optimized": nbl.optimize,
    "quantized": lambda model: nbl.optimize(model, weights="int8"),
}
LAYER = 2  # of the linearized ones: there is attention before and after it


@pytest.fixture
def build():
    def make(kind="full", state="plain"):
        model = linearize_tiny(make_tiny_model(), [0, LAYER], **MAPS[kind])
        return STATES[state](model).requires_grad_(False)

    return make


def read_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """Everything with a weight in a decoder layer: what a kernel might read without calling it."""
    return {name: m for name, m in layer.named_modules() if hasattr(m, "weight")}


def double(module: nn.Module) -> None:
    """So that a module gives twice what it gave, by its weights."""
    weight = "weight_scale" if hasattr(module, "weight_scale") else "weight"
    for name in (weight, "bias"):
        tensor = getattr(module, name, None)
        if tensor is not None:
            tensor.data.mul_(2)


@torch.no_grad()
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("kind", "layer"), [*((kind, LAYER) for kind in MAPS), ("full", 1)], ids=str
)
def test_hooks_take_part(kind, layer, state, build, ids):
    """Of every module of a linearized and of an attention layer, one at a time: a hook that doubles
    what the module returns is as good as doubled weights, and is forgotten with its handle."""
    model = build(kind, state)
    before = model(ids).logits
    for name, module in read_modules(model.model.layers[layer]).items():
        other = copy.deepcopy(model)
        double(other.model.layers[layer].get_submodule(name))
        expected, calls = other(ids).logits, []
        assert not torch.equal(expected, before), name
        handles = [
            module.register_forward_pre_hook(lambda *_, calls=calls: calls.append("pre")),
            module.register_forward_hook(lambda module, args, output: output * 2),
        ]
        torch.testing.assert_close(model(ids).logits, expected, msg=lambda m, name=name: name + m)
        assert calls == ["pre"]
        for handle in handles:
            handle.remove()
        assert torch.equal(model(ids).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", MAPS)
def test_a_replaced_forward_is_called(kind, state, build, ids):
    """As accelerate does it, on the object."""
    model = build(kind, state)
    for name, module in read_modules(model.model.layers[LAYER]).items():
        own, calls = module.forward, []

        def forward(x, own=own, calls=calls):
            calls.append(1)
            return own(x)

        module.forward = forward
        before = model(ids).logits
        assert calls, name
        del module.forward
        torch.testing.assert_close(model(ids).logits, before)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@torch.no_grad()
@pytest.mark.parametrize("state", ["plain", "optimized"])
@pytest.mark.parametrize("name", ["linear", "input_layernorm", "mlp.up_proj"])
def test_parametrizations_take_part(name, state, build, ids):
    model, other = build(state=state), build(state=state)
    other.model.layers[LAYER].get_submodule(name).weight.mul_(2)
    module = model.model.layers[LAYER].get_submodule(name)
    parametrize.register_parametrization(module, "weight", Doubled())
    torch.testing.assert_close(model(ids).logits, other(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("state", STATES)
def test_global_hooks_fire(state, build, ids):
    model, seen = build(state=state), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(m))
    try:
        model(ids)
    finally:
        handle.remove()
    expected = [m for m in model.modules() if hasattr(m, "weight")]
    assert seen.issuperset(expected)


@torch.no_grad()
def test_exchanged_modules_take_part(build, ids):
    """After optimize: a norm of another class, and a whole block of the same one."""
    model, other = build(state="optimized"), build()
    before = model(ids).logits

    class OtherNorm(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

        def forward(self, x):
            return 3 * nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    for which in (model, other):
        for layer in (1, LAYER):
            norm = which.model.layers[layer].post_attention_layernorm
            which.model.layers[layer].post_attention_layernorm = OtherNorm(norm)
    torch.testing.assert_close(model(ids).logits, other(ids).logits)
    assert not torch.allclose(model(ids).logits, before, rtol=1e-2)
    for layer in (1, LAYER):
        mlp = copy.deepcopy(other.model.layers[layer].mlp)
        for parameter in mlp.parameters():
            parameter.neg_()
        model.model.layers[layer].mlp = other.model.layers[layer].mlp = mlp
    torch.testing.assert_close(model(ids).logits, other(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("where", ["lm_head", "model.norm"])
def test_a_runner_refuses_what_it_would_leave_out(where, build, ids):
    model = build(state="optimized")
    runner = nbl.Runner(model, 2, 32)
    expected = runner.generate(ids, 4)
    handle = model.get_submodule(where).register_forward_hook(lambda m, args, y: y * 0)
    with pytest.raises(RuntimeError, match=f"{where} has hooks"):
        runner.generate(ids, 4)
    handle.remove()
    assert all(map(torch.equal, runner.generate(ids, 4), expected))
