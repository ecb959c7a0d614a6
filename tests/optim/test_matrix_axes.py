"""What is a matrix to Muon, against the names of the axes of every parameter."""

import dataclasses

import lively
import pytest

from ig_jax import pytree
from ig_jax.models import axes
from ig_jax.models.dit import DiT
from ig_jax.models.lightningdit import LightningDiT, LightningDiTSettings
from ig_jax.models.network import Network
from ig_jax.optim import matrix_axes

LIGHT = LightningDiTSettings(
    **dataclasses.asdict(lively.SETTINGS), swiglu=True, rope=True, rms_norm=True, shift=True
)
NETS = {
    "sit": lively.make(qk_norm=True),
    "dit": Network(DiT, lively.SETTINGS, 4, 3, lively.CLASSES),
    "lightningdit": Network(LightningDiT, LIGHT, 4, 3, lively.CLASSES),
}
WIDTHS = (axes.EMBED, axes.CONDITION, axes.TIME_FEATURES)


def outputs(names: tuple[str, ...]) -> tuple[str, ...]:
    """Inputs come first, and one side of a kernel is a width; a label table is as published."""
    if names[0] == axes.CLASSES:
        return names[:1]
    return names[1:] if names[0] in WIDTHS else names[-1:]


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_muon_flattens_to_outputs_by_inputs_what_the_names_call_a_matrix(net):
    for path, leaf in pytree.flatten(lively.abstract(net)).items():
        names, matrix = net.axes[path], matrix_axes.matrix_of(path, leaf.shape)
        assert (matrix is not None) == axes.is_matrix(names), path
        if matrix:
            ordered = [names[axis] for axis in matrix.order]
            stacked, of_one = len(matrix.batch), outputs(axes.without_layers(names))
            assert tuple(ordered[stacked:][: len(of_one)]) == of_one, path
            assert ordered[:stacked] == [axes.LAYERS] * stacked, path
