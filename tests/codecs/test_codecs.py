"""Codecs beside their numbers: batches worked on in parts, memory, precision, and their files."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import narrow
import numpy as np
import pytest

from ig_jax.codecs import autoencoders, base, kl_layers, sd_vae, to_uint8
from ig_jax.codecs.autoencoders import SdVae, VaVae
from ig_jax.errors import UserError
from ig_jax.io.torch import file as torch_file
from ig_jax.io.torch import writer as torch_writer
from ig_jax.parallel.mesh import make_mesh, over_batch

SIDE = 32


@pytest.mark.parametrize("rows", [1, 4, 5, 7, 8])
def test_a_batch_in_parts_is_the_batch(rows):
    x = np.arange(rows * 3.0).reshape(rows, 3)
    seen = []

    def double(part):
        seen.append(len(part))
        return 2 * part

    out = jax.jit(lambda x: base.in_parts(double, x, most=1))(x)
    np.testing.assert_array_equal(out, 2 * x)
    assert max(seen) <= jax.device_count()


def test_parts_take_rows_from_every_device():
    """Otherwise the devices would take turns."""
    mesh = make_mesh()
    rows = over_batch(mesh)
    program = jax.jit(
        lambda x: base.in_parts(lambda part: jnp.sin(part), x, most=2),
        in_shardings=rows,
        out_shardings=rows,
    )
    x = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    np.testing.assert_allclose(program(x), np.sin(x), rtol=1e-5, atol=1e-6)
    text = program.lower(x).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.slow
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_an_autoencoder_gives_the_same_in_parts(way, monkeypatch):
    params = jax.tree.map(jnp.asarray, sd_vae.from_published(narrow.state("sdvae_diffusers")))
    shape = {"encode": (5, SIDE, SIDE, 3), "decode": (5, 4, 4, 4)}[way]
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32))
    whole = getattr(sd_vae, way)(params, x)
    monkeypatch.setattr(kl_layers, "AT_ONCE", SIDE**2)
    program = jax.jit(getattr(sd_vae, way))
    parts = program(params, x)
    assert "while" in program.lower(params, x).as_text()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), parts, whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_256_images_of_256_pixels_are_decoded_in_less_than_16_gigabytes(dtype):
    entries = json.loads((narrow.KEYS / "sdvae_diffusers.json").read_text())
    zeros = {n: np.broadcast_to(np.float32(0), e["shape"]) for n, e in entries.items()}
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), sd_vae.from_published(zeros)
    )
    latents = jax.ShapeDtypeStruct((256, 32, 32, 4), jnp.float32)
    program = jax.jit(partial(sd_vae.decode, dtype=dtype)).lower(params, latents).compile()
    used = program.memory_analysis()
    # The tests have two devices, for each of which a part is counted.
    assert used.temp_size_in_bytes + used.output_size_in_bytes < 16e9


@pytest.mark.slow
@pytest.mark.parametrize("codec", [SdVae, VaVae])
def test_bfloat16_is_an_option_of_both_ways(codec, tmp_path):
    kind = {SdVae: "sdvae_diffusers", VaVae: "vavae_f16d32"}[codec]
    file = narrow.save(tmp_path / "vae.safetensors", kind, certain=True)
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 255, (2, SIDE, SIDE, 3), np.uint8))
    keys = jax.random.split(jax.random.key(0))
    stored = {}
    for dtype in ("float32", "bfloat16"):
        one = codec(file, dtype)
        encoder = narrow.encoder(one, SIDE)
        stored[dtype] = np.asarray(one.to_store(pixels, encoder, keys))
    error = np.abs(stored["bfloat16"] - stored["float32"]).max() / np.abs(stored["float32"]).max()
    assert 1e-4 < error < 0.05


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="dtype = 'float16': must be one of float32, bfloat16"):
        SdVae("", "float16")


@pytest.mark.parametrize("codec", [SdVae, VaVae])
def test_the_rule_to_8_bits_is_a_setting(codec, monkeypatch):
    module = {SdVae: autoencoders.sd_vae, VaVae: autoencoders.va_vae}[codec]
    monkeypatch.setattr(module, "decode", lambda weights, x, dtype: x)
    monkeypatch.setattr(VaVae, "_statistics", (np.float32(0), np.float32(1)))
    scale = sd_vae.SCALE if codec is SdVae else 1
    x = scale * jnp.linspace(-1, 1, 101).reshape(1, 1, 101, 1)
    cut, rounded = (
        codec("", rounding=rule).decode(x, {"weights": 0}) for rule in to_uint8.ROUNDING_RULES
    )
    np.testing.assert_array_equal(cut, to_uint8.to_uint8_truncated(x / scale))
    np.testing.assert_array_equal(rounded, to_uint8.to_uint8_rounded(x / scale))
    assert np.any(cut != rounded)
    # Configs of older runs do not have the field.
    assert codec("").rounding == {SdVae: to_uint8.TRUNCATED, VaVae: to_uint8.ROUNDED}[codec]
    with pytest.raises(ValueError, match="rounding = 'up': must be '255 .*cut' or '127.5"):
        codec("", rounding="up")


@pytest.mark.parametrize(
    ("codec", "shape"), [(SdVae(""), (36, 32, 3)), (SdVae(""), (4, 4, 4)), (VaVae(""), (40, 32, 3))]
)
def test_what_a_codec_cannot_read_is_refused_with_what_it_can(codec, shape):
    with pytest.raises(ValueError, match="reads latents .* or images .* divisible by"):
        codec.latent_shape(shape)


def test_latents_need_statistics_before_they_are_trained_on():
    with pytest.raises(UserError, match="data.codec.statistics = None: no such file"):
        VaVae("").latent(jnp.zeros((1, 2, 2, 64)), jax.random.key(0))


def test_a_torch_file_of_ours_is_read_and_its_bytes_are_its_arrays(tmp_path):
    arrays = {
        "mean": np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1),
        "std": np.linspace(1, 2, 300 * 7, dtype=np.float64).reshape(300, 7),
    }
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        torch_writer.save(tmp_path / name / "stats.pt", arrays)
    found = torch_file.load(tmp_path / "one" / "stats.pt")
    assert list(found) == ["mean", "std"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32))
    files = [(tmp_path / name / "stats.pt").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
