"""nbl.plan: what it costs is counted, what it loses is measured, and it is what it says."""

from __future__ import annotations

import itertools

import nbl
import pytest
import torch
from nbl.costs import attention_cost, other_cost
from nbl.models import LayerSpec
from nbl.plan import kind_name
from tiny import make_token_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")

SIZES = {"context": 256, "batch": 4}
WINDOWS = [nbl.Window(8, 1), nbl.Window(32, 1)]


@pytest.fixture
def batches():
    return make_token_batches(4, 2, 64)


@pytest.fixture
def cals(tiny_model, batches):
    memory = nbl.Memory(lags=(1,), decays=(0.8,))
    return [nbl.calibrate(tiny_model(), batches, progress=False, memory=m) for m in (None, memory)]


def nll(model, batches):
    return nbl.perplexity(model, batches).nll


def test_costs_are_what_a_step_reads(family, tiny_model):
    """Counted from the shapes of the model that a plan would make, and of its cache."""
    model = tiny_model(family, torch.bfloat16)
    layer, kv = model.model.layers[1], 2 * 2 * 8 * 2  # keys and values, heads, dimensions, bytes
    weights = sum(p.nbytes for p in layer.self_attn.parameters())
    whole = attention_cost(layer, None, **SIZES)
    assert (whole.weights, whole.cache) == (weights, 4 * 256 * kv)
    assert whole.bytes == weights + whole.cache
    assert whole.flops == 4 * (2 * (32 * 64 + 32 * 32) + 4 * 4 * 8 * 256)
    bounded = attention_cost(layer, LayerSpec.of_window(nbl.Window(30, 2)), **SIZES)
    assert (bounded.weights, bounded.cache) == (weights, 4 * 32 * kv)
    long = attention_cost(layer, LayerSpec.of_window(nbl.Window(300, 2)), **SIZES)
    assert long.cache == whole.cache
    other = other_cost(model, batch=4)
    assert other.cache == 0 and other.weights == nbl.weight_bytes(model) - 4 * weights
    batches = make_token_batches(4)
    memory = nbl.Memory(lags=(1, 2), decays=(0.8,))
    for options in ({}, {"rank": 6}, {"memory": memory}, {"memory": memory, "rank": 6}):
        memory_of = {"memory": options.get("memory")}
        cal = nbl.calibrate(model, batches, layers=[1], progress=False, **memory_of)
        nbl.linearize(model, cal, [1], rank=options.get("rank"))
        linear = model.model.layers[1]
        own = [p for name, p in linear.named_parameters() if name.startswith("linear")]
        cost = attention_cost(layer, linear.spec, **SIZES)
        assert cost.weights == sum(p.nbytes for p in own)
        state = linear.new_state(4).nbytes if linear.spec.has_memory else 0
        assert cost.cache == 2 * state
        nbl.restore(model)
    assert attention_cost(layer, LayerSpec("drop"), **SIZES).bytes == 0


@torch.no_grad()
@pytest.mark.parametrize(
    "asked", [{"speedup": 1.9}, {"bytes": 0.3}, {"speedup": 1.5, "bytes": 0.4}], ids=str
)
def test_a_plan_is_what_it_says(asked, tiny_model, cals, batches):
    model = tiny_model()
    before, said = nll(model, batches), []
    layers = list(model.model.layers)
    options = {"windows": WINDOWS, "ranks": (None, 4), **SIZES, **asked}
    made = nbl.plan(model, cals, batches, **options, say=said.append)
    assert (
        all(a is b for a, b in zip(model.model.layers, layers))
        and model.config.model_type == "llama"
    )
    assert made.speedup >= asked.get("speedup", 0) and made.kv_share <= asked.get("bytes", 1)
    assert len(said) == len(made.front)  # a sentence before the first
    made.apply(model)
    assert nll(model, batches) - before == pytest.approx(made.loss, abs=1e-5)
    found = {i: kind_name(spec) for i, spec in nbl.layers.spec.layer_specs(model.config).items()}
    assert found == made.layers
    # every point on the way reads less than the one before, and the last one was needed
    sizes = [(p.cost.bytes, p.cost.cache) for p in made.front]
    assert all(b[0] < a[0] or b[1] < a[1] for a, b in itertools.pairwise(sizes))
    dense, last = made.front[0].cost, made.front[-2].cost
    short = dense.bytes / last.bytes < asked.get("speedup", 0)
    assert short or last.cache / dense.cache > asked.get("bytes", 1)
    nbl.restore(model)
    assert nll(model, batches) == before
    # and so is every point on the way
    for n in range(len(made.front)):
        part = made.at(n)
        assert part.cost == made.front[n].cost and len(part.front) == n + 1
        part.apply(model)
        assert nll(model, batches) - before == pytest.approx(made.front[n].loss, abs=1e-5)
        nbl.restore(model)
    assert made.at(n).layers == made.layers and made.at(0).layers == {}
    with pytest.raises(ValueError, match="point: expected an index of the front"):
        made.at(len(made.front))


