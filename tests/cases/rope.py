"""Arguments of rope_append, and what must come out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tolerance import assert_as_exact_as_torch
from torch import Tensor
from torch.nn import functional as F

import nbl_kernels as nk

# batch, tokens, heads, kv_heads, head_dim, rotated dimensions
SHAPES = [
    (1, 1, 8, 2, 64, 64),
    (2, 5, 4, 4, 128, 128),
    (3, 7, 6, 1, 32, 16),
    (2, 3, 3, 1, 10, 6),  # tails of every vector width
    (1, 2, 2, 2, 90, 90),
    (1, 4, 1, 1, 2, 2),
    (2, 2, 2, 1, 24, 0),
]


def make_inputs(
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotated: int,
    dtype: torch.dtype,
    norm: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """A cache of more rows and slots than the tokens take."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    length, rows = tokens + 5, batch + 1
    angles = torch.rand((19, rotated // 2), generator=g) * 6
    positions = torch.randint(0, 19, (batch, tokens), generator=g)
    slots = torch.rand((batch, length), generator=g).argsort(dim=1)[:, :tokens]
    arguments = {
        "qkv": normal(batch, tokens, heads + 2 * kv_heads, head_dim),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": positions,
        "slots": slots,
        "key_cache": normal(rows, kv_heads, length, head_dim),
        "value_cache": normal(rows, kv_heads, length, head_dim),
    }
    if norm:
        arguments |= {"q_norm_weight": normal(head_dim), "k_norm_weight": normal(head_dim)}
    return {name: t.to(device) for name, t in arguments.items()}


def copied(a: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in a.items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """From a call of each, in q and in the caches."""
    assert torch.equal(nk.rope_append(**actual), nk.rope_append(**expected))
    for name in ("key_cache", "value_cache"):
        assert torch.equal(actual[name], expected[name])


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def torch_rotation(x, cos, sin, norm_weight, positions, norm_eps):
    """As transformers writes it, with the tables in the dtype of x."""
    if norm_weight is not None:
        x = F.rms_norm(x, x.shape[-1:], norm_weight, norm_eps)
    cos, sin = (torch.cat([t, t], -1).to(x.dtype)[positions].unsqueeze(-2) for t in (cos, sin))
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([x * cos + rotate_half(x) * sin, rest], dim=-1)


def assert_right(
    arguments: dict[str, Tensor], append: Callable = nk.rope_append, norm_eps: float = 1e-6
) -> None:
    """The result and the caches after one call, against float64."""
    a = copied(arguments)
    q = append(**a, norm_eps=norm_eps)
    for name in arguments.keys() - {"key_cache", "value_cache"}:
        assert torch.equal(a[name], arguments[name]), f"{name} was changed"
    qkv, kv_heads = arguments["qkv"], arguments["key_cache"].shape[1]
    parts = qkv.split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    tables = [arguments["cos"], arguments["sin"]]
    positions = arguments["positions"].expand(qkv.shape[:2])
    slots = arguments["slots"].expand(qkv.shape[:2])

    def rotation(x, cos, sin, weight):
        return torch_rotation(x, cos, sin, weight, positions.to(x.device), norm_eps)

    assert q.transpose(1, 2).is_contiguous()
    inputs = [parts[0], *tables, arguments.get("q_norm_weight")]
    assert_as_exact_as_torch(q.transpose(1, 2), rotation, inputs)
    rows, tokens = (slots >= 0).nonzero(as_tuple=True)
    written = a["key_cache"][rows, :, slots[rows, tokens]]
    inputs = [parts[1], *tables, arguments.get("k_norm_weight")]
    where = rows.cpu(), tokens.cpu()
    assert_as_exact_as_torch(written, lambda *i: rotation(*i)[where], inputs)
    values = arguments["value_cache"].clone()
    values[rows, :, slots[rows, tokens]] = parts[2][rows, tokens]
    assert torch.equal(a["value_cache"], values)
    a["key_cache"][rows, :, slots[rows, tokens]] = arguments["key_cache"][
        rows, :, slots[rows, tokens]
    ]
    assert torch.equal(a["key_cache"], arguments["key_cache"])  # nothing beside the slots
