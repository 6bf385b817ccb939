"""The CUDA path against stock attention on the same GPU; run with `pytest -m gpu`."""

import threading
import weakref

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import headinfer
from captured import NEW_CACHE, NEW_KIND, few, generated, launched, stock_generated
from headinfer.attend.table import Kernels
from headinfer.attend.work import Work
from headinfer.errors import CacheStateError
from headinfer.finding.masked import masked_heads
from headinfer.integration import attention
from headinfer.integration.model_shape import model_shape
from headinfer.plan.shape import LayerKind
from headinfer.plan.streaming import kv_heads_of, random_pattern
from tiny_models import ARCHITECTURES, random_tokens, tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_equal_stock_in_float32(name: str, overlap: bool) -> None:
    model = tiny_model(name).to("cuda")
    tokens = random_tokens(2, 300).cuda()
    mask = torch.ones_like(tokens)
    mask[0, :41] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 80,  # past a page of the decode tail
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "pad_token_id": 0,
    }
    stock = model.generate(tokens, past_key_values=DynamicCache(config=model.config), **options)
    for tile_heads, tile_tokens, chunk_tokens in ((1, 50, 128), ("all", 4096, 77)):
        with headinfer.attach(
            model,
            tile_heads=tile_heads,
            tile_tokens=tile_tokens,
            chunk_tokens=chunk_tokens,
            overlap=overlap,
            resident_tokens=0,
        ) as offload:
            ours = model.generate(tokens, past_key_values=offload.new_cache(), **options)
            assert offload.stats.bytes_to_device > 0 or not offload.plan.shape.full_layers
        wanted = torch.stack(stock.logits)
        error = (torch.stack(ours.logits) - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-4
        assert torch.equal(ours.sequences, stock.sequences)


@pytest.mark.parametrize("resident_tokens", [0, 100, "all"])
@pytest.mark.parametrize("host_attention", ["off", 0.5, 1.0])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "gpt-oss"])
def test_resident_and_host_attended_tokens_equal_stock(
    name: str, host_attention: str | float, resident_tokens: str | int
) -> None:
    model = tiny_model(name).to("cuda")
    tokens = random_tokens(1, 300).cuda()
    options = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(tokens, past_key_values=DynamicCache(config=model.config), **options)
    with headinfer.attach(
        model,
        tile_heads=1,
        tile_tokens=50,
        chunk_tokens=128,
        resident_tokens=resident_tokens,
        host_attention=host_attention,
    ) as offload:
        ours = model.generate(tokens, past_key_values=offload.new_cache(), **options)
        on_host = offload.stats.bytes_attended_on_host
    assert torch.equal(ours, stock)
    assert (on_host > 0) == (host_attention != "off" and resident_tokens != "all")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen3"])
def test_half_precision_is_as_near_to_float64_as_stock(name: str, dtype: torch.dtype) -> None:
    tokens = random_tokens(1, 300).cuda()
    model = tiny_model(name).to("cuda", dtype)
    stock = model(tokens).logits.double()
    with headinfer.attach(model, tile_heads=1, tile_tokens=64, chunk_tokens=96) as offload:
        ours = model(tokens, past_key_values=offload.new_cache()).logits.double()
    exact = model.to(torch.float64)(tokens).logits
    assert (ours - exact).norm() <= 1.5 * (stock - exact).norm()


def test_host_memory_is_pinned_and_freed() -> None:
    model = tiny_model("llama3").to("cuda")
    with headinfer.attach(model) as offload:
        cache = offload.new_cache(max_tokens=1000)
        model(random_tokens(1, 400).cuda(), past_key_values=cache, logits_to_keep=1)
        model(random_tokens(1, 1).cuda(), past_key_values=cache)  # which first sends those home
        planned = cache.state.engine.plan.kv_host_bytes(1000)
        assert cache.state.engine.host_kv_bytes == planned
        ledger = cache.state.engine._ledgers[0]
        assert next(ledger.host_tiles(0, 10)).kv.keys.is_pinned()
        cache.close()


