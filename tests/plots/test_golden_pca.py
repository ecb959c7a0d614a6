"""Images of tokens against the tool that was published with SRA, from the same randomness.

Files, import, noise, features and components are met as somebody uses them. The published tool has
two ways for a network that counts time from noise to data: `flipped` gives it 1 - t, as an import
does that knows the direction; `legacy` gives it t, as an import does that takes the direction for
SRA's. A component is one up to its sign, and a colour c one with 1 - c.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from vectors import Vectors, assert_within, channels_last, golden_file

import ig_jax
from ig_jax.codecs.sd_vae import SCALE
from ig_jax.plots.token_pca import normalised

pytestmark = pytest.mark.golden

# Prefix of the arrays -> suffix of the weights, direction of time of the import, norm.
CASES = {
    "": ("", "data_to_noise", "layer_norm"),
    "baseline_legacy_": ("_baseline", "data_to_noise", "min_max"),
    "baseline_flipped_": ("_baseline", "noise_to_data", "min_max"),
}
ROUNDINGS = 10  # times what float32 rounding moves the reference itself


@pytest.fixture(scope="module", params=CASES, ids=lambda prefix: prefix.strip("_") or "sra")
def golden(golden_dir, request):
    """Our tokens and their components for one way of the published tool."""
    v = Vectors(golden_dir, "pca")
    suffix, direction, norm = CASES[request.param]
    pipeline = ig_jax.load(
        golden_file(golden_dir, f"pca{suffix}.safetensors"),
        family="sit",
        num_heads=v.config["model"]["num_heads"],
        num_classes=v.config["model"]["num_classes"],
        time_direction=direction,
    )
    mean, std = np.split(v["moments"], 2, axis=-3)
    depths, label = v.config["layers"], v.config["label"]
    tokens = []
    for t, draw, noise in zip(v.config["times"], v["posterior_eps"], v["noise"], strict=True):
        z = channels_last((mean + std * draw) * SCALE)
        labels = [label] * len(z)
        found = pipeline.features(z, t, depths, labels, noise=channels_last(noise))
        tokens.append(np.concatenate([found[depth] for depth in depths]))
    tokens = np.stack(tokens)
    return SimpleNamespace(
        vectors=v,
        prefix=request.param,
        features=normalised(tokens, norm),
        pca=ig_jax.token_pca(tokens, norm=norm),
    )


def assert_close(golden, name: str, ours: np.ndarray) -> None:
    v, name = golden.vectors, golden.prefix + name
    assert_within(name, ours, v[name], ROUNDINGS * v.tolerances[name]["max_abs_diff"])


@pytest.fixture(scope="module")
def signs(golden):
    """1 or -1 for each component [time, layer, 3]: whether the published one points as ours."""
    published = golden.vectors[f"{golden.prefix}components"]
    return np.sign(np.sum(golden.pca.components * published, axis=-1))


def test_normalised_tokens_are_the_published_ones(golden):
    assert_close(golden, "features", golden.features)


def test_components_and_their_variances_are_the_published_ones(golden, signs):
    assert_close(golden, "components", golden.pca.components * signs[..., None])
    assert_close(golden, "explained_variance", golden.pca.explained_variance)


def test_projections_are_the_published_ones(golden, signs):
    assert_close(golden, "projections", golden.pca.projections * signs[..., None, :])


def test_colours_are_the_published_ones(golden, signs):
    turned = (signs < 0)[..., None, None, :]
    rgb = np.where(turned, 1 - golden.pca.rgb, golden.pca.rgb)
    assert_close(golden, "rgb", rgb)


def test_directions_of_time_are_different_images(golden_dir):
    """Otherwise nothing above would tell them apart."""
    v = Vectors(golden_dir, "pca")
    gap = np.abs(v["baseline_legacy_features"] - v["baseline_flipped_features"]).max()
    assert gap > 100 * ROUNDINGS * v.tolerances["baseline_flipped_features"]["max_abs_diff"]
