"""Words of the whole package: array roles, outputs of a network, protocols between parts.

Time runs one way everywhere: t = 0 is data, t = 1 is noise, and the velocity dx/dt points to noise.
Latents are channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt8

Latents = Float[Array, "b h w c"]  # unit-ish scale, as the codec hands them out
Times = Float[Array, "b"]  # in [0, 1]
GroupTimes = Float[Array, "b ..."]  # [b, g], a time for each group of a sample's tokens; or [b]
Labels = Int[Array, "b"]  # num_classes is the null class
Tokens = Float[Array, "b n d"]  # one row per patch, row-major over the patch grid
Images = UInt8[Array, "b H W C"]
PerExample = Float[Array, "b"]  # one loss value per example
PerToken = Float[Array, "b n"]  # one loss value per token
Scalar = Float[Array, ""]
Key = jax.Array  # a typed PRNG key, or an array of them

# In a pytree, a place may also hold what JAX puts there while it looks at structure alone.
Abstract = Any

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # of compute, as settings name them

Params = Mapping[str, Any]  # nested dict of arrays
NONE: Params = MappingProxyType({})  # no parameters
Batch = Mapping[str, Array]  # 'stored': what the source holds [b, ...], 'label': int [b]


@struct.dataclass
class TokenGroups:
    """Parts of each image's tokens that differ in their times, or do not see each other."""

    # Which of its sample's g conditioning vectors each token gets; None: there is one.
    condition: Int[Array, "b n"] | Abstract | None = None
    # Tokens attend to those of the same number only; None: to all.
    attention: Int[Array, "b n"] | Abstract | None = None


@struct.dataclass
class NetOutput:
    """Everything that leaves one forward pass."""

    pred: Latents | Abstract  # what the process says the network predicts
    heads: Mapping[int, Latents | Abstract]  # readout depth -> early prediction; IG reads these
    features: Mapping[int, Tokens | Abstract]  # depth -> tokens after that block, only those tapped
    # Where the log variance of an ancestral step lies between its bounds; None: not predicted.
    variance: Latents | Abstract | None = None


@runtime_checkable
class NetFn(Protocol):
    """A network: a pure function, without randomness and without a training mode."""

    def __call__(
        self, params: Params, x: Latents, t: Array, y: Labels, *, taps: tuple[int, ...] = ()
    ) -> NetOutput: ...


@runtime_checkable
class Gather(Protocol):
    """Makes parameters whole that several devices share, on each as it needs them."""

    def once(self, params: Params) -> Params:
        """All parameters; those of the blocks may stay split until `block`."""
        ...

    def block(self, params: Params) -> Params:
        """One block's parameters."""
        ...


class Whole:
    """The `Gather` of parameters that are whole."""

    def once(self, params: Params) -> Params:
        return params

    def block(self, params: Params) -> Params:
        return params


@runtime_checkable
class BatchRows(Protocol):
    """Reads all rows of a batch that devices share, inside a program of all of them.

    Each device differentiates its own loss: gradients are those of the sum over devices.
    """

    def mean(self, x: Array) -> Array:
        """The mean over all rows of the batch: this device's [b, ...] -> [...]."""
        ...

    def all(self, x: Array) -> Array:
        """All rows in the order of the batch: this device's [b, ...] -> [all, ...]."""
        ...


class OneDevice:
    """The `BatchRows` of a batch that is on one device."""

    def mean(self, x: Array) -> Array:
        return jnp.mean(x, axis=0)

    def all(self, x: Array) -> Array:
        return x


