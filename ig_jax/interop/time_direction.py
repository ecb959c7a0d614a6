"""A published network in this code's direction of time and sign, folded into its weights; and back.

The file's network f(x, t) counts time from noise to data or from data to noise. What this code's
network computes from weights w is s_c w(x, t_c): for a LightningDiT s_c = -1 and t_c = 1 - t, for
all others s_c = 1 and t_c = t; t runs from data to noise. Its prediction is to be that of the file,

  velocity       -f(x, 1 - t) or f(x, t)      the velocity points the other way, too
  noise, score    f(x, 1 - t) or f(x, t)

so that weights may have to be turned round in time, in the first time layer, and in sign, in the
final layers. Both are exact: with cos(k (1 - t)) and sin(k (1 - t)) expanded, the columns of that
layer become Wc cos k + Ws sin k and Wc sin k - Ws cos k. Turning twice gives back the weights, but
for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ig_jax.interop.declared import DATA_TO_NOISE, NOISE_TO_DATA
from ig_jax.models import embed

_State = Mapping[str, np.ndarray]

TIME_LAYER = "t_embedder.mlp.0.weight"
OWN = {"sit": DATA_TO_NOISE, "dit": DATA_TO_NOISE, "lightningdit": NOISE_TO_DATA}  # of exports


def folded(
    state: _State, family: str, direction: str, prediction: str | None
) -> dict[str, np.ndarray]:
    """The arrays that change so that ours is the network of a file in this direction."""
    changed: dict[str, np.ndarray] = {}
    if direction != OWN[family]:
        changed[TIME_LAYER] = _turned(state[TIME_LAYER])
    of_file = -1 if prediction == "velocity" and direction == NOISE_TO_DATA else 1
    of_ours = -1 if family == "lightningdit" else 1
    if of_file != of_ours:
        heads = ("final_layer.linear.", "final_layer_xr.linear.")
        changed |= {n: -np.asarray(a, np.float32) for n, a in state.items() if n.startswith(heads)}
    return changed


def _turned(layer: np.ndarray) -> np.ndarray:
    """The first time layer [width, 256], of 1 - t for t."""
    half = embed.NUM_TIME_FEATURES // 2
    cos_columns, sin_columns = np.split(np.asarray(layer, np.float64), 2, axis=1)
    frequencies = embed.MAX_PERIOD ** (-np.arange(half) / half)
    cos, sin = np.cos(frequencies), np.sin(frequencies)
    columns = [cos_columns * cos + sin_columns * sin, cos_columns * sin - sin_columns * cos]
    return np.concatenate(columns, axis=1).astype(np.float32)
