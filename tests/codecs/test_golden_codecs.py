"""The autoencoders of latent diffusion against the published implementations, on small weights."""

import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import KEYS
from tiers import slow_but
from vectors import Vectors, channels_first, channels_last, quick_jit, weightless

from ig_jax import pytree
from ig_jax.codecs import kl_layers, sd_vae, to_uint8, va_vae
from ig_jax.codecs.kl_layers import Numerics

pytestmark = pytest.mark.golden

TYPES = ("float32", "bfloat16")


def load(golden_dir, name, codec, groups_of):
    """The vectors of one autoencoder, its parameters, and what ours makes of the inputs."""
    vectors = Vectors(golden_dir, name)
    groups = groups_of(vectors.config)
    params = jax.tree.map(jnp.asarray, codec.from_published(vectors.weights()))
    # Each program is compiled once and shared by the tests.
    encode = {d: quick_jit(partial(codec.encode, groups=groups, dtype=d)) for d in TYPES}
    decode = {d: quick_jit(partial(codec.decode, groups=groups, dtype=d)) for d in TYPES}
    image, z = channels_last(vectors["image"]), channels_last(vectors["z"])
    return SimpleNamespace(
        vectors=vectors,
        codec=codec,
        params=params,
        how=Numerics(groups, jnp.float32),
        encode=encode,
        decode=decode,
        image=image,
        z=z,
        posterior=encode["float32"](params, image),
    )


@pytest.fixture(scope="module")
def sd(golden_dir):
    return load(
        golden_dir, "sd_vae", sd_vae, lambda config: config["diffusers_config"]["norm_num_groups"]
    )


@pytest.fixture(scope="module")
def va(golden_dir):
    return load(golden_dir, "vavae", va_vae, lambda config: config["norm_groups"])


@pytest.fixture(params=slow_but(["sd"], ["sd", "va"]))
def vae(request):
    return request.getfixturevalue(request.param)


def check_posterior(vectors, prefix, mean, std):
    vectors.assert_close(f"{prefix}mean", channels_first(mean))
    vectors.assert_close(f"{prefix}std", channels_first(std))
    vectors.assert_close(f"{prefix}logvar", channels_first(2 * jnp.log(std)))


def test_the_encoder_gives_the_published_posterior(vae):
    raw = quick_jit(partial(kl_layers.encoder, how=vae.how))(vae.params["encoder"], vae.image)
    vae.vectors.assert_close("encoder_out_before_quant_conv", channels_first(raw))
    moments = kl_layers.conv(vae.params["quant_conv"], raw, vae.how)
    vae.vectors.assert_close("moments", channels_first(moments))
    check_posterior(vae.vectors, "", *vae.posterior)


def test_extreme_variances_are_clamped_as_published(sd):
    posterior = kl_layers.posterior(channels_last(sd.vectors["clamp_moments_in"]))
    check_posterior(sd.vectors, "clamp_", *posterior)


def test_the_decoder_gives_the_published_images(vae):
    vae.vectors.assert_close("decoded", channels_first(vae.decode["float32"](vae.params, vae.z)))


def test_the_decoder_begins_as_published(sd):
    x = kl_layers.conv(sd.params["post_quant_conv"], sd.z, sd.how)
    first = kl_layers.conv(sd.params["decoder"]["conv_in"], x, sd.how)
    sd.vectors.assert_close("decoder_conv_in", channels_first(first))


def test_what_sit_stores_and_trains_on_is_mean_and_std(sd):
    mean, std = sd.posterior
    stored = channels_first(jnp.concatenate([mean, std], axis=-1))
    sd.vectors.assert_close("stored_mean_std", stored)
    drawn = mean + std * channels_last(sd.vectors["posterior_eps"])
    sd.vectors.assert_close("posterior_sample_scaled", channels_first(sd_vae.SCALE * drawn))


def test_what_lightningdit_stores_is_a_draw(va):
    mean, std = va.posterior
    drawn = mean + std * channels_last(va.vectors["posterior_eps"])
    va.vectors.assert_close("posterior_sample", channels_first(drawn))


# From latents of a model to 8 bits.


