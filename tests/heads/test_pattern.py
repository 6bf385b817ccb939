"""Which heads of a pattern stream."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headinfer.errors import OptionError
from headinfer.heads.pattern import HeadPattern

SCORES = ((0.9, 0.1), (0.2, 0.8), (0.5, 0.3))


def streaming(sparsity, layers=(0, 1, 2), scores=SCORES):
    return HeadPattern(scores=scores).streaming_heads(sparsity, layers)


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0, ((), (), ())),
        (1 / 6, ((1,), (), ())),
        (0.5, ((1,), (0,), (1,))),
        (5 / 6, ((1,), (0, 1), (0, 1))),
        (1, ((0, 1), (0, 1), (0, 1))),
    ],
)
def test_the_lowest_scores_stream(sparsity, expected):
    assert streaming(sparsity) == expected


def test_layers_not_given_neither_stream_nor_count():
    assert streaming(0.5, layers=[1, 2]) == ((), (0,), (1,))
    assert streaming(1, layers=[2]) == ((), (), (0, 1))


@pytest.mark.parametrize(
    ("sparsity", "count"),
    [(0.05, 0), (0.051, 1), (0.15, 1), (0.25, 2), (0.3, 3), (0.35, 3), (0.449, 4), (0.95, 9)],
)
def test_half_a_head_is_rounded_downwards(sparsity, count):
    chosen = streaming(sparsity, layers=[0], scores=(tuple(range(10)),))
    assert chosen == (tuple(range(count)),)


def test_heads_of_equal_scores_are_shared_by_layers():
    scores = ((1.0, 1.0, 0.0), (1.0, 1.0, 1.0))
    assert streaming(0.5, layers={1, 0}, scores=scores) == ((0, 2), (0,))
    assert streaming(4 / 6, layers={0, 1}, scores=scores) == ((0, 1, 2), (0,))


@given(
    st.integers(1, 4).flatmap(
        lambda heads: st.lists(
            st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * heads), min_size=1, max_size=5
        )
    ),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_more_sparsity_only_adds_heads(rows, one, other):
    few, many = sorted((one, other))
    less, more = (streaming(share, range(len(rows)), tuple(rows)) for share in (few, many))
    assert all(set(before) <= set(after) for before, after in zip(less, more, strict=True))
    assert abs(sum(map(len, more)) - many * sum(map(len, rows))) <= 0.5 + 1e-9


@pytest.mark.parametrize("sparsity", [-0.1, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(sparsity):
    with pytest.raises(OptionError, match="sparsity must be from 0 to 1"):
        streaming(sparsity)


def test_a_layer_out_of_range_is_refused():
    with pytest.raises(OptionError, match="has 3 layers, and no 3"):
        streaming(0.5, layers=[3])


def test_a_pattern_of_the_models_shape_fits():
    HeadPattern(scores=((0.1, 0.2), (), (0.3,))).check([2, 0, 1])


@pytest.mark.parametrize(
    ("kv_heads", "said"),
    [
        ([2, 2], "has 3 layers x 2 KV heads, but the model has 2 layers x 2 KV heads"),
        ([8, 8, 8], "has 3 layers x 2 KV heads, but the model has 3 layers x 8 KV heads"),
        ([2, 0, 2], "has 3 layers x 2 KV heads, but the model has 3 layers x 0 to 2 KV heads"),
    ],
)
def test_a_pattern_of_another_shape_is_refused_with_both(kv_heads, said):
    with pytest.raises(OptionError, match=f"of 'mine' {said}"):
        HeadPattern(scores=SCORES, model="mine").check(kv_heads)


def test_layers_in_another_order_are_refused():
    with pytest.raises(OptionError, match="has 2 KV heads in layer 0, but the model has 1 there"):
        HeadPattern(scores=((0.1, 0.2), (0.3,))).check([1, 2])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scores": ()}, "has none"),
        ({"scores": ((), ())}, "has none"),
        ({"scores": ((0.0, float("nan")),)}, "KV head 1 in layer 0 is nan"),
        ({"scores": SCORES, "sink_tokens": -1}, "sink_tokens .*must be at least 0, not -1"),
        ({"scores": SCORES, "recent_tokens": 0}, "recent_tokens .*must be at least 1, not 0"),
    ],
)
def test_what_is_no_pattern_is_refused(values, said):
    with pytest.raises(OptionError, match=said):
        HeadPattern(**values)
