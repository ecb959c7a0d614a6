"""Terms of the training loss. A new one: a file with a `base.Term`, and a row here."""

from ig_jax.objectives.acceleration import AcceleratedFlow
from ig_jax.objectives.contrastive import Contrastive
from ig_jax.objectives.cosine import Cosine
from ig_jax.objectives.dispersive import Dispersive
from ig_jax.objectives.flow import FlowMatching
from ig_jax.objectives.internal_guidance import InternalGuidance
from ig_jax.objectives.layersync import LayerSync
from ig_jax.objectives.self_alignment import SelfAlignment
from ig_jax.objectives.sra2 import Sra2
from ig_jax.objectives.variational_bound import VariationalBound

TERMS = {
    "flow": FlowMatching,
    "accelerated_flow": AcceleratedFlow,
    "internal_guidance": InternalGuidance,
    "contrastive": Contrastive,
    "cosine": Cosine,
    "dispersive": Dispersive,
    "layersync": LayerSync,
    "self_alignment": SelfAlignment,
    "sra2": Sra2,
    "variational_bound": VariationalBound,
}