def check_pixels(vectors, exact, ours):
    """`exact` before the cut to integers; the cut may differ where that is close to one."""
    exact = np.clip(exact, 0, 255)
    vectors.assert_close("pixels_before_uint8", exact)
    reference = vectors["pixels_before_uint8"]
    settled = np.abs(reference - np.round(reference)) > vectors.bound("pixels_before_uint8")
    saturated = (reference == 0) | (reference == 255)
    assert ours.dtype == np.uint8 and settled.mean() > 0.5
    compared = settled | saturated
    np.testing.assert_array_equal(ours[compared], vectors["pixels_uint8"][compared])


def test_images_of_sit_are_the_published_bytes(sd):
    latents = channels_last(sd.vectors["z_scaled"]) / sd_vae.SCALE
    x = sd.decode["float32"](sd.params, latents)
    check_pixels(
        sd.vectors, 127.5 * np.asarray(x) + 127.5, np.asarray(to_uint8.to_uint8_truncated(x))
    )


def test_images_of_lightningdit_are_the_published_bytes(va):
    std, mean = (channels_last(va.vectors[f"latent_{name}"]) for name in ("std", "mean"))
    latents = va.z * std + mean
    va.vectors.assert_close("latent_denormalised", channels_first(latents))
    x = va.decode["float32"](va.params, latents)
    check_pixels(va.vectors, 127.5 * np.asarray(x) + 128, np.asarray(to_uint8.to_uint8_rounded(x)))


def test_the_rules_differ_by_half_a_grey_level():
    grey = jnp.array([-2.0, -1.0, -0.6, 0.0, 0.6, 1.0, 2.0]).reshape(1, 1, -1, 1)
    # 255 (x + 1) / 2 = 51 at -0.6, 127.5 at 0, 204 at 0.6; a thousandth keeps off the integers.
    below, above = grey - 1e-3, grey + 1e-3
    cut, rounded = to_uint8.to_uint8_truncated, to_uint8.to_uint8_rounded
    assert cut(below).ravel().tolist() == [0, 0, 50, 127, 203, 254, 255]
    assert cut(above).ravel().tolist() == [0, 0, 51, 127, 204, 255, 255]
    assert rounded(below).ravel().tolist() == [0, 0, 51, 127, 204, 255, 255]
    assert rounded(above).ravel().tolist() == [0, 0, 51, 128, 204, 255, 255]


# bfloat16, and what is refused.


