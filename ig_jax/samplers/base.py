"""The loop that all samplers share, and what those on a fixed grid have in common.

A sampler is a frozen dataclass that says which grid it walks and how it takes one step. It sees a
`Field` and times, never a network, a label or a guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ig_jax.bounds import at_most
from ig_jax.types import Field, Latents, Process, Scalar

MOST_STEPS = 100_000  # a dry run lists them all, and float32 times stay apart

# Standard normal draws for step i, [b, h, w, c]; deterministic samplers ignore it.
Noise = Callable[[Array], Latents]


@runtime_checkable
class Sampler(Protocol):
    """The protocol of samplers, the classes in `SAMPLERS`."""

    num_steps: int
    # Of convergence, which a test measures; strong order does not apply to the SDE.
    order: int
    # Chooses its own steps between the grid's times, for each sample apart: it is then called with
    # a batch of one, and guidance intervals become times of its grid.
    adaptive: bool
    stochastic: bool  # adds noise at its steps
    # Reads the step before: `step` takes a `Past` in place of noise, and returns one beside the
    # latents; `last_step` takes one (`samplers/multistep.py`).
    multistep: bool
    # Asks for the guidance at a step's end as well (`Field.velocity_at_end`).
    guided_at_end: bool
    # The only process whose steps it takes; its grid then holds times of that process, and is
    # neither shifted nor stretched. None: any process.
    process: type | None
    reads_variance: bool  # needs a network that predicts one (`Field.noise_and_variance`)

    def grid(self) -> np.ndarray:
        """Times from 1 (noise) to 0 (data), float64 [steps + 1]."""
        ...

    def step(
        self, field: Field, x: Latents, t: Scalar, t_next: Scalar, noise: Latents
    ) -> Latents: ...

    def last_step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar) -> Latents: ...


def check(sampler: Sampler, process: Process, *, predicts_variance: bool) -> None:
    """Raises ValueError where a sampler is for another process, or for other networks."""
    name = type(sampler).__name__
    if sampler.process and not isinstance(process, sampler.process):
        raise ValueError(
            f"{name} takes the steps of {sampler.process.__name__}, which {type(process).__name__} "
            "does not have; choose another sampler, such as euler_maruyama"
        )
    if sampler.reads_variance and not predicts_variance:
        raise ValueError(
            f"{name} reads a variance, which this network does not predict; choose another "
            "sampler, such as ddim"
        )


def even_times(first: float, last: float, points: int) -> np.ndarray:
    """Evenly spaced times, float64 [points], both ends exact.

    As torch.linspace computes them, the first half from the first and the second from the last:
    from 1 to 0 the i-th from either end add up to 1 to the bit. np.linspace(1, 0, 11) has
    0.29999999999999993 where this has 0.30000000000000004, as 3 * 0.1 is.
    """
    step = (last - first) / (points - 1)
    i = np.arange(points)
    return np.where(i < points // 2, first + i * step, last - (points - 1 - i) * step)


@dataclass(frozen=True)
class FixedGrid:
    """A uniform grid of `num_steps` steps, the last of which is Euler's; `step` is left to write.

    The published LightningDiT counts points: its 125 are 124 steps here.
    """

    num_steps: int = at_most(MOST_STEPS)

    adaptive: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    multistep: ClassVar[bool] = False
    guided_at_end: ClassVar[bool] = False
    process: ClassVar[type | None] = None
    reads_variance: ClassVar[bool] = False
    # Evaluations of the field, for the cost shown to the user.
    calls_per_step: ClassVar[int] = 1
    calls_in_last: ClassVar[int] = 1
    fewest_steps: ClassVar[int] = 1

    def __post_init__(self):
        if self.num_steps < self.fewest_steps:
            raise ValueError(f"num_steps = {self.num_steps}: must be at least {self.fewest_steps}")

    def grid(self) -> np.ndarray:
        return even_times(1.0, 0.0, self.num_steps + 1)

    def calls(self) -> list[int]:
        """Evaluations of the field in every step."""
        return [self.calls_per_step] * (len(self.grid()) - 2) + [self.calls_in_last]

    def last_step(self, field: Field, x: Latents, t: Scalar, t_next: Scalar) -> Latents:
        return x + (t_next - t) * field.velocity(x, t)


def integrate(
    sampler: Sampler,
    grid: np.ndarray,
    fields: Sequence[tuple[Field, int, int]],
    x: Latents,
    noise: Noise,
    *,
    trajectory: bool = False,
) -> tuple[Latents, Float[Array, "steps b h w c"] | None]:
    """Carries x from noise to data along a grid.

    Args:
      sampler: the rule for a step.
      grid: float64 [steps + 1], the sampler's own or a transformed one.
      fields: (field, start, stop) with the field of steps start..stop-1, in order; a multistep
        sampler begins anew in each.
      x: standard normal latents [b, h, w, c] at the grid's first time.
      noise: step index -> fresh standard normal latents.
      trajectory: whether to return the states on the way, too.

    Returns:
      Latents at the grid's last time, in the dtype of x; and the states after each step, of which
      they are the last, or None.
    """
    last = len(grid) - 2
    times = jnp.asarray(grid, x.dtype)
    states = []

    for field, start, stop in fields:

        def body(carry: tuple, i: Array, field: Field = field):
            x, past, left = carry
            here, t, t_next = _of_step(field, i, left), times[i], times[i + 1]
            if sampler.multistep:
                x, past = sampler.step(here, x, t, t_next, past)
            else:
                x = sampler.step(here, x, t, t_next, noise(i))
            left = here.left() if here.left else left
            return (x, past, left), x if trajectory else None

        past = sampler.nothing(x) if sampler.multistep else None
        left = jnp.zeros_like(x) if field.of_step else None
        if start < min(stop, last):
            steps = jnp.arange(start, min(stop, last))
            (x, past, left), on_the_way = lax.scan(body, (x, past, left), steps)
            states.append(on_the_way)
        if stop > last:
            here = _of_step(field, jnp.int32(last), left)
            behind = (past,) if sampler.multistep else ()
            x = sampler.last_step(here, x, times[last], times[last + 1], *behind)
            states.append(x[None])
    return x, jnp.concatenate(states) if trajectory else None


def _of_step(field: Field, i: Array, left: Latents | None) -> Field:
    return field if field.of_step is None else field.of_step(i, left)


def sample(
    sampler: Sampler,
    grid: np.ndarray,
    fields: Sequence[tuple[Field, int, int]],
    x: Latents,
    noise: Noise,
) -> Latents:
    """The latents of `integrate`, without those on the way."""
    return integrate(sampler, grid, fields, x, noise)[0]
