"""The guard against spikes: which updates it skips, what it leaves alone, when it gives in."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lively
import numpy as np
import optax
import pytest
from adamw import SETTINGS as ADAMW

from ig_jax import optim
from ig_jax.optim import spikes

MUON = optim.MuonSettings(
    **dataclasses.asdict(ADAMW), momentum=0.95, ns_steps=5, ns_dtype="float32"
)
OPTIMIZERS = {"adamw": optim.adamw(ADAMW, 100), "muon": optim.muon(MUON, 100)}
WINDOW, LEAST = 9, 4
START = {
    "pos_embed": jnp.ones(2),
    "bias": jnp.array([1.0, -2.0, 3.0]),
    "fc": {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)},
}
guarded_ones = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


@functools.cache
def guard(optimizer=OPTIMIZERS["adamw"], factor=3.0, window=WINDOW, least=LEAST):
    return optim.skip_spikes(optimizer, factor, window=window, least=least)


@functools.cache
def compiled(optimizer):
    """One step (params, state, grads) -> (params, state), the same roundings whatever is fused."""

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return lively.compile_quickly(step)


def gradient(size: float, seed: int = 0):
    """Of the given norm over the trained leaves; that of the fixed one is enormous."""
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda p: rng.standard_normal(p.shape), START)
    norm = np.sqrt(np.sum(grads["bias"] ** 2) + np.sum(grads["fc"]["kernel"] ** 2))
    grads = jax.tree.map(lambda g: jnp.asarray(g * size / norm, jnp.float32), grads)
    return {**grads, "pos_embed": jnp.array([1e6, -1e6])}


def gradients(sizes) -> list:
    return [gradient(size, seed) for seed, size in enumerate(sizes)]


def trained(optimizer, grads, params=START, state=None):
    """(params, state) after these gradients."""
    state = optimizer.init(params) if state is None else state
    for g in grads:
        params, state = compiled(optimizer)(params, state, g)
    return params, state


def skipped_at(sizes, **changes) -> list[int]:
    """Indices of the gradients whose update the guard counts as skipped."""
    params, state = START, guard(**changes).init(START)
    counts = [0]
    for g in gradients(sizes):
        params, state = compiled(guard(**changes))(params, state, g)
        counts.append(int(state.skipped))
    return np.flatnonzero(np.diff(counts)).tolist()


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


USUAL = [1.0, 1.3, 0.8, 1.1, 0.9, 1.2]


@guarded_ones
def test_without_a_spike_every_bit_is_that_of_the_optimizer_alone(optimizer):
    """Norms up to just below the factor; more of them than the window holds."""
    grads = gradients([*USUAL, 2.9, *USUAL, *USUAL])
    params, state = trained(guard(optimizer), grads)
    assert_same_bits((params, state.inner), trained(optimizer, grads))
    assert int(state.skipped) == 0


@guarded_ones
@pytest.mark.parametrize("size", [3.5, 1e6, np.inf, np.nan])
def test_a_skipped_update_leaves_parameters_and_the_optimizers_state_bit_for_bit(optimizer, size):
    params, state = trained(guard(optimizer), gradients(USUAL))
    later_params, later = trained(guard(optimizer), gradients([size]), params, state)
    assert_same_bits((later_params, later.inner), (params, state.inner))
    assert int(later.skipped) == int(state.skipped) + 1 == 1
    moved, _ = trained(optimizer, gradients([size]), params, state.inner)
    assert not np.array_equal(moved["bias"], params["bias"])


def test_one_entry_that_is_not_a_number_skips_the_update_and_leaves_the_window():
    params, state = trained(guard(), gradients(USUAL))
    grads = gradient(1.0)
    grads["bias"] = grads["bias"].at[1].set(jnp.nan)
    later_params, later = trained(guard(), [grads], params, state)
    assert_same_bits(later_params, params)
    assert_same_bits((later.norms, later.seen), (state.norms, state.seen))
    assert int(later.skipped) == 1


def test_fixed_leaves_count_in_no_norm():
    _, state = trained(guard(), gradients([1.0, 1.0]))
    np.testing.assert_allclose(state.norms[:2], 1.0, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 4, 5, WINDOW, WINDOW + 3, 3 * WINDOW + 1])
def test_the_median_is_that_of_the_last_norms(count):
    norms = np.random.default_rng(1).uniform(0.5, 1.0, count)
    _, state = trained(guard(), gradients(norms))
    median = spikes._median(state.norms, state.seen)
    np.testing.assert_allclose(median, np.median(norms[-WINDOW:]), rtol=1e-6)


def test_the_first_norms_are_never_a_spike_and_the_next_may_be():
    wild = [1.0, 100.0, 1e4, 1e6]
    assert skipped_at([*wild, 1e8]) == [LEAST]
    assert skipped_at([*wild, 1e8], least=5) == []


def test_the_first_gradients_are_skipped_where_they_are_not_finite_and_do_not_count_as_seen():
    assert skipped_at([np.nan, 1.0, np.inf, 1.0, 1.0, 1.0, 10.0]) == [0, 2, 6]
    assert skipped_at([np.nan, 1.0, 1.0, 1.0, 10.0, 1.0]) == [0]


def test_the_bound_is_the_factor_times_the_median():
    assert skipped_at([1.0] * 5 + [2.99]) == []
    assert skipped_at([1.0] * 5 + [3.01]) == [5]
    assert skipped_at([1.0] * 5 + [3.01], factor=4.0) == []


def test_an_outlier_does_not_move_the_median():
    """A mean would be 1e6 / 9 afterwards, and let the second one pass."""
    assert skipped_at([*USUAL, 1e6, 1.0, 10.0, 1.0]) == [6, 8]


def test_a_lasting_change_of_scale_is_accepted_after_half_a_window():
    sizes = [1.0] * WINDOW + [50.0] * (WINDOW + 2)
    assert skipped_at(sizes) == list(range(WINDOW, WINDOW + (WINDOW + 1) // 2))


@guarded_ones
def test_a_scan_carries_the_state_and_skips_what_single_steps_skip(optimizer):
    grads = gradients([*USUAL, 50.0, np.nan, *USUAL])
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)

    def step(carry, g):
        return compiled(guard(optimizer)).__wrapped__(*carry, g), None

    start = (START, guard(optimizer).init(START))
    params, state = lively.compile_quickly(functools.partial(jax.lax.scan, step))(start, stacked)[0]
    lively.close(params, trained(guard(optimizer), grads)[0])
    assert int(state.skipped) == 2
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), start[1]
    )


def test_the_state_is_a_ring_of_float32_and_two_counters():
    state = guard().init(START)
    assert (state.norms.dtype, state.norms.shape) == (jnp.float32, (WINDOW,))
    assert state.seen.dtype == state.skipped.dtype == jnp.int32
    assert state.seen.shape == state.skipped.shape == ()


def test_a_fresh_state_and_median_hold_nothing_that_a_check_for_nan_would_stop_at():
    with jax.debug_nans(True):
        _, state = trained(guard(), gradients(USUAL))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state))


@guarded_ones
def test_a_training_with_spikes_ends_as_if_they_had_not_been(optimizer):
    """Gradients of |p|^2 / 2 with noise on their size, and four spikes among them."""
    noise = np.random.default_rng(2).uniform(0.8, 1.2, 40)
    spiky = np.insert(noise, [12, 25, 25, 31], [1e3, np.nan, 1e5, np.inf])

    def run(optimizer, sizes):
        params, state = START, optimizer.init(START)
        for size in sizes:
            grads = jax.tree.map(lambda p, size=size: jnp.float32(size) * p, params)
            params, state = compiled(optimizer)(params, state, grads)
        return params, state

    params, state = run(guard(optimizer), spiky)
    assert_same_bits((params, state.inner), run(optimizer, noise))
    assert int(state.skipped) == 4
    norm = [float(optim.gradient_norm(p)) for p in (params, START)]
    assert norm[0] < 0.5 * norm[1]
    finite = spiky[np.isfinite(spiky)]
    assert not np.allclose(run(optimizer, finite)[0]["bias"], params["bias"], rtol=1e-3)


@pytest.mark.parametrize(
    "changes", [{"factor": 1.0}, {"factor": 0.0}, {"factor": float("nan")}, {"least": 0}]
)
def test_a_setting_out_of_range_is_refused_by_name(changes):
    ((field, value),) = changes.items()
    with pytest.raises(ValueError, match=f"{field} = {value}: must "):
        guard(**changes)


def test_a_window_shorter_than_what_must_be_seen_is_refused():
    with pytest.raises(ValueError, match=r"least = 4: must lie in 1..window = 3"):
        guard(window=3)


def test_both_optimizers_are_what_they_are_called():
    """Else the tests above would guard one of them twice."""
    for name, optimizer in OPTIMIZERS.items():
        assert ("MuonState" in str(jax.tree.structure(optimizer.init(START)))) == (name == "muon")
