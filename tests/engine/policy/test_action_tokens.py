"""Action numbers: bins against the published arithmetic, statistics both ways."""

import numpy as np
import pytest

from worldloop.engine.policy.action_tokens import (
    CENTRES,
    EDGES,
    Statistics,
    from_tokens,
    to_tokens,
)
from worldloop.errors import UserError

VOCABULARY = 32000
FIRST_ID = 31744  # vocabulary id of index 0
STEP = 2 / 255

LIBERO = Statistics(
    low=(-0.6, -0.8, -0.9, -0.1, -0.2, -0.3, 0.0),
    high=(0.8, 0.7, 0.95, 0.1, 0.25, 0.3, 1.0),
    mask=(True,) * 6 + (False,),
)


def published_id(action: float) -> int:
    """32000 minus the number of bin edges at or below the clipped action, counted one by one."""
    clipped = min(max(action, -1.0), 1.0)
    return VOCABULARY - sum(1 for i in range(256) if np.linspace(-1, 1, 256)[i] <= clipped)


def published_action(token: int) -> float:
    index = min(max(VOCABULARY - token - 1, 0), 254)
    return -1 + (index + 0.5) * STEP


# ---------------------------------------------------------------- tokens


def test_256_edges_and_255_centres():
    assert len(EDGES) == 256 and len(CENTRES) == 255
    assert (EDGES[0], EDGES[-1]) == (-1, 1)
    np.testing.assert_allclose(np.diff(EDGES), STEP)
    np.testing.assert_allclose(CENTRES, [-1 + (i + 0.5) * STEP for i in range(255)], atol=1e-15)


def test_tokens_are_the_published_ones():
    actions = np.concatenate([np.random.default_rng(0).uniform(-1.2, 1.2, 300), EDGES[::15]])
    expected = [published_id(a) - FIRST_ID for a in actions]
    tokens = to_tokens(actions)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, expected)
    assert tokens.min() == 0 and tokens.max() == 255


def test_actions_are_the_published_ones():
    actions = from_tokens(np.arange(256))
    assert actions.dtype == np.float32
    expected = [published_action(FIRST_ID + i) for i in range(256)]
    np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-7)


def test_every_token_survives_centre_and_back_but_the_first():
    tokens = np.arange(256)
    again = to_tokens(from_tokens(tokens))
    np.testing.assert_array_equal(again[1:], tokens[1:])
    assert again[0] == 1  # indices 0 and 1 share the last centre


@pytest.mark.parametrize(
    ("vocabulary_id", "index", "action"),
    [(31999, 255, -0.996), (31744, 0, 0.996), (31745, 1, 0.996), (31746, 2, 0.988)],
)
def test_ends_of_the_range(vocabulary_id, index, action):
    assert vocabulary_id - FIRST_ID == index
    assert from_tokens(index) == pytest.approx(action, abs=5e-4)


def test_only_the_upper_bound_itself_has_index_0():
    np.testing.assert_array_equal(
        to_tokens([1, 1.5, 0.9999, -1, -1.5, 0]), [0, 0, 1, 255, 255, 128]
    )


def test_an_edge_belongs_to_the_bin_above_it():
    edge = EDGES[100]
    above, below = np.nextafter(edge, 2), np.nextafter(edge, -2)
    assert to_tokens(edge) == to_tokens(above) == to_tokens(below) - 1


def test_quantisation_costs_at_most_half_a_bin():
    actions = np.linspace(-1, 1, 4001)
    assert np.abs(from_tokens(to_tokens(actions)) - actions).max() <= STEP / 2 + 1e-7


def test_shape_is_kept():
    actions = np.random.default_rng(1).uniform(-1, 1, (2, 8, 7))
    assert to_tokens(actions).shape == from_tokens(to_tokens(actions)).shape == (2, 8, 7)
    assert from_tokens(np.zeros((0, 7), np.int32)).shape == (0, 7)


