"""Published state dicts of every family with what one may leave open, and runs made of them."""

import jax
import jax.numpy as jnp
import lively
import numpy as np

from configs import published
from ig_jax import experiment as build
from ig_jax.checkpoint import compatibility
from ig_jax.config.run_config import parse
from ig_jax.interop import parameter_names
from ig_jax.models.dit import DiT
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.programs import export_checkpoint, import_checkpoint

WIDTH, HEADS, CHANNELS, CLASSES = 16, 2, 3, 5
LABELS = "y_embedder.embedding_table.weight"
NOISE_FIRST, DATA_FIRST = "noise_to_data", "data_to_noise"
AP_HEAD = {"ap_head.linear1.weight": np.ones((4, 2), np.float32)}
PROJECTORS = {"projectors.0.0.bias": np.ones(3, np.float32)}


def drawn(network, seed=0):
    """Every leaf N(0, 0.2^2)."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype),
        network.abstract_params,
    )


def sit(*, sigma=False, qk_norm=False, width=WIDTH, heads=HEADS, readout=False, extra=None):
    """(a state dict of a SiT or DiT, its network here)."""
    sizes = {"depth": 2, "hidden_size": width, "num_heads": heads, "qk_norm": qk_norm}
    net = lively.make(4, CHANNELS, CLASSES, **sizes, mlp_ratio=4.0, readouts=(1,) * readout)
    if sigma:
        net = Network(DiT, net.settings, net.side, net.channels, net.num_classes)
    return parameter_names.to_published(drawn(net)) | (extra or {}), net


def lightningdit(
    *, sigma=False, qk_norm=False, width=WIDTH, heads=HEADS, readout=False, options=None
):
    kinds = {"swiglu": True, "rope": True, "rms_norm": True, "shift": True} | (options or {})
    sizes = {"depth": 2, "hidden_size": width, "num_heads": heads, "patch_size": 2}
    rest = {"mlp_ratio": 4.0, "time_scale": 1.0, "dtype": "float32", "remat": "none", "unroll": 1}
    settings = LightningDiTSettings(
        **sizes, **rest, **kinds, qk_norm=qk_norm, readouts=(1,) * readout
    )
    net = Network(LightningDiT, settings, 4, CHANNELS, CLASSES)
    state = parameter_names.to_published(drawn(net))
    if sigma:
        state |= with_sigma(state)
    if kinds["rope"]:
        state |= parameter_names.rotary_tables(2, width // heads)
    return state, net


def with_sigma(state, head="final_layer"):
    """The final layer with as many more values for every pixel of a patch."""

    def doubled(array):
        rows = array.reshape(4, CHANNELS, -1)
        return np.concatenate([rows, rows + 1], axis=1).reshape(-1, *array.shape[1:])

    layers = (f"{head}.linear.weight", f"{head}.linear.bias")
    return {name: doubled(state[name]) for name in layers}


def experiment(found, **model):
    c = import_checkpoint.config_of(found, published.bases())
    c.model.update(model)
    return build.experiment(parse(c), jax.devices()[:1]), c.to_dict()


def run_of(found, *, step=0, imported="weights", **model):
    """The run that an import makes of what it found, after so many steps."""
    exp, config = experiment(found, **model)
    params = parameter_names.from_published(found.state, exp.abstract_params)
    meta = {
        "config": compatibility.as_json(config),
        "step": step,
        "imported": imported,
        "versions": {},
    }
    return export_checkpoint.Run(exp, meta, export_checkpoint.published(exp, params)), params
