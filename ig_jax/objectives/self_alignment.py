"""Self-Representation Alignment (SRA): early tokens learn from later ones at less noise.

  L = d( MLP(h_a(x_t, t)), sg(h'_b(x_t', t')) ),    t' = clip(t - max_interval u, 0, 1),  u uniform

h_a are the tokens after block a of the network that trains, h'_b those after a later block b of its
average (the teacher), on the same data, noise and labels. The head is D -> 2D -> D with SiLU; the
teacher has none. Distances d, their means over what is left:

  cosine_tokens  1 - cosine similarity along the *token* axis, for each channel: what the published
                 code computes
  cosine         1 - cosine similarity along the channels, for each token
  smooth_l1      e^2 / (2 beta) where |e| < beta, else |e| - beta / 2; the paper's, with beta 0.05
  l1, l2         |e|, e^2

Where the tokens of a sample are in groups (`token_groups.py`), the teacher may see

  sra              every group at its own t' below its own t, in the student's groups
  same             what the student sees
  self_flow        the whole image at the least time of its groups
  self_flow_clean  the first group at that time, the others without noise, but told that time: what
                   the published code computes for self_flow if the teacher is separated as well

Published weights: 0.5 for cosine_tokens. For the others 0.2 (a DiT: 0.04), until epoch 149 (at 512
pixels: 99), then falling to a tenth over 1000 (800) epochs.

Source: arXiv 2505.02831, section 3, arXiv 2607.02508, and their published code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ig_jax.errors import require_all
from ig_jax.models.network import Network
from ig_jax.objectives import heads
from ig_jax.objectives.base import Needs, NoisedBatch, Term
from ig_jax.objectives.distances import similarity, smooth_l1
from ig_jax.objectives.token_groups import MOST_GROUPS, GroupSettings, by_group, of_pixels
from ig_jax.types import NONE, GroupTimes, Key, Latents, Params, PerExample, Times, Tokens

# (projected student, teacher, beta) -> [b, ...], of which the mean over all but b is taken
DISTANCES: dict[str, Callable[[Tokens, Tokens, float], Any]] = {
    "cosine_tokens": lambda a, b, beta: 1 - similarity(a, b, axis=1),
    "cosine": lambda a, b, beta: 1 - similarity(a, b),
    "smooth_l1": lambda a, b, beta: smooth_l1(a - b, beta),
    "l1": lambda a, b, beta: jnp.abs(a - b),
    "l2": lambda a, b, beta: (a - b) ** 2,
}
TEACHER_TIMES = ("sra", "same", "self_flow", "self_flow_clean")
TEACHER_LABELS = ("dropped", "given")


@dataclass(frozen=True)
class SelfAlignment(Term):
    """Distance of a block's projected tokens to those of a later block of the teacher."""

    depth: int  # a, from 1: the block that learns; published: B 3, L 6, XL 8
    teacher_depth: int  # b; published: B 8, L 16, XL 20 (DiT-XL 16)
    max_interval: float = 0.2  # the most by which the teacher's time is earlier
    distance: str = "cosine_tokens"
    beta: float = 0.05  # of smooth_l1
    teacher_time: str = "sra"
    # Whether the tokens of the teacher are in the student's groups, too; False: full attention.
    teacher_groups: bool = True
    teacher_labels: str = "dropped"  # as the student's; published beside token groups: given

    def __post_init__(self):
        super().__post_init__()
        rules = [
            ("max_interval", 0 <= self.max_interval <= 1, "must lie in [0, 1]; published: 0.2"),
            ("distance", self.distance in DISTANCES, f"must be one of {', '.join(DISTANCES)}"),
            (
                "teacher_time",
                self.teacher_time in TEACHER_TIMES,
                f"must be one of {', '.join(TEACHER_TIMES)}",
            ),
            (
                "teacher_labels",
                self.teacher_labels in TEACHER_LABELS,
                f"must be one of {', '.join(TEACHER_LABELS)}",
            ),
            ("beta", self.beta > 0, "must be above 0; published: 0.05"),
        ]
        require_all(self, rules)

    @property
    def needs(self) -> Needs:
        return Needs(taps=(self.depth,), teacher_taps=(self.teacher_depth,))

    def init(self, key: Key, net: Network) -> Params:
        width = net.settings.hidden_size
        return heads.init_mlp(key, (width, 2 * width, width))

    def check_groups(self, groups: GroupSettings) -> None:
        if groups.count == 1:
            if self.teacher_time in ("same", "self_flow_clean"):
                raise ValueError(
                    f"teacher_time = {self.teacher_time!r}: needs groups of tokens; name shares in "
                    "objective.groups, or use sra"
                )
        elif not self.teacher_groups and self.teacher_time != "self_flow":
            raise ValueError(
                f"teacher_groups = False: teacher_time = {self.teacher_time!r} has a time for each "
                "group; use self_flow, or teacher_groups = True"
            )

    def draw(self, key: Key, x0: Latents) -> Float[Array, "b g"]:
        """u, uniform in [0, 1), for every group that there may be."""
        return jax.random.uniform(key, (x0.shape[0], MOST_GROUPS), jnp.float32)

    def teacher_inputs(
        self, batch: NoisedBatch, u: Float[Array, "b g"]
    ) -> tuple[Latents, GroupTimes, Int[Array, "b n"] | None]:
        """Latents, times and groups of tokens that the teacher sees.

        `u`: the draws, of which as many count as there are groups.
        """
        ids, first = batch.ids, batch.t if batch.t.ndim == 1 else jnp.min(batch.t, axis=1)
        if self.teacher_time == "same":
            return batch.x_t, batch.t, ids
        if self.teacher_time == "sra":
            each = batch.t if batch.t.ndim == 2 or ids is None else batch.t[:, None]
            drawn = u[:, 0] if ids is None else u[:, : batch.num_groups]
            t = batch.process.less_noisy(each, drawn, self.max_interval)
            return by_group(lambda t: _noised(batch, t), t, ids), t, ids
        x_t = _noised(batch, first)
        if self.teacher_time == "self_flow_clean":
            x_t = jnp.where(of_pixels(ids, x_t.shape[1]) == 0, x_t, batch.x0)
        return x_t, first, ids if self.teacher_groups else None

    def __call__(self, batch: NoisedBatch, head: Params = NONE, draws: Any = ()) -> PerExample:
        y = batch.y if self.teacher_labels == "dropped" else batch.labels
        x_t, t, ids = self.teacher_inputs(batch, draws)
        depth = self.teacher_depth
        target = batch.teacher.tokens(x_t, t, y, ids, (depth,))[depth]
        student = heads.apply_mlp(head, batch.out.features[self.depth], batch.dtype)
        distance = DISTANCES[self.distance](student, target, self.beta)
        return jnp.mean(distance.reshape(len(distance), -1), axis=1)


def _noised(batch: NoisedBatch, t: Times) -> Latents:
    """The batch's data with its noise at other times."""
    return batch.process.perturb(batch.x0, batch.noise, t)
