"""What nbl finds out about the transformers that is installed, and what it does where it cannot."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import nbl
import pytest
import torch
from nbl import measure, selfcheck, upstream
from nbl.upstream import CACHE, output_cache
from nbl_cli.app import app
from tiny import linearize_tiny, make_tiny_model
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache
from typer.testing import CliRunner

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few")

ALL = [0, 1, 2, 3]
MEMORY = nbl.Memory(lags=(1, 2), decays=(0.8,))


@pytest.fixture
def linearized():
    def make(layers=(0, 2), memory=None, **config):
        return linearize_tiny(make_tiny_model(**config), layers, memory=memory)

    return make


# --- versions ------------------------------------------------------------------------------------


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def fake_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    # transformers may have replaced its own module between the imports of ours
    for module in (upstream, selfcheck):
        monkeypatch.setattr(module.transformers, "__version__", version)


def test_an_untested_version_is_named_once_and_works():
    done = run(
        "import transformers.models.llama.modeling_llama, sys;"  # transformers reloads itself here
        "sys.modules['transformers'].__version__ = '5.99.1'; import nbl; import nbl.upstream;"
        "from transformers import LlamaConfig, LlamaForCausalLM as L;"
        "nbl.optimize(L(LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=16,"
        " num_hidden_layers=1, num_attention_heads=2)))"
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "nbl was tested" in line]
    assert len(said) == 1 and "5.17 to 5.24" in said[0] and "5.99.1" in said[0]


def test_a_tested_version_says_nothing():
    assert upstream.is_tested(), "the range of upstream.TESTED is not what is tested here"
    assert "nbl was tested" not in run("import nbl").stderr


@pytest.mark.parametrize(
    ("version", "tested"),
    [("5.16.9", False), ("5.17.0", True), ("5.24.3", True), ("5.25.0.dev0", False), ("6.0", False)],
)
def test_the_tested_range(version, tested, monkeypatch):
    fake_version(monkeypatch, version)
    assert upstream.is_tested() == tested


def test_a_version_that_goes_wrong_is_refused(tiny_model, monkeypatch):
    """A cache under a name that nobody knows: every cached step sees its own token only."""
    monkeypatch.setattr(upstream, "_CACHE_NAMES", ("kv_store",))
    selfcheck._differences.cache_clear()
    model = tiny_model()
    assert nbl.optimize(tiny_model()) is not None  # a tested version is not tried
    fake_version(monkeypatch, "5.99.1")
    for call in (nbl.optimize, lambda m: nbl.Runner(m, 1, 16)):
        with pytest.raises(RuntimeError, match=r"5\.99\.1 is not .*5\.17 to 5\.24.*steps with a"):
            call(model)
    assert not any(isinstance(m, nbl.layers.fused.FusedLayer) for m in model.modules())
    selfcheck._differences.cache_clear()


def test_commands_refuse_a_version_that_goes_wrong(monkeypatch, tmp_path):
    """Before they read a text."""
    monkeypatch.setattr(upstream, "_CACHE_NAMES", ("kv_store",))
    fake_version(monkeypatch, "5.99.1")
    monkeypatch.setattr(nbl, "calibrate", None)
    selfcheck._differences.cache_clear()
    arguments = ["compress", "demo", "--layers", "2", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "transformers 5.99.1 is not one" in result.output
    assert list(tmp_path.iterdir()) == []
    selfcheck._differences.cache_clear()


def test_a_version_that_raises_is_refused(monkeypatch):
    monkeypatch.setattr(selfcheck, "fuse", lambda layer: layer.no_such_thing)
    assert "no_such_thing" in selfcheck.differences()[0]


def test_the_self_check_leaves_no_trace():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert selfcheck.differences() == ()
    assert torch.equal(torch.rand(1), expected) and torch.is_grad_enabled()


# --- the cache argument --------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("memory", [None, MEMORY], ids=["", "memory"])
def test_no_deprecated_argument_is_used(memory, linearized, tiny_model, token_batches, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        model = linearized(memory=memory)
        model.generate(ids, max_new_tokens=3)
        model.generate(ids[:1], max_new_tokens=3, assistant_model=tiny_model())
        cache = output_cache(model(ids[:, :6], use_cache=True))
        model(ids[:, 6:], **{CACHE: cache})
        nbl.perplexity(model, [ids])
        measure.kv_bytes_per_token(model)
        nbl.optimize(model).generate(ids, max_new_tokens=3)
        nbl.Runner(model, 2, 32).generate(ids, 3)
        selfcheck.differences()


def test_every_name_of_the_cache_is_taken():
    for name in upstream._CACHE_NAMES:
        arguments = {name: "cache", "other": 1}
        assert upstream.take_cache(arguments) == "cache" and arguments == {"other": 1}
    assert upstream.take_cache({CACHE: None}) is None


@torch.no_grad()
@pytest.mark.parametrize("memory", [None, MEMORY], ids=["", "memory"])
def test_arguments_by_position(memory, linearized, ids):
    """input_ids, attention_mask, position_ids, the cache: in the order of transformers."""
    base = linearized(memory=memory).model
    cache = DynamicCache(config=base.config)
    mask = torch.ones_like(ids)
    first = base(ids[:, :8], mask[:, :8], None, cache).last_hidden_state
    last = base(ids[:, 8:], mask, None, cache).last_hidden_state
    expected = base(ids, mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(torch.cat([first, last], dim=1), expected)


@torch.no_grad()
def test_a_fused_layer_takes_its_arguments_as_a_stock_one(tiny_model, ids):
    """By position too, in the order of transformers; then the stock code runs."""
    stock, model = tiny_model(), nbl.optimize(tiny_model())
    x = stock.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotation = stock.model.rotary_emb(x, positions)
    expected = stock.model.layers[0](x, None, positions, position_embeddings=rotation)
    layer = model.model.layers[0]
    named = {"position_ids": positions, "position_embeddings": rotation}
    for found in (layer(x, None, positions, None, False, rotation), layer(x, **named)):
        torch.testing.assert_close(found, expected)


# --- crop ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("argument", [0, -1, -3, -12, -100, 5, 100])
@pytest.mark.parametrize("layers", [[0, 2], [1, 3], ALL], ids=str)
@pytest.mark.parametrize("memory", [None, MEMORY], ids=["", "memory"])
def test_crop_means_what_it_means_to_stock_entries(
    memory, layers, argument, linearized, tiny_model, ids
):
    model, stock = linearized(layers, memory), tiny_model()
    cache, plain = (output_cache(m(ids, use_cache=True)) for m in (model, stock))
    try:
        plain.crop(argument)
        refusal = None
    except ValueError as error:
        refusal = type(error)
        with pytest.raises(refusal):
            cache.crop(argument)
    else:
        cache.crop(argument)
    length = plain.get_seq_length()
    assert [entry.get_seq_length() for entry in cache.layers] == [length] * 4
    # and what is left is the cache of so many tokens
    more = model(ids[:, :4], **{CACHE: cache}).logits
    whole = torch.cat([ids[:, :length], ids[:, :4]], dim=1)
    torch.testing.assert_close(more, model(whole, use_cache=False).logits[:, length:])


@torch.no_grad()
def test_a_crop_that_was_refused_half_way_is_noticed(linearized, token_batches):
    """The keys are cropped before a memory can say that it does not reach back so far."""
    model = linearized([2], MEMORY)
    ids = token_batches(1, batch_size=1, length=60)[0]
    cache = output_cache(model(ids, use_cache=True))
    with pytest.raises(ValueError, match="31 tokens can be taken back"):
        cache.crop(-40)
    with pytest.raises(ValueError, match=r"entries have seen \[20, 60\] tokens"):
        model(ids[:, :1], **{CACHE: cache})


@torch.no_grad()
@pytest.mark.parametrize("memory", [None, MEMORY], ids=["", "memory"])
def test_crop_of_a_static_cache(memory, linearized, ids):
    """As many versions cannot do that: then nothing changes."""
    model = linearized([0, 2], memory)
    cache = StaticCache(config=model.config, max_cache_len=24)
    model(ids, **{CACHE: cache})
    if hasattr(cache.layers[1], "crop"):
        cache.crop(-4)
        kept = ids[:, :-4]
    else:
        with pytest.raises(NotImplementedError, match="StaticLayer"):
            cache.crop(-4)
        kept = ids
    more = model(ids[:, :2], **{CACHE: cache}).logits
    whole = model(torch.cat([kept, ids[:, :2]], dim=1), use_cache=False).logits
    torch.testing.assert_close(more, whole[:, -2:])


# --- continuous batching -------------------------------------------------------------------------

# Of itself a paged cache takes most of the memory that is free.
SMALL = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)


@pytest.mark.parametrize("optimized", [False, True], ids=["", "optimized"])
def test_continuous_batching(optimized, linearized, ids):
    model = linearized([0, 2])
    if optimized:
        nbl.optimize(model)
    prompts = [ids[0, :5].tolist(), ids[1].tolist()]
    expected = []
    for prompt in prompts:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        expected.append(tokens[0, len(prompt) :].tolist())
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=copy.copy(SMALL)
    ).values()
    assert sorted(r.generated_tokens for r in results) == sorted(expected)


def test_linear_layers_get_no_pages(linearized, tiny_model, ids):
    """Of the paged cache as transformers makes it; a stock model's has pages for all of its
    layers."""
    config = GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0)
    linearized([0, 2]).init_continuous_batching(generation_config=config)
    groups = upstream.paged.group_layers_by_attn_type
    types = ["full_attention", "sliding_attention"] * 2
    for model, kept in (
        (tiny_model(), ALL),
        (linearized([0, 2]), [1, 3]),
        (
            linearized(
                [0, 1], family="qwen3", use_sliding_window=True, layer_types=types, sliding_window=8
            ),
            [2, 3],
        ),
    ):
        found = groups(model.config)
        found = found.values() if isinstance(found, dict) else found[0]
        assert sorted(i for group in found for i in group) == kept


@pytest.mark.parametrize(("layers", "memory"), [([1], MEMORY), (ALL, None)], ids=str)
def test_what_continuous_batching_cannot_hold_is_refused(layers, memory, linearized, ids):
    model = linearized(layers, memory)
    config = GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0)
    with pytest.raises(ValueError, match="a memory" if memory else "every layer"):
        model.generate_batch([ids[0].tolist()], generation_config=config)


# --- others --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [slice(3), slice(1, 4)], ids=["the last", "the first"])
def test_a_model_whose_layers_were_cut_is_not_saved(kept, linearized, tmp_path):
    model = linearized([0, 3])
    model.model.layers, model.config.num_hidden_layers = model.model.layers[kept], 3
    with pytest.raises(ValueError, match="layers were changed after linearizing"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gradients_in_an_optimized_model_are_mentioned_once(tiny_model, ids, monkeypatch):
    monkeypatch.setattr(nbl.layers.fused, "_said", set())
    model = nbl.optimize(tiny_model())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)
        nbl.optimize(tiny_model()).train()(ids)  # training says so itself
    with pytest.warns(UserWarning, match=r"torch\.no_grad\(\)") as said:
        model(ids).logits.sum().backward()
        nbl.optimize(tiny_model())(ids)
    assert len(said) == 1
