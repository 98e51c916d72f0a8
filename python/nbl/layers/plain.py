"""Which modules may be computed by a kernel that reads their weights, without being called.

One rule for maps, norms, fused and quantized layers: a kernel runs where a module is of the class
it was written for, nothing is attached to it, and its weights are ordinary tensors. Everywhere else
the module is called, as transformers would call it. So hooks fire, adapters take part, and weights
that accelerate keeps elsewhere, or torchao in a format of its own, are what they should be. The
rule is asked at every forward pass: what is attached later counts as well.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook as all_are_observed

from ..upstream import NORMS, is_capturing_hook
from .quantized import QuantizedLinear

__all__ = [
    "LINEARS",
    "all_are_observed",
    "has_plain_weights",
    "is_observed",
    "is_plain",
    "is_plain_linear",
    "is_plain_norm",
]

LINEARS = (nn.Linear, QuantizedLinear)

# A FakeTensor stands for a plain one while a graph is traced.
_TENSORS = (nn.Parameter, Tensor, FakeTensor)


def is_plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether it is of one of these very classes, and its weights are all there is to it."""
    return type(module) in kinds and not is_observed(module) and has_plain_weights(module)


def is_plain_linear(module: nn.Module) -> bool:
    return is_plain(module, LINEARS)


def is_plain_norm(module: nn.Module) -> bool:
    return is_plain(module, NORMS)


def is_observed(module: nn.Module) -> bool:
    """Whether somebody relies on this module being called: its forward was replaced, or it has
    hooks. transformers' own hooks, which stay once output_hidden_states was asked for, do not
    count; attentions are asked for by an argument. Hooks on all modules are asked for apart."""
    state = module.__dict__
    if "forward" in state or state["_forward_pre_hooks"]:
        return True
    hooks = state["_forward_hooks"]
    return bool(hooks) and not all(map(is_capturing_hook, hooks.values()))


def has_plain_weights(module: nn.Module) -> bool:
    """Whether its parameters and buffers are ordinary tensors with numbers in them: not of another
    class, and not on the device meta."""
    state = module.__dict__
    for tensors in (state["_parameters"], state["_buffers"]):
        for tensor in tensors.values():
            if tensor is not None and (type(tensor) not in _TENSORS or tensor.is_meta):
                return False
    return True
