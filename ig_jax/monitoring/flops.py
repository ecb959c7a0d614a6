"""FLOPs of a network on paper: what model FLOP/s and MFU are made of.

Counted are the products of matrices, a multiplication and an addition as two: 2 for every weight
and token (or image, where a matrix sees the conditioning only), and the two products of attention.
What works element by element is left out: norms, modulation, activations, softmax, rotations,
residual sums, position and label tables. XLA, which counts it, finds up to 3% more in a network of
width 256; the wider the network, the less.

The convention is that of PaLM (arXiv 2204.02311, appendix B): the backward pass counts twice the
forward pass, and what rematerialisation computes again counts nothing. So a utilisation made of
these numbers tells how fast training is, not how busy the device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ig_jax import pytree
from ig_jax.models.axes import CLASSES, CONDITION, LAYERS, is_matrix
from ig_jax.models.network import Network
from ig_jax.types import NONE, Params


def forward(net: Network, params: Params, heads: Collection[int] | None = None) -> int:
    """FLOPs of one image through the network, its final head and early heads.

    Args:
      net: gives depth, width, the number of tokens, and the names of the parameters' axes.
      params: as `net.init` makes them; abstract ones will do.
      heads: depths of the early heads that are computed; None for all.
    """
    if heads is not None:
        kept = {f"depth_{depth}" for depth in heads}
        early = params.get("heads", {})
        params = {**params, "heads": {name: early[name] for name in early if name in kept}}
    return _products(net, params, net.settings.depth)


def to_readout(net: Network, params: Params, depth: int) -> int:
    """FLOPs of one image up to the early prediction after block `depth`: of `Network.early`."""
    head = {"heads": {f"depth_{depth}": params["heads"][f"depth_{depth}"]}}
    return to_block(net, params, depth) + _products(net, head, 0)


def to_block(net: Network, params: Params, depth: int) -> int:
    """FLOPs of one image up to the tokens after block `depth`: of `Network.tokens`."""
    tap, left_out = net.settings.tap, {"heads", "final_layer"}
    if tap and depth <= tap:
        left_out.add("self_conditioning")
    trunk = {n: leaf for n, leaf in params.items() if n not in left_out}
    return _products(net, trunk, depth)


def _products(net: Network, params: Params, depth: int) -> int:
    """FLOPs of one image's products with these parameters, in the first `depth` blocks."""
    s = net.settings
    tokens = s.num_tokens(net.side)
    total = 4 * depth * tokens**2 * s.hidden_size  # q k^T and attention times v
    for path, leaf in pytree.flatten(params).items():
        names = net.axes[path]
        if is_matrix(names) and CLASSES not in names:  # a label's row is looked up
            once = CONDITION in names  # for an image, not for a token
            size = pytree.count(leaf) * depth // s.depth if LAYERS in names else pytree.count(leaf)
            total += 2 * size * (1 if once else tokens)
    return total


def of_train_step(
    net: Network,
    params: Params,
    batch_size: int,
    terms: Params = NONE,
    teacher: Iterable[int] = (),
    *,
    trunk: bool = True,
    pooled: Collection[str] = (),
    averaged: Params = NONE,
) -> int:
    """FLOPs of the gradient on `batch_size` images: three forward passes each, one of a teacher.

    Of what is not trained there is one.

    Nothing is added for the optimizer, whose cost does not depend on the batch: that of Muon is
    `optim.muon.newton_schulz_flops`. Nor for predictions of a teacher that a loss may ask for.

    Args:
      terms: parameters of the heads of loss terms, by term; each counts as one of all tokens.
      teacher: the last block of each pass through the averaged network.
      trunk: whether all is trained, and not readouts and the heads of terms alone.
      pooled: terms whose heads see one vector for each image instead.
      averaged: parameters of the heads of the averaged network, by term.
    """
    tokens = net.settings.num_tokens(net.side)

    def of_heads(heads: Params) -> int:
        return sum(
            2 * (1 if path.split(".")[0] in pooled else tokens) * pytree.count(leaf)
            for path, leaf in pytree.flatten(heads).items()
            if len(leaf.shape) > 1
        )

    once = sum(to_block(net, params, depth) for depth in teacher) + of_heads(averaged)
    whole = forward(net, params)
    differentiated = whole if trunk else _products(net, {"heads": params["heads"]}, 0)
    return batch_size * (whole + 2 * differentiated + 3 * of_heads(terms) + once)


def in_words(count: int) -> str:
    """'100 TFLOP', with the largest unit that leaves a number of at least 1."""
    units = {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}
    name, size = next(((n, s) for n, s in units.items() if count >= s), ("MFLOP", 1e6))
    return f"{count / size:,.3g} {name}"