@pytest.mark.parametrize("tokens", [[256], [-1], [1.0], [True], [FIRST_ID], ["1"]])
def test_what_is_no_token_is_refused(tokens):
    with pytest.raises(UserError, match=r"whole numbers in 0\.\.255"):
        from_tokens(tokens)


def test_nan_is_no_action():
    with pytest.raises(UserError, match="NaN"):
        to_tokens([0.0, float("nan")])


# ---------------------------------------------------------------- statistics


def test_unnormalise_where_the_mask_holds():
    x = np.random.default_rng(2).uniform(-1, 1, (3, 8, 7))
    got = LIBERO.unnormalise(x)
    assert got.dtype == np.float32 and got.shape == x.shape
    for i in range(6):
        low, high = LIBERO.low[i], LIBERO.high[i]
        expected = 0.5 * (x[..., i] + 1) * (high - low + 1e-8) + low
        np.testing.assert_allclose(got[..., i], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got[..., 6], x[..., 6].astype(np.float32))


def test_bounds_become_minus_one_and_one():
    low, high = np.asarray(LIBERO.low), np.asarray(LIBERO.high)
    ends = LIBERO.normalise(np.stack([low, high, (low + high) / 2]))
    expected = np.repeat([[-1.0], [1.0], [0.0]], 6, 1)
    np.testing.assert_allclose(ends[:, :6], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ends[:, 6], [0, 1, 0.5])


def test_normalise_is_the_inverse_and_clips():
    x = np.random.default_rng(3).uniform(-1, 1, (50, 7))
    np.testing.assert_allclose(LIBERO.normalise(LIBERO.unnormalise(x)), x, rtol=0, atol=1e-6)
    far = LIBERO.normalise(np.full(7, 5.0))
    np.testing.assert_array_equal(far, [1, 1, 1, 1, 1, 1, 5])


def test_a_dimension_that_never_moved_stays_finite():
    still = Statistics((0.3,), (0.3,), (True,))
    np.testing.assert_allclose(still.unnormalise([[-1.0], [1.0]]), 0.3, atol=1e-7)
    assert np.isfinite(still.normalise([[0.3], [0.4]])).all()


@pytest.mark.parametrize("values", [np.zeros((2, 6)), np.zeros(14), np.float64(0.0)])
def test_another_robots_numbers_are_refused(values):
    for call in (LIBERO.normalise, LIBERO.unnormalise):
        with pytest.raises(UserError, match=r"7 dimensions; these are the statistics of another"):
            call(values)


def test_nan_is_refused_both_ways():
    values = np.zeros((2, 7))
    values[1, 6] = np.nan
    for call in (LIBERO.normalise, LIBERO.unnormalise):
        with pytest.raises(UserError, match="NaN"):
            call(values)


def test_an_entry_of_the_published_file():
    entry = {"q01": [-1, 0.5], "q99": [1, 2.5], "min": [-9, -9], "max": [9, 8], "mean": [0, 0]}
    plain = Statistics.from_dict(entry)
    assert plain == Statistics((-1, 0.5), (1, 2.5), (True, True)) and plain.dim == 2
    aloha = Statistics.from_dict({**entry, "mask": [True, False]}, low="min", high="max")
    assert aloha == Statistics((-9, -9), (9, 8), (True, False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q01": None}, "'q01' is None; expected a list of numbers"),
        ({"q99": 1.0}, "'q99' is 1.0"),
        ({"q99": [1.0, float("nan")]}, "'q99' is .*nan"),
        ({"q01": ["a", "b"]}, "'q01' is "),
        ({"q01": [[0.0], [0.0]]}, "'q01' is "),
        ({"q99": [1.0]}, "2 low, 1 high and 2 mask"),
        ({"mask": [True]}, "2 low, 2 high and 1 mask"),
    ],
)
def test_a_damaged_entry_is_refused(change, message):
    entry = {"q01": [0.0, 0.0], "q99": [1.0, 1.0], **change}
    with pytest.raises(UserError, match=message) as caught:
        Statistics.from_dict(entry)
    assert "\n" not in str(caught.value)
