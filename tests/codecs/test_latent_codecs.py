"""What codecs make of latents in the published layouts, and what they refuse."""

import json

import jax
import jax.numpy as jnp
import narrow
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file
from torch_pickles import Storage, Tensor, tensor
from torch_pickles import write as write_torch

from configs import imagenet
from ig_jax import experiment
from ig_jax.codecs.as_stored import AsStored
from ig_jax.codecs.autoencoders import SdVae, VaVae
from ig_jax.codecs.identity import Identity
from ig_jax.config import run_config
from ig_jax.errors import UserError
from ig_jax.io.torch import writer as torch_writer


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """The folder of REPA, SRA and IG: 24 images, 2 x 2 x (4 + 4), two classes."""
    root = tmp_path_factory.mktemp("moments")
    rng, labels = np.random.default_rng(0), []
    for i in range(24):
        file = f"{i // 10:05d}/img-mean-std-{i:08d}.npy"
        (root / "vae-sd" / file).parent.mkdir(parents=True, exist_ok=True)
        array = rng.standard_normal((8, 2, 2), np.float32)
        array[4:] = np.abs(array[4:])
        np.save(root / "vae-sd" / file, array)
        labels.append([file, i % 2])
    (root / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    narrow.save(root / "vae.safetensors", "sdvae_diffusers")
    return root


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """LightningDiT's folder: 24 latents and their twins, 2 x 2 x 32, in two shards."""
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for shard in range(2):
        names = ("latents", "latents_flip")
        arrays = {n: 3 * rng.standard_normal((12, 32, 2, 2), np.float32) + 1 for n in names}
        labels = {"labels": np.arange(12) % 2}
        save_file(arrays | labels, root / f"latents_rank00_shard{shard:03d}.safetensors")
    mean, std = np.linspace(0, 1, 32), np.linspace(1, 4, 32)
    statistics = {n: a.reshape(1, 32, 1, 1) for n, a in (("mean", mean), ("std", std))}
    torch_writer.save(root / "latents_stats.pt", statistics)
    (root / "weights").mkdir()
    narrow.save(root / "weights" / "vae.safetensors", "vavae_f16d32")
    return root


def settings(data):
    c = tiny.settings()
    c.data = data
    c.data.source.num_classes = 2
    c.model.patch_size = 1
    return c


def test_moments_become_fresh_draws_of_the_posterior_times_the_published_scale():
    codec = SdVae(weights="")
    stored = jnp.concatenate([jnp.full((4000, 1, 1, 4), 2.0), jnp.full((4000, 1, 1, 4), 3.0)], -1)
    draws = [np.asarray(codec.latent(stored, jax.random.key(seed))) for seed in (0, 1)]
    assert np.mean(draws[0]) == pytest.approx(0.18215 * 2, abs=0.02)
    assert np.std(draws[0]) == pytest.approx(0.18215 * 3, rel=0.03)
    assert np.abs(draws[0] - draws[1]).mean() > 0.1


def test_one_of_the_twins_is_normalised_by_the_channels_statistics(shards):
    codec = VaVae(statistics=str(shards / "latents_stats.pt"), weights="")
    mean, std = np.linspace(0, 1, 32, dtype=np.float32), np.linspace(1, 4, 32, dtype=np.float32)
    rng = np.random.default_rng(0)
    plain, mirrored = (rng.standard_normal((20_000, 1, 1, 32), np.float32) for _ in range(2))
    x = np.asarray(codec.latent(jnp.concatenate([plain, mirrored], -1), jax.random.key(0)))
    is_plain = np.isclose(x, (plain - mean) / std, atol=1e-5).all(axis=(1, 2, 3))
    is_mirrored = np.isclose(x, (mirrored - mean) / std, atol=1e-5).all(axis=(1, 2, 3))
    assert np.all(is_plain ^ is_mirrored)
    assert abs(is_plain.mean() - 0.5) < 5 * 0.5 / np.sqrt(20_000)  # five standard deviations


def test_chosen_examples_are_mirrored_and_no_other():
    rng = np.random.default_rng(3)
    mirrored, key = jnp.asarray([True, False, True]), jax.random.key(5)
    stored = jnp.asarray(rng.integers(0, 256, (3, 4, 6, 1)), jnp.uint8)
    floats = jnp.asarray(rng.standard_normal((3, 2, 3, 8)), jnp.float32)
    quiet = floats.at[..., 4:].set(0)  # no standard deviation
    for codec, rows in ((Identity(), stored), (AsStored(), floats), (SdVae(None), quiet)):
        plain = codec.latent(rows, key)
        found = codec.latent(rows, key, {}, mirrored)
        np.testing.assert_array_equal(found[1], plain[1])
        np.testing.assert_array_equal(found[::2], plain[::2, :, ::-1])
        nothing = codec.latent(rows, key, {}, jnp.zeros(3, bool))
        np.testing.assert_array_equal(nothing, plain)


def test_a_flipped_copy_stands_for_the_mirror_image(shards):
    codec = VaVae(None, statistics=str(shards / "latents_stats.pt"))
    stored = jnp.asarray(np.random.default_rng(4).standard_normal((3, 2, 2, 64)), jnp.float32)
    mirrored = jnp.asarray([False, True, False])
    found = codec.latent(stored, jax.random.key(0), {}, mirrored)
    mean, std = codec.statistics_per_channel
    plain, twin = np.split(np.asarray(stored), 2, axis=-1)
    expected = (np.where(np.asarray(mirrored)[:, None, None, None], twin, plain) - mean) / std
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_codec_says_which_examples_it_mirrors_of_itself(shards):
    codec = VaVae(None, statistics=str(shards / "latents_stats.pt"))
    stored = jnp.asarray(np.random.default_rng(4).standard_normal((40, 2, 2, 64)), jnp.float32)
    key = jax.random.key(5)
    turned = codec.turned(key, 40)
    assert 0 < turned.sum() < 40
    seen = codec.latent(stored, key)
    np.testing.assert_array_equal(codec.latent(stored, key, {}, turned), seen)
    assert np.all(codec.latent(stored, key, {}, ~turned) != seen)
    for other in (Identity(), AsStored(), SdVae(None)):
        assert other.turned(key, 40).shape == (40,) and not np.any(other.turned(key, 40))


@pytest.mark.parametrize("which", ["sd_vae", "va_vae"])
def test_latents_of_the_other_autoencoder_are_refused_in_one_sentence(moments, shards, which):
    first = imagenet.sd_vae("npy_folder", str(moments))
    second = imagenet.va_vae("safetensors_shards", str(shards))
    data = first if which == "sd_vae" else second
    data.source = (second if which == "sd_vae" else first).source
    with pytest.raises(
        UserError, match=f"data.codec.name = '{which}': the latents .*choose that codec"
    ):
        experiment.experiment(run_config.parse(settings(data), jax.device_count()))


def test_statistics_of_another_length_are_named(shards, tmp_path):
    ones = np.ones((1, 16, 1, 1))
    torch_writer.save(tmp_path / "short.pt", {"mean": ones, "std": ones})
    data = imagenet.va_vae("safetensors_shards", str(shards))
    data.codec.statistics = str(tmp_path / "short.pt")
    with pytest.raises(UserError, match="data.codec.statistics = .*short.pt': are of 16 channels"):
        run_config.parse(settings(data), jax.device_count())


@pytest.mark.parametrize(
    ("mean", "std", "says"),
    [
        (np.zeros((1, 3, 1, 1)), np.ones((1, 4, 1, 1)), "not (1, c, 1, 1)"),
        (np.zeros((1, 3, 1, 2)), np.ones((1, 3, 1, 2)), "not (1, c, 1, 1)"),
        (np.zeros(3), np.ones(3), "not (1, c, 1, 1)"),
        (np.zeros((1, 0, 1, 1)), np.ones((1, 0, 1, 1)), "not (1, c, 1, 1)"),
        (np.zeros((1, 4097, 1, 1)), np.ones((1, 4097, 1, 1)), "of at most 4096 channels"),
        (np.full((1, 3, 1, 1), np.nan), np.ones((1, 3, 1, 1)), "must be finite, and std positive"),
        (np.zeros((1, 3, 1, 1)), np.full((1, 3, 1, 1), np.inf), "must be finite, and std positive"),
        (np.zeros((1, 3, 1, 1)), np.zeros((1, 3, 1, 1)), "must be finite, and std positive"),
    ],
)
def test_statistics_that_are_none_of_channels_are_refused(tmp_path, mean, std, says):
    torch_writer.save(tmp_path / "stats.pt", {"mean": mean, "std": std})
    with pytest.raises(UserError, match="data.codec.statistics = .*stats.pt'") as caught:
        VaVae(statistics=str(tmp_path / "stats.pt"), weights="").statistics_per_channel  # noqa: B018
    assert says in str(caught.value)


@pytest.mark.parametrize("channels", [5 * 10**8, 10**15])
def test_one_number_is_not_expanded_to_statistics_of_many_channels(tmp_path, channels):
    one = Tensor(Storage(np.ones(1, np.float32)), 0, (1, channels, 1, 1), (0, 0, 0, 0))
    file = write_torch(tmp_path / "stats.pt", {"mean": one, "std": one})
    with pytest.raises(UserError, match=r"stats.pt: has a tensor of size .* expanded from 1 elem"):
        VaVae(statistics=str(file), weights="").statistics_per_channel  # noqa: B018


def test_statistics_too_large_for_float32_are_refused(tmp_path):
    mean, std = (tensor(np.full((1, 3, 1, 1), number)) for number in (1e300, 1.0))
    file = write_torch(tmp_path / "stats.pt", {"mean": mean, "std": std})
    with pytest.raises(UserError, match="must be finite"):
        VaVae(statistics=str(file), weights="").statistics_per_channel  # noqa: B018


def test_mistakes_name_the_file(moments, shards, tmp_path):
    data = imagenet.va_vae("safetensors_shards", str(shards))
    data.codec.statistics = str(tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match="data.codec.statistics = .*nowhere.pt.*no such file"):
        run_config.parse(settings(data), jax.device_count())
    with pytest.raises(UserError, match="data.codec.weights=.*nowhere: no such file"):
        SdVae(weights=str(tmp_path / "nowhere")).decoder_weights()
    wrong = SdVae(weights=str(shards / "weights" / "vae.safetensors"))
    with pytest.raises(UserError, match="data.codec.weights = .*vae.safetensors"):
        wrong.decoder_weights()
