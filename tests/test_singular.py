"""One of anything is said in the singular, wherever users read it."""

import dataclasses
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import headinfer
from headinfer.bench.catalogue import CATALOGUE
from headinfer.bench.model_spec import ModelSpec, NamedModel
from headinfer.bench.replay import Replay
from headinfer.cli.load import beyond_positions
from headinfer.cli.prompt import check_length
from headinfer.cli.render import summary_rows
from headinfer.engine.stats import Stats
from headinfer.errors import HeadInferError
from headinfer.estimate.spread import heads_obstacle
from headinfer.evaluate.ruler.fit import most_units
from headinfer.evaluate.ruler.task import Ruler
from headinfer.finding.masked import masked_heads
from headinfer.finding.search import COPY, GATES, REPETITION, SearchSpec
from headinfer.generation.gpus import Gpus
from headinfer.heads.pattern import HeadPattern
from headinfer.integration.history import check_history
from headinfer.integration.shards import refusal
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.resolve import resolve
from headinfer.saved.folder import check_room
from headinfer.schedule.steps import Attend, Fetch, Own
from headinfer.serving.queueing import Line
from shapes import model_shape
from tiny_models import random_tokens, tiny_model

SMALL = ModelSpec(
    layers=1,
    hidden_size=8,
    heads=1,
    kv_heads=1,
    head_dim=8,
    intermediate_size=8,
    vocab_size=8,
)
ONE = model_shape(layers=1, kv_heads=1)
ONE_SIZE = Options(device_memory_each=(2**30,))
TWO_SIZES = Options(device_memory_each=(2**30, 2**30))


def plan(**changes: int) -> str:
    """Return the lines of a plan whose counts are one."""
    made: Plan = resolve(ONE, Options.parse(chunk_tokens=1), device="simulated")
    return "\n".join(dataclasses.replace(made, **changes).lines())


def searched(method: str) -> str:
    """Return how a search with one text of one token was made."""
    return SearchSpec(
        method=method,
        model="tiny",
        dtype="float32",
        texts="prose",
        tokens=1,
        units=1,
        seed=0,
        sink_tokens=1,
        recent_tokens=1,
    ).made


def refused(act: Callable[[], object]) -> str:
    """Return what a refusal says."""
    with pytest.raises(HeadInferError) as refusal:
        act()
    return str(refusal.value)


def masked(streaming: list[list[int]]) -> None:
    """Ask for heads that stream in a model with one layer and one KV head."""
    model = tiny_model("qwen3", num_hidden_layers=1, num_key_value_heads=1)
    with masked_heads(model, streaming, sink_tokens=1, recent_tokens=1):
        pass


def cached(*, tokens: int, rows: int = 1) -> object:
    """Return a cache of a model with one layer, with tokens in it."""
    model = tiny_model("qwen3", num_hidden_layers=1)
    offload = headinfer.attach(model)
    cache = offload.new_cache()
    if tokens:
        model(random_tokens(rows, tokens), **cache.as_keyword())
    return cache


def more_rows() -> None:
    """Pass two rows with a cache that holds one."""
    model = tiny_model("qwen3", num_hidden_layers=1)
    cache = headinfer.attach(model).new_cache()
    model(random_tokens(1, 3), **cache.as_keyword())
    model(random_tokens(2, 1), **cache.as_keyword())


def full_line() -> None:
    """Enter a line in which one runs, and none may wait."""
    line = Line(running=1, waiting=0)
    line.enter(object())
    line.enter(object())


def summary() -> str:
    """Return what is said of a prompt and an answer of one token."""
    stats = Stats(prefill_tokens=1, prefill_s=1.0, decode_tokens=1, decode_s=1.0)
    stats.captures, stats.capture_s = 1, 1.0
    rows = summary_rows(stats, resolve(ONE, Options(), device="cpu"))
    return "\n".join(text for _, text in rows)


def method(name: str) -> str:
    """Return what is said of a method of the benchmark."""
    return CATALOGUE[name].description


