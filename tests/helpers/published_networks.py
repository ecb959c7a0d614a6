"""Lively networks with their published state dicts, and the config of an imported run."""

import importlib.util
from pathlib import Path

import lively

from ig_jax.interop import parameter_names
from ig_jax.models.dit import DiT
from ig_jax.models.network import Network


def sit(**changes):
    """A lively SiT whose heads can be counted from its file, and its published state dict."""
    net = lively.make(qk_norm=True, mlp_ratio=4.0, **({"readouts": (2,)} | changes))
    params = lively.parameters(net)
    return net, params, parameter_names.to_published(params)


def dit(**changes):
    """A lively DiT and its state dict, which might as well be that of the official SiT.

    Both have as many more output channels behind those of each pixel of a patch.
    """
    net = lively.make(qk_norm=True, mlp_ratio=4.0, **({"readouts": ()} | changes))
    net = Network(DiT, net.settings, net.side, net.channels, net.num_classes)
    params = lively.parameters(net)
    return net, params, parameter_names.to_published(params)


def config_of(path: Path):
    """What the config file beside an imported run says."""
    spec = importlib.util.spec_from_file_location("imported", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