def test_an_error_of_the_hosts_attention_reaches_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing:
        name = "failing"

        def serves(self, _work: Work) -> bool:
            return True

        def attend(self, _work: Work) -> None:
            raise ArithmeticError("the host cannot count")

    model = tiny_model("llama3").to("cuda")
    tokens = random_tokens(1, 300).cuda()
    with headinfer.attach(
        model, chunk_tokens=128, resident_tokens=0, host_attention=1.0
    ) as offload:
        cache = offload.new_cache()
        wanted = model(tokens, past_key_values=cache, logits_to_keep=1).logits
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_host_kernels", lambda *_: Kernels([Failing()]))
            with pytest.raises(ArithmeticError, match="cannot count"):
                model(tokens[:, :1], past_key_values=cache)
        with pytest.raises(CacheStateError, match="interrupted"):
            model(tokens[:, :1], past_key_values=cache)
        cache.reset()
        again = model(tokens, past_key_values=cache, logits_to_keep=1).logits
        torch.testing.assert_close(again, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama3", "mistral-sliding", "gemma2", "gemma3", "gpt-oss"])
def test_captured_steps_have_the_bits_of_launched_ones(
    name: str, batch: int, dtype: torch.dtype
) -> None:
    model = tiny_model(name, head_dim=32).to("cuda", dtype)
    outputs = []
    for capture in (False, True):
        # What is fused rounds less often.
        options = {"resident_tokens": "all", "capture": capture, "fuse": "off"}
        with headinfer.attach(model, **options) as offload:
            for seed in (1, 2):
                tokens = random_tokens(batch, 70, seed=seed).cuda()
                outputs.append(generated(model, tokens, offload.new_cache(), max_new_tokens=200))
            stats = offload.stats
    assert stats.captures == 2
    assert launched(stats) == few(70, 199) + few(70, 199, begin=NEW_CACHE)
    for eager, captured in zip(outputs[:2], outputs[2:], strict=True):
        assert torch.equal(eager.sequences, captured.sequences)
        assert torch.equal(torch.stack(eager.logits), torch.stack(captured.logits))


STREAMING: dict[str, object] = {
    "sparsity": 0.5,
    "head_pattern": "random:3",
    "sink_tokens": 5,
    "recent_tokens": 24,
}


def streaming_heads(model: PreTrainedModel) -> tuple[tuple[int, ...], ...]:
    shape = model_shape(model)
    pattern = random_pattern("random:3", kv_heads_of(shape))
    assert pattern is not None
    full = [at for at, layer in enumerate(shape.layers) if layer.kind is LayerKind.FULL]
    return pattern.streaming_heads(0.5, full)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize(
    "placement",
    [
        {"resident_tokens": "all"},
        {"resident_tokens": 0, "tile_tokens": 50, "tile_heads": 1},
        {"resident_tokens": 60, "host_attention": 0.5},
    ],
    ids=["resident", "streamed", "host"],
)
@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen3"])
def test_streaming_heads_equal_those_of_a_masked_model(
    name: str, placement: dict[str, object], capture: bool
) -> None:
    model, tokens = tiny_model(name).to("cuda"), random_tokens(1, 170).cuda()
    with masked_heads(model, streaming_heads(model), sink_tokens=5, recent_tokens=24):
        wanted = stock_generated(model, tokens, max_new_tokens=90)
    with headinfer.attach(
        model, **placement, **STREAMING, chunk_tokens=48, capture=capture
    ) as offload:
        ours = generated(model, tokens, offload.new_cache(), max_new_tokens=90)
    assert torch.equal(ours.sequences, wanted.sequences)
    error = (torch.stack(ours.logits) - torch.stack(wanted.logits)).abs().max()
    assert error / torch.stack(wanted.logits).abs().max() < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_captured_steps_with_streaming_heads_have_the_bits_of_launched_ones(batch: int) -> None:
    model = tiny_model("llama3", head_dim=32).to("cuda", torch.bfloat16)
    tokens, outputs = random_tokens(batch, 70).cuda(), []
    for capture in (False, True):
        options = {"resident_tokens": "all", "capture": capture, "fuse": "off", **STREAMING}
        with headinfer.attach(model, **options) as offload:
            # The window begins anew in the middle.
            outputs.append(generated(model, tokens, offload.new_cache(), max_new_tokens=400))
    assert (offload.stats.captures, launched(offload.stats)) == (1, few(70, 399))
    eager, captured = outputs
    assert torch.equal(eager.sequences, captured.sequences)
    assert torch.equal(torch.stack(eager.logits), torch.stack(captured.logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mistral-sliding", "gemma2", "gemma3", "llama3"])
def test_windows_without_masks_are_as_near_to_float64_as_stock(
    name: str, dtype: torch.dtype
) -> None:
    model = tiny_model(name, head_dim=32).to("cuda")
    tokens = random_tokens(1, 300).cuda()
    heads = streaming_heads(model) if name == "llama3" else [()] * len(model_shape(model).layers)
    outputs = {}
    for at in (torch.float64, dtype):
        model = model.to(at)
        with masked_heads(model, heads, sink_tokens=5, recent_tokens=24):
            outputs[at] = model(tokens).logits.double()
    options = STREAMING if name == "llama3" else {}
    with headinfer.attach(model, chunk_tokens=128, **options) as offload:
        ours = model(tokens, past_key_values=offload.new_cache(), use_cache=True).logits.double()
    exact = outputs[torch.float64]
    assert (ours - exact).norm() < 1.5 * (outputs[dtype] - exact).norm()


@pytest.mark.parametrize(
    "placement",
    [{"resident_tokens": 0, "tile_tokens": 50}, {"resident_tokens": 60, "host_attention": 0.5}],
    ids=["streamed", "host"],
)
@pytest.mark.parametrize("name", ["llama3", "gemma2", "gemma3"])
def test_steps_in_pieces_have_the_bits_of_launched_ones(
    name: str, placement: dict[str, object]
) -> None:
    model, tokens = tiny_model(name).to("cuda"), random_tokens(2, 170).cuda()
    outputs = []
    for capture in (False, True):
        with headinfer.attach(model, **placement, capture=capture) as offload:
            outputs.append(generated(model, tokens, offload.new_cache(), max_new_tokens=90))
    assert (offload.stats.captures, launched(offload.stats)) == (1, few(170, 89))
    eager, captured = outputs
    assert torch.equal(eager.sequences, captured.sequences)
    assert torch.equal(torch.stack(eager.logits), torch.stack(captured.logits))


class Reading(torch.nn.Module):
    """A module that reads back what it is given, which no capture allows."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert hidden.sum().item() is not None
        return self.inner(hidden)


def test_a_failed_capture_leaves_all_else_usable(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama3").to("cuda")
    head = model.lm_head
    with headinfer.attach(model, resident_tokens="all") as offload:
        for batch in (1, 2, 3):  # each another kind of call; the second may not be captured
            model.lm_head = Reading(head) if batch == 2 else head
            tokens = random_tokens(batch, 40).cuda()
            before = offload.stats.captured_steps
            ours = generated(model, tokens, offload.new_cache())
            assert offload.stats.captured_steps - before == (0 if batch == 2 else 19 - NEW_KIND)
            stock = generated(model, tokens, DynamicCache(config=model.config))
            assert torch.equal(ours.sequences, stock.sequences)
    assert sum("kernel by kernel" in message for message in caplog.messages) == 1


def test_another_thread_computes_while_steps_are_captured() -> None:
    model, other = tiny_model("llama3").to("cuda"), tiny_model("gemma3").to("cuda")
    tokens = random_tokens(1, 40).cuda()
    options = {"do_sample": False, "max_new_tokens": 40}
    wanted = [each.generate(tokens, **options) for each in (model, other)]
    results, done = [], threading.Event()

    def compute() -> None:
        while not done.is_set():
            results.append(other.generate(tokens, **options))

    thread = threading.Thread(target=compute)
    with headinfer.attach(model, resident_tokens="all") as offload:
        thread.start()
        try:
            for _ in range(5):
                ours = generated(model, tokens, offload.new_cache(), max_new_tokens=40)
                assert torch.equal(ours.sequences, wanted[0])
        finally:
            done.set()
            thread.join()
        assert launched(offload.stats) == few(40, 39) + 4 * few(40, 39, begin=NEW_CACHE)
    assert results
    assert all(torch.equal(result, wanted[1]) for result in results)


def test_captures_free_their_memory_with_their_cache() -> None:
    model, tokens = tiny_model("llama3").to("cuda"), random_tokens(3, 70).cuda()
    with headinfer.attach(model, resident_tokens="all") as offload:
        held = []
        for _ in range(4):
            cache = offload.new_cache()
            generated(model, tokens, cache)
            cache.close()
            held.append(torch.cuda.memory_allocated())
        assert held[1:] == held[:1] * 3


def test_weights_that_are_replaced_are_not_freed_under_a_capture() -> None:
    model = tiny_model("llama3").to("cuda")
    with headinfer.attach(model, resident_tokens="all") as offload:
        cache = offload.new_cache()
        model(random_tokens(1, 40).cuda(), past_key_values=cache)
        token = torch.full((1, 1), 5, device="cuda")
        for _ in range(5):
            model(token, past_key_values=cache)
        memory = weakref.ref(model.lm_head.weight.untyped_storage())
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2, False)
        model(token, past_key_values=cache)
        assert memory() is not None
        model(token.expand(1, 3), past_key_values=cache)
        model(token, past_key_values=cache)
        assert memory() is None
        assert offload.stats.captured_steps == 5 - NEW_KIND + 1