def relative_error(ours, reference):
    """Root mean square, as a share of the reference's."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    return np.sqrt(np.mean((ours - reference) ** 2) / np.mean(reference**2))


@pytest.mark.slow
def test_bfloat16_stays_close_and_answers_in_float32(vae):
    mean, std = vae.encode["bfloat16"](vae.params, vae.image)
    image = vae.decode["bfloat16"](vae.params, vae.z)
    assert mean.dtype == std.dtype == image.dtype == jnp.float32
    errors = [
        relative_error(mean, vae.posterior[0]),
        relative_error(std, vae.posterior[1]),
        relative_error(image, vae.decode["float32"](vae.params, vae.z)),
    ]
    # Measured 0.002 to 0.029. The lower bound tells that there is any rounding to bfloat16 at all.
    assert all(0.001 < error < 0.05 for error in errors)


def test_norms_are_float32_whatever_the_rest_is():
    """The mean of 300 and 302 is no bfloat16 number; the norm must give -1 and 1 all the same."""
    x = jnp.full((1, 2, 2, 4), 300, jnp.bfloat16).at[:, 0].set(302)
    affine = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    out = kl_layers.group_norm(affine, x, Numerics(2, jnp.bfloat16))
    np.testing.assert_allclose(out, np.where(x == 302, 1.0, -1.0), atol=1e-6)


def test_sides_that_do_not_halve_often_enough_are_refused(sd):
    with pytest.raises(ValueError, match="36 x 32: both sides must be multiples of 8"):
        sd_vae.encode(sd.params, jnp.zeros((1, 36, 32, 3)), groups=2)


def test_groups_that_do_not_divide_the_channels_are_refused(sd):
    with pytest.raises(ValueError, match="groups = 32: must divide the 6 channels"):
        sd_vae.encode(sd.params, jnp.zeros((1, 8, 8, 3)))


# Names.


@pytest.mark.parametrize(
    "file, codec, values",
    [("sdvae_diffusers", sd_vae, 83_653_863), ("vavae_f16d32", va_vae, 69_836_067)],
)
def test_full_size_files_are_used_to_the_last_value(file, codec, values):
    entries = json.loads((KEYS / f"{file}.json").read_text())
    state = {name: weightless(entry["shape"]) for name, entry in entries.items()}
    params = codec.from_published(state)
    assert len(pytree.flatten(params)) == len(state)
    assert pytree.count(params) == values


def test_full_size_networks_have_the_published_factors():
    for file, codec, side, channels in [
        ("sdvae_diffusers", sd_vae, 32, 4),
        ("vavae_f16d32", va_vae, 16, 32),
    ]:
        entries = json.loads((KEYS / f"{file}.json").read_text())
        params = codec.from_published({n: weightless(e["shape"]) for n, e in entries.items()})
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
        image = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
        mean, std = jax.eval_shape(codec.encode, like, image)
        assert mean.shape == std.shape == (2, side, side, channels)
        assert jax.eval_shape(codec.decode, like, mean).shape == image.shape


OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def with_old_names(state, *, as_convolutions):
    old = {}
    for name, array in state.items():
        renamed = name
        for new, before in OLD.items():
            renamed = renamed.replace(new, before)
        is_matrix = renamed != name and array.ndim == 2
        old[renamed] = array[:, :, None, None] if is_matrix and as_convolutions else array
    return old


@pytest.mark.parametrize("as_convolutions", [False, True])
def test_old_attention_names_and_shapes_give_the_same_parameters(sd, as_convolutions):
    old = with_old_names(sd.vectors.weights(), as_convolutions=as_convolutions)
    assert sum("query" in name for name in old) == 4
    params, expected = pytree.flatten(sd_vae.from_published(old)), pytree.flatten(sd.params)
    assert params.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(params[name], leaf, err_msg=name)


MISSING = {
    "sd": (
        "encoder.down_blocks.0.resnets.1.conv1.weight",
        "decoder.mid_block.attentions.0.to_q.bias",
    ),
    "va": ("encoder.down.2.block.0.nin_shortcut.weight", "decoder.up.4.attn.2.proj_out.bias"),
}


@pytest.mark.parametrize("name", ["sd", "va"])
def test_names_missing_and_left_over_are_listed_together(name, request):
    vae = request.getfixturevalue(name)
    state = vae.vectors.weights()
    for missing in MISSING[name]:
        del state[missing]
    state |= {"encoder.extra.weight": np.zeros(3), "another": np.zeros(3)}
    with pytest.raises(ValueError) as refusal:
        vae.codec.from_published(state)
    told, left_over = str(refusal.value).split("; ")[1:]
    assert told.startswith("missing: ") and all(n in told for n in MISSING[name])
    assert told.count(",") == 1
    assert left_over == "left over: another, encoder.extra.weight"


def test_a_tensor_under_both_its_names_is_refused(sd):
    state = sd.vectors.weights()
    name = "encoder.mid_block.attentions.0.query.weight"
    state[name] = state["encoder.mid_block.attentions.0.to_q.weight"]
    with pytest.raises(ValueError, match=f"left over: {name}$"):
        sd_vae.from_published(state)


def test_a_tensor_of_another_shape_is_told(va):
    state = va.vectors.weights()
    state["decoder.up.0.block.0.conv1.weight"] = np.zeros((4, 5, 3, 3))
    with pytest.raises(ValueError, match=r"decoder.up.0.block.0.conv1.weight \(4, 5, 3, 3\)"):
        va_vae.from_published(state)


def test_what_only_training_uses_is_passed_over(va):
    training = ("foundation_model.model.norm.weight", "linear_proj.weight", "loss.logvar")
    state = va.vectors.weights() | {name: np.zeros(3) for name in training}
    assert pytree.count(va_vae.from_published(state)) == pytree.count(va.params)


def test_a_file_of_another_kind_is_refused(va):
    with pytest.raises(ValueError, match="no sizes to be read"):
        sd_vae.from_published(va.vectors.weights())
