"""Everything that a training step changes."""

from __future__ import annotations

import jax
import optax
from flax import struct

from ig_jax.optim.ema import Averages
from ig_jax.types import Abstract, Params

HEADS_OF_TERMS = "terms"  # beside the network's own names, those of the heads of loss terms
AVERAGED_HEADS = "ema_terms"  # of a state and of a checkpoint


# What `train.only` may name -> the parts of the network that are then trained, and no others.
PARTS = {"readouts": ("heads",)}


def trained(params: Params, terms: Params, only: str | None = None) -> Params:
    """The tree that is differentiated and that the optimizer sees: network and heads of terms.

    Without heads it is the network's own tree, so that the optimizer's state of such a run, in
    checkpoints of any age too, has no level that says so. `only`: one of `PARTS`.
    """
    net = params if only is None else {name: params[name] for name in PARTS[only]}
    return {**net, HEADS_OF_TERMS: terms} if terms else net


def parted(trained: Params) -> tuple[Params, Params]:
    """The inverse of `trained`: the network's parameters in it, and the heads by term."""
    net = {name: values for name, values in trained.items() if name != HEADS_OF_TERMS}
    return net, trained.get(HEADS_OF_TERMS, {})


@struct.dataclass
class TrainState:
    """Everything a training step changes. No key: randomness is addressed by (seed, step)."""

    step: jax.Array | Abstract  # int32, updates done
    params: Params
    opt_state: optax.OptState | None  # None: imported weights, that no optimizer has seen
    ema: Averages | None  # of the network; None: imported weights, which are averages already
    # Heads that loss terms train beside the network, by term; sampling and export never see them.
    terms: Params = struct.field(default_factory=dict)
    # The part of the network that is trained, one of `PARTS`; None: all of it.
    only: str | None = struct.field(default=None, pytree_node=False)
    # Averages of those parts of the heads that a teacher has too, of the teacher's decay.
    ema_terms: Params = struct.field(default_factory=dict)

    @property
    def trained(self) -> Params:
        """The tree that is differentiated, and that the optimizer sees."""
        return trained(self.params, self.terms, self.only)

    @property
    def frozen(self) -> Params:
        """The rest of the network's parameters, by name; {} where all of it is trained."""
        return {name: x for name, x in self.params.items() if name not in self.trained}

    def averaged_parts(self, terms: Params) -> Params:
        """The parts of heads of which `ema_terms` holds averages."""
        return {
            term: {part: terms[term][part] for part in parts}
            for term, parts in self.ema_terms.items()
        }