SAID: dict[str, tuple[Callable[[], str], str]] = {
    "model's layer": (lambda: SMALL.description, "1 layer, hidden"),
    "model's KV head": (lambda: SMALL.description, "1 KV head of 8"),
    "named model": (
        lambda: NamedModel(name="x", location=None, config={}, planned=ONE).description,
        "1 layer, 1 KV head",
    ),
    "head-wise method": (lambda: method("head-wise-1"), "tiles of 1 KV head x"),
    "stated draft": (lambda: Replay(drafts=1, accepted=(1,), models=()).note, "1 of 1 draft"),
    "replayed draft": (
        lambda: Replay(drafts=1, accepted=(1,), models=("a",)).note,
        "of 1 draft in 1 verification of a",
    ),
    "position": (
        lambda: beyond_positions(
            SimpleNamespace(
                get_text_config=lambda decoder: SimpleNamespace(max_position_embeddings=1)
            ),
            2,
        ),
        "made for 1 position",
    ),
    "answer beyond a position": (
        lambda: str(check_length(1, 1, 1, allow_long=False)),
        "made for 1 position",
    ),
    "prompt beyond a position": (
        lambda: refused(lambda: check_length(2, 1, 1, allow_long=False)),
        "made for 1 position;",
    ),
    "summary's prompt": (summary, "1 token in 1.0"),
    "summary's speed": (summary, "1 token/s"),
    "summary's captures": (summary, "1 decode step in"),
    "planned tile": (plan, "tiles of 1 KV head x"),
    "planned chunk": (plan, "chunks of 1 token;"),
    "planned context": (lambda: plan(context_tokens=1), "KV cache of 1 token:"),
    "planned whole": (lambda: plan(whole_tokens=1), "up to 1 token that cannot"),
    "planned resident": (
        lambda: plan(resident_tokens=1),
        "the oldest 1 token stays in GPU memory",
    ),
    "planned draft": (lambda: plan(draft_tokens=1), "drafts attend 1 token of each"),
    "tile heads": (
        lambda: refused(lambda: resolve(ONE, Options.parse(tile_heads=2), device="cpu")),
        "has 1 KV head;",
    ),
    "device": (
        lambda: refused(lambda: TWO_SIZES.of_devices(1)),
        "lie on 1 device;",
    ),
    "GPU's memory": (
        lambda: refused(lambda: Gpus.of(2, ONE_SIZE)),
        "device_memory has 1 value, but",
    ),
    "fetched tile": (
        lambda: str(Fetch(0, 1, tile_tokens=1, heads=1, groups=1)),
        "in 1 tile of 1 head x 1 token",
    ),
    "attended head": (lambda: str(Attend(1, 1, (Own(),))), "attend by 1 head:"),
    "attended groups": (lambda: str(Attend(1, 2, (Own(),))), "attend by 2 x 1 head:"),
    "scored text": (lambda: searched(REPETITION), "to 1 text from their"),
    "scored copy": (lambda: searched(COPY), "in 1 text, 1 token, prose"),
    "trained gate": (lambda: searched(GATES), "in 1 step, 1 token, prose"),
    "pattern": (
        lambda: refused(lambda: HeadPattern(scores=((1.0,),)).check((2, 2))),
        "has 1 layer x 1 KV head, but",
    ),
    "pattern's layer": (
        lambda: refused(lambda: HeadPattern(scores=((1.0,),)).streaming_heads(0.5, {1})),
        "has 1 layer, and no 1",
    ),
    "pattern's KV head": (
        lambda: refused(lambda: HeadPattern(scores=((1.0,), (1.0, 2.0))).check((2, 1))),
        "has 1 KV head in layer 0",
    ),
    "masked KV head": (lambda: refused(lambda: masked([[1]])), "has 1 KV head, and no 1"),
    "ranks' KV head": (lambda: refusal("x", 1, 2), "has 1 KV head in a layer"),
    "planned ranks' KV head": (
        lambda: str(heads_obstacle(dataclasses.replace(ONE, splits_heads=True), 2)),
        "cannot share 1 KV head evenly",
    ),
    "sample": (
        lambda: "\n".join(Ruler(kinds=("niah_single_1",), samples=1).told()),
        "1 sample a task",
    ),
    "sample's token": (lambda: refused(lambda: most_units(lambda _: 1, 0, 1)), "least 1 token,"),
    "token of a cache": (lambda: repr(cached(tokens=1)), "1 token, 1 layer,"),
    "layer of an empty cache": (lambda: repr(cached(tokens=0)), "no tokens, 1 layer)"),
    "row of a cache": (lambda: refused(more_rows), "holds 1 row and was given 2"),
    "token of a history": (
        lambda: refused(lambda: check_history({}, 1, 0)),
        "the cache holds 1 token, and",
    ),
    "mask of a history": (
        lambda: refused(lambda: check_history({"attention_mask": torch.ones(1, 1)}, 1, 1)),
        "the cache holds 1 token and the call brings 1,",
    ),
    "running request": (lambda: refused(full_line), "1 request running and 0 waiting"),
    "saved token": (
        lambda: refused(lambda: check_room("there", 2**60, 1)),
        "the session of 1 token needs",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_one_of_anything_is_singular(name: str) -> None:
    say, singular = SAID[name]
    said = say()
    assert re.search(rf"{re.escape(singular)}(?!\w)", said)
    assert not re.search(r"(?<![\d.,])1 ([A-Za-z-]+ )?(token|head|layer|row|text|step)s\b", said)