@torch.no_grad()
def test_what_changes_add_alone(tiny_model, cals, batches):
    model = tiny_model()
    made = nbl.plan(model, cals[0], batches, **SIZES, windows=WINDOWS, bytes=0.9)
    sample = batches[:1]
    before = nll(model, sample)
    kinds = {"map", "drop", "window 8+1", "window 32+1"}
    assert set(made.alone) == {(i, kind) for i in range(4) for kind in kinds}
    for key in ((1, "map"), (3, "drop"), (2, "window 8+1")):
        if key[1] == "map":
            nbl.linearize(model, cals[0], [key[0]])
        elif key[1] == "drop":
            nbl.drop(model, [key[0]])
        else:
            nbl.linearize(model, None, [key[0]], window=WINDOWS[0])
        assert nll(model, sample) - before == pytest.approx(made.alone[key], abs=1e-5)
        nbl.restore(model)
    # one change is enough, and it is the cheapest of those that save as much as is needed
    (layer, kind), point = next(iter(made.layers.items())), made.front[1]
    assert (point.layer, point.kind, point.instead_of) == (layer, kind, "keep")


def test_the_kinds_follow_the_context(tiny_model, batches):
    """A window saves nothing where the text is shorter than it; bytes of the cache need windows,
    maps or drops; a plan of windows needs no calibration."""
    model = tiny_model()
    with pytest.raises(ValueError, match="no kind is cheaper than the attention itself"):
        nbl.plan(model, None, batches, context=30, windows=WINDOWS[1:], drop=False, bytes=0.5)
    made = nbl.plan(model, None, batches, context=128, windows=WINDOWS, drop=False, bytes=0.2)
    assert set(made.layers.values()) <= {"window 8+1", "window 32+1"} and not made.maps
    assert made.kv_share <= 0.2


def test_what_is_refused(tiny_model, cals, batches):
    model, asked = tiny_model(), {"context": 64, "speedup": 1.1}
    for wrong, message in (
        ({"speedup": None}, "expected one of them, got neither"),
        ({"speedup": 0.5}, "speedup: expected a number from 1 on"),
        ({"bytes": 1.5}, "bytes: expected a share"),
        ({"context": 0}, "context: expected a positive int"),
        ({"batch": 1.5}, "batch: expected a positive int"),
        ({"remeasured": 0}, "remeasured: expected a positive int"),
        ({"windows": [nbl.Window(64)]}, "windows: expected fewer tokens than the longest .* 64"),
        ({"speedup": 50}, "speedup: expected at most [0-9.]+, which is the most"),
        ({"bytes": 0.0, "drop": False, "windows": WINDOWS}, "bytes: expected a share from"),
    ):
        cal = None if "drop" in wrong else cals[0]
        with pytest.raises(ValueError, match=message):
            nbl.plan(model, cal, batches, **asked | wrong)
    with pytest.raises(ValueError, match="batches: expected token batches"):
        nbl.plan(model, cals[0], [], **asked)
    with pytest.raises(ValueError, match="cal: expected one calibration without and one with"):
        nbl.plan(model, [cals[0], cals[0]], batches, **asked)
    with pytest.raises(ValueError, match="another model"):
        nbl.plan(tiny_model("qwen2"), cals, batches, **asked)
    nbl.drop(model, [1])
    with pytest.raises(ValueError, match="expected one with all its attention"):
        nbl.plan(model, cals, batches, **asked)
