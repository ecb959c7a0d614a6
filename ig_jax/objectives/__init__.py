"""Terms of the training loss. A new one: a file with a `base.Term`, and a row here."""

from ig_jax.objectives.acceleration import AcceleratedFlow
from ig_jax.objectives.cosine import Cosine
from ig_jax.objectives.flow import FlowMatching
from ig_jax.objectives.internal_guidance import InternalGuidance

TERMS = {
    "flow": FlowMatching,
    "accelerated_flow": AcceleratedFlow,
    "internal_guidance": InternalGuidance,
    "cosine": Cosine,
}
