"""Images of a network's tokens: their first three principal components as red, green and blue.

As the published tool of SRA draws them (github.com/vvvvvjdy/SRA, folder pca-vis), but for what that
leaves to chance: the decomposition is exact (there scikit-learn, which may take a randomised one),
the sign of a component is fixed, and any square grid of tokens will do (there 16 x 16).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from ig_jax.errors import UserError, shown

_COLOURS = 3  # components
EPSILON = 1e-6  # of both norms, as published
TOKEN_NORMS = ("layer_norm", "min_max")
BASES = ("cell", "shared")

_Rows = Float64[np.ndarray, "*cells n width"]


@dataclass(frozen=True, eq=False)
class TokenPca:
    """Tokens of cells, such as images at several times after several blocks, seen in three colours.

    Attributes:
      rgb: in [0, 1], float32 [*cells, side, side, 3].
      projections: of the centred tokens on the components, float32 [*cells, n, 3].
      components: orthonormal rows, float32 [*cells, 3, width], or [3, width] of a shared basis. The
        entry of largest size is positive. A component along which nothing varies is 0, and its
        colour black.
      explained_variance: along the components, divided by n - 1, where n counts the tokens that
        share the basis: float32 [*cells, 3], or [3].
    """

    rgb: np.ndarray
    projections: np.ndarray
    components: np.ndarray
    explained_variance: np.ndarray


def token_pca(tokens: Any, *, norm: str = "layer_norm", basis: str = "cell") -> TokenPca:
    """Principal components of tokens, in float64.

    Args:
      tokens: [*cells, n, width], n of a square grid, row by row; as `Pipeline.features` gives them.
      norm: what is done to tokens first: `layer_norm`, of each token over its channels, without
        affine; or `min_max`, each channel to [0, 1] over the n tokens of a cell, as the published
        tool does to networks that were not trained with SRA.
      basis: `cell`: each cell has its own components, and colours say nothing between cells; or
        `shared`: all cells have the same centre, components and scale of colours.

    Raises:
      UserError: an option is unknown; the tokens are not finite, or no square grid of more than
        one.
    """
    for name, value, known in (("norm", norm, TOKEN_NORMS), ("basis", basis, BASES)):
        if value not in known:
            raise UserError(f"{name} = {shown(value)}: must be {' or '.join(known)}")
    x = np.asarray(tokens, np.float32)
    side = _side(x)
    rows = normalised(x, norm)
    *cells, n, width = rows.shape
    if basis == "shared":
        rows = rows.reshape(-1, width)
    projections, components, variance = principal_components(rows)
    colours = _scaled(projections)
    return TokenPca(
        rgb=colours.reshape(*cells, side, side, _COLOURS).astype(np.float32),
        projections=projections.reshape(*cells, n, _COLOURS).astype(np.float32),
        components=components.astype(np.float32),
        explained_variance=variance.astype(np.float32),
    )


def _side(tokens: np.ndarray) -> int:
    """Of the grid of tokens; raises UserError where there is none."""
    if tokens.ndim < 2 or 0 in tokens.shape:
        raise UserError(f"tokens: have shape {shown(tokens.shape)}, must be [..., n, width]")
    n = tokens.shape[-2]
    side = math.isqrt(n)
    if side * side != n or n == 1:
        raise UserError(f"tokens: {n} of them are no square image; there must be 4, 9, 16, ...")
    if not np.all(np.isfinite(tokens)):
        raise UserError("tokens: are not finite; the network overflows, or its weights are damaged")
    return side


def normalised(tokens: Float[np.ndarray, "*cells n width"], norm: str) -> _Rows:
    """Tokens after `norm`, a name of `TOKEN_NORMS`; see `token_pca`."""
    x = tokens.astype(np.float64)
    if norm == "layer_norm":
        x -= x.mean(-1, keepdims=True)
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON)
    least, greatest = x.min(-2, keepdims=True), x.max(-2, keepdims=True)
    return (x - least) / (greatest - least + EPSILON)


def principal_components(
    rows: _Rows,
) -> tuple[
    Float64[np.ndarray, "*cells n 3"],
    Float64[np.ndarray, "*cells 3 width"],
    Float64[np.ndarray, "*cells 3"],
]:
    """Projections of the centred rows, components and variances along these; see `TokenPca`.

    Fewer than three directions along which rows vary leave projections and components of 0.
    """
    *cells, n, width = rows.shape
    centred = rows - rows.mean(-2, keepdims=True)
    # Of many rows: the triangle of a QR decomposition has the same singular values and components.
    small = np.linalg.qr(centred, mode="r") if n > width else centred
    _, sizes, directions = np.linalg.svd(small, full_matrices=False)
    kept = min(_COLOURS, sizes.shape[-1])
    components, spread = np.zeros((*cells, _COLOURS, width)), np.zeros((*cells, _COLOURS))
    components[..., :kept, :], spread[..., :kept] = directions[..., :kept, :], sizes[..., :kept]
    # No larger than what rounding the rows to float32 leaves.
    nothing = np.finfo(np.float32).eps * np.linalg.norm(rows, axis=(-2, -1))
    varies = spread > nothing[..., None]
    largest = np.argmax(np.abs(components), axis=-1, keepdims=True)
    components *= np.copysign(1.0, np.take_along_axis(components, largest, -1)) * varies[..., None]
    projections = centred @ np.swapaxes(components, -2, -1)
    return projections, components, (spread * varies) ** 2 / (n - 1)


def _scaled(projections: Float64[np.ndarray, "*cells n 3"]) -> Float64[np.ndarray, "*cells n 3"]:
    """Each component to [0, 1] over its rows; 0 where it is constant."""
    least = projections.min(-2, keepdims=True)
    extent = projections.max(-2, keepdims=True) - least
    return (projections - least) / np.where(extent > 0, extent, 1.0)