@runtime_checkable
class Process(Protocol):
    """A diffusion process, from data to noise, and the network's target on it (`diffusion/`)."""

    def interval(self, *, sampling: bool) -> tuple[float, float]: ...

    def draw_time(self, key: Key, n: int) -> Times: ...

    def time(self, draw: GroupTimes) -> GroupTimes: ...

    def less_noisy(self, t: GroupTimes, draw: GroupTimes, most: float) -> GroupTimes: ...

    def perturb(self, x0: Latents, noise: Latents, t: Times) -> Latents: ...

    def target(self, x0: Latents, noise: Latents, t: Times) -> Latents: ...

    def comparable(self, pred: Latents, t: Times) -> Latents: ...

    def condition_time(self, t: GroupTimes) -> Array: ...

    def velocity(self, pred: Latents, x: Latents, t: Times) -> Latents: ...

    def noise(self, pred: Latents, x: Latents, t: Times) -> Latents: ...

    def score(self, velocity: Latents, x: Latents, t: Times) -> Latents: ...

    def coefficients(self, t: Array) -> Any: ...  # `diffusion.process.Coefficients`

    def time_of_ratio(self, ratio: Array) -> Array: ...  # of sigma to alpha


class Field(NamedTuple):
    """All that a sampler may see: no network, no labels, no guidance.

    `score` takes the velocity instead of evaluating it again: the two are one affine map apart.
    """

    velocity: Callable[[Latents, Scalar], Latents]  # (x, t) -> dx/dt
    score: Callable[[Latents, Latents, Scalar], Latents]  # (velocity, x, t) -> score of p_t at x
    # As `velocity`, with the guidance that is on at the end of the step; None: the same.
    velocity_at_end: Callable[[Latents, Scalar], Latents] | None = None
    # (x, t) -> the noise in x, and where the log variance of a step lies (`NetOutput.variance`), by
    # one evaluation; for samplers that take the steps of a process.
    noise_and_variance: Callable[[Latents, Scalar], tuple[Latents, Latents | None]] | None = None
    # Time -> alpha, sigma and their derivatives (`diffusion.process.Coefficients`).
    coefficients: Callable[[Scalar], Any] | None = None
    # sigma / alpha -> its time, at most the first one of sampling.
    time_of_ratio: Callable[[Scalar], Scalar] | None = None
    # (step of the grid, what the step before left) -> the field of that step; None: this one serves
    # all steps. What the first step finds is zeros in the shape of the latents.
    of_step: Callable[[Array, Latents], Field] | None = None
    # What this step leaves to the next, asked once it is taken; None: what was left to it.
    left: Callable[[], Latents] | None = None


@runtime_checkable
class Source(Protocol):
    """A data set with random access; shape and classes let configs be checked early."""

    stored_shape: tuple[int, ...]
    stored_dtype: Any  # of numpy
    num_classes: int

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> dict[str, Any]:
        """{'stored': [n, *stored_shape], 'label': int32 [n]} as numpy arrays."""
        ...

    def held_out(self) -> Source | None:
        """Real examples that are not trained on; None where there are none."""
        ...


@runtime_checkable
class Encoded(Source, Protocol):
    """A source of what an autoencoder made of images."""

    codec: str  # the name of the only codec that can read it

    def record(self) -> Any:
        """The `data.record.Record` of how it was made; None where nothing was written down."""
        ...


@runtime_checkable
class Codec(Protocol):
    """stored -> latents -> 8-bit images. Latent statistics live here.

    Weights of an autoencoder are an argument: as constants of a compiled program they would be
    copied into each.
    """

    rounding: str  # the rule from decoded images to 8 bits, as results name it

    def latent_shape(self, stored_shape: tuple[int, ...]) -> tuple[int, int, int]: ...

    def encoder_weights(self, stored_shape: tuple[int, ...]) -> Params:
        """Parameters of `latent`; {} where latents are stored already."""
        ...

    def latent(
        self, stored: Array, key: Key, weights: Params, mirrored: Bool[Array, "b"] | None = None
    ) -> Latents:
        """Latents of stored examples [b, ...], as training sees them.

        `mirrored` says of each whether it is seen as its mirror image; None leaves it to the codec.
        """
        ...

    def turned(self, key: Key, rows: int) -> Bool[Array, "b"]:
        """The examples that `latent` sees as mirror images under this key, where it may choose."""
        ...

    def decoder_weights(self) -> Params:
        """Parameters of `decode`."""
        ...

    def decode(self, x: Latents, weights: Params) -> Images: ...
