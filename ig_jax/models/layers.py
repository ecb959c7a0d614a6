"""Building blocks of diffusion transformers: initialisers, attention, MLP, modulation, final layer.

Parameters are float32. Matrix products run in the compute type that a layer is given; norms,
rotations, softmax and whatever feeds them stay in float32. SiT, DiT and LightningDiT share one
block; `BlockOptions` says in what theirs differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from ig_jax.models import axes
from ig_jax.models.axes import CONDITION, EMBED, HEADS, MLP
from ig_jax.types import TokenGroups, Tokens

xavier = nnx.initializers.xavier_uniform()
normal_002 = nnx.initializers.normal(0.02)
zeros = nnx.initializers.zeros_init()


def xavier_flat(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Xavier-uniform of a convolution kernel [p, p, c, d] seen as a matrix [p*p*c, d].

    The usual fan-out of a convolution counts the window too; the reference flattens first.
    """
    *window, hidden_size = shape
    rows = 1
    for size in window:
        rows *= size
    return xavier(key, (rows, hidden_size), dtype).reshape(shape)


@dataclass(frozen=True)
class BlockOptions:
    """In what the blocks of one family differ from those of another."""

    rms_norm: bool  # RMSNorm with a learned scale; otherwise LayerNorm without parameters
    swiglu: bool  # gated SiLU; otherwise GELU
    rotary: bool  # turn queries and keys by their token's row and column
    shift: bool  # modulation shifts as well as it scales and gates
    qk_norm: bool  # normalise every head's queries and keys


def modulate(
    x: Tokens, shift: Float[Array, "b #n d"] | None, scale: Float[Array, "b #n d"]
) -> Tokens:
    """x (1 + scale) + shift (adaLN: DiT, arXiv 2212.09748), of each token or of all alike."""
    x = x * (1 + scale)
    return x if shift is None else x + shift


def of_tokens(vectors: Float[Array, "b *g d"], groups: TokenGroups | None) -> Float[Array, "b n d"]:
    """The vector of each token's group; [b, 1, d] where all tokens of a sample share one.

    A chain of selections, which XLA computes where they are used: a gather would be kept in memory.
    """
    if vectors.ndim == 2:
        return vectors[:, None]
    chosen = vectors[:, :1]
    for group in range(1, vectors.shape[1]):
        mine = groups.condition[..., None] == group
        chosen = jnp.where(mine, vectors[:, group, None], chosen)
    return chosen


def layer_norm(
    size: int, axis: str, *, affine: bool, epsilon: float, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """LayerNorm that computes in float32; two-pass variance, because E[x^2] - E[x]^2 cancels."""
    return nnx.LayerNorm(
        size,
        use_scale=affine,
        use_bias=affine,
        epsilon=epsilon,
        use_fast_variance=False,
        dtype=jnp.float32,
        scale_metadata=axes.axis_metadata(axis),
        bias_metadata=axes.axis_metadata(axis),
        rngs=rngs,
    )


def rms_norm(size: int, axis: str, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm that computes in float32; eps 1e-6."""
    return nnx.RMSNorm(
        size, epsilon=1e-6, dtype=jnp.float32, scale_metadata=axes.axis_metadata(axis), rngs=rngs
    )


def norm(hidden_size: int, options: BlockOptions, rngs: nnx.Rngs) -> nnx.Module:
    """The norm before attention, MLP and final layer; eps 1e-6."""
    if options.rms_norm:
        return rms_norm(hidden_size, EMBED, rngs=rngs)
    return layer_norm(hidden_size, EMBED, affine=False, epsilon=1e-6, rngs=rngs)


def head_norm(head_dim: int, options: BlockOptions, rngs: nnx.Rngs) -> nnx.Module:
    """The norm of one head's queries or keys: RMSNorm eps 1e-6, or affine LayerNorm eps 1e-5."""
    if options.rms_norm:
        return rms_norm(head_dim, "head_dim", rngs=rngs)
    return layer_norm(head_dim, "head_dim", affine=True, epsilon=1e-5, rngs=rngs)


def rotation_angles(side: int, head_dim: int) -> np.ndarray:
    """Angle of every token and pair of channels, float64 [side**2, head_dim / 2].

    The first half of the pairs turns with the token's row, the second with its column, pair i of a
    half by 10000^(-2i / (head_dim / 2)) a step (RoPE, arXiv 2104.09864, on two axes).
    """
    frequencies = 10_000.0 ** (-np.arange(head_dim // 4, dtype=np.float64) / (head_dim / 4))
    rows, columns = np.divmod(np.arange(side**2), side)
    return np.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], axis=1)


@lru_cache(maxsize=4)  # every block asks twice, in every tracing
def _rotations(side: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of `rotation_angles`, float32 [1, side**2, 1, head_dim / 2]."""
    angles = rotation_angles(side, head_dim)[None, :, None]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Float[Array, "b n h d"]) -> Float[Array, "b n h d"]:
    """Turns each pair of neighbouring channels (2i, 2i + 1) by its token's angle; float32.

    The tokens are those of a square grid, row by row.
    """
    n, head_dim = x.shape[1], x.shape[-1]
    cos, sin = (jnp.asarray(x) for x in _rotations(math.isqrt(n), head_dim))
    even, odd = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2), -1, 0)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape)


def attend(q: Array, k: Array, v: Array, groups: TokenGroups | None = None) -> Array:
    """Scaled dot-product attention of [b, n, heads, head_dim], softmax in float32.

    With groups that attend apart, a token sees those of its own alone.

    A GPU computing in half precision gets cuDNN's fused kernel; a CPU computing in float32
    `attend_on_cpu`; everything else XLA's, which is as fast at the 256 tokens of a 256-pixel image.
    `implementation=None` would never choose cuDNN.
    """
    mask, backend = None, jax.default_backend()
    if groups is not None and groups.attention is not None:
        ids = groups.attention
        mask = (ids[:, :, None] == ids[:, None, :])[:, None]
    if backend == "cpu" and q.dtype == jnp.float32:
        return attend_on_cpu(q, k, v, mask)
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    kernel = "cudnn" if half and q.shape[-1] % 8 == 0 and backend == "gpu" else "xla"
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=kernel)


def attend_on_cpu(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """`attend` of float32 in an order that suits a CPU; mask [b, 1, n, n], False is not seen.

    Heads come before tokens, so that each product is one of plain matrices; and the sum of the
    exponentials divides the result rather than every weight (FlashAttention, arXiv 2205.14135, does
    so too). XLA's own order copies the weights [b, heads, n, n] transposed.
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    # The largest one cancels, and so does its derivative.
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    seen = jnp.einsum("bhts,bhsd->bhtd", weights, v)
    return jnp.swapaxes(seen / total, 1, 2)


class Attention(nnx.Module):
    """Multi-head self-attention; optionally norms and rotations on queries and keys."""

    def __init__(
        self, hidden_size: int, num_heads: int, options: BlockOptions, *, dtype, rngs: nnx.Rngs
    ):
        head_dim = hidden_size // num_heads
        # (3, heads, head_dim) as axes of their own, so that heads can be split over devices.
        self.qkv = nnx.LinearGeneral(
            hidden_size,
            (3, num_heads, head_dim),
            kernel_init=xavier,
            dtype=dtype,
            rngs=rngs,
            **axes.linear_metadata((EMBED,), ("qkv", HEADS, "head_dim")),
        )
        self.proj = nnx.LinearGeneral(
            (num_heads, head_dim),
            hidden_size,
            axis=(-2, -1),
            kernel_init=xavier,
            dtype=dtype,
            rngs=rngs,
            **axes.linear_metadata((HEADS, "head_dim"), (EMBED,)),
        )
        self.options = options
        if options.qk_norm:
            self.q_norm = head_norm(head_dim, options, rngs)
            self.k_norm = head_norm(head_dim, options, rngs)

    def __call__(self, x: Tokens, groups: TokenGroups | None = None) -> Tokens:
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)
        if self.options.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.options.rotary:
            q, k = rotate(q), rotate(k)
        return self.proj(attend(q.astype(v.dtype), k.astype(v.dtype), v, groups))


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """The tanh-approximated GELU (arXiv 1606.08415, section 2).

    Its value is left in the type of x: so XLA lets a GPU's matrix product compute it as it ends.
    Its derivative is written out, in float32 and with another function than tanh: XLA would keep a
    tanh that the two share in memory, 2 to 3 % of a training step (benchmarks/NOTES.md).
    """
    return nnx.gelu(x, approximate=True)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """gelu(x) = x s(2u) with the logistic s and u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    (x,), (dx,) = primals, tangents
    wide, c = x.astype(jnp.float32), math.sqrt(2 / math.pi)
    s = 1 / (1 + jnp.exp(-2 * c * (wide + 0.044715 * wide**3)))
    slope = s + wide * s * (1 - s) * 2 * c * (1 + 3 * 0.044715 * wide**2)
    return gelu(x), (dx.astype(jnp.float32) * slope).astype(x.dtype)


class Mlp(nnx.Module):
    """hidden_size -> hidden -> hidden_size with the tanh-approximated GELU."""

    def __init__(self, hidden_size: int, hidden: int, *, dtype, rngs: nnx.Rngs):
        kinds = {"kernel_init": xavier, "dtype": dtype, "rngs": rngs}
        self.fc1 = nnx.Linear(
            hidden_size, hidden, **kinds, **axes.linear_metadata((EMBED,), (MLP,))
        )
        self.fc2 = nnx.Linear(
            hidden, hidden_size, **kinds, **axes.linear_metadata((MLP,), (EMBED,))
        )

    def __call__(self, x: Tokens) -> Tokens:
        return self.fc2(gelu(self.fc1(x)))


class SwiGlu(nnx.Module):
    """silu(a) * b of two linear maps to `hidden`, then back (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, hidden: int, *, dtype, rngs: nnx.Rngs):
        # One matrix of both maps; (2, hidden) as axes, so that `hidden` can be split.
        kinds = {"kernel_init": xavier, "dtype": dtype, "rngs": rngs}
        self.w12 = nnx.LinearGeneral(
            hidden_size, (2, hidden), **kinds, **axes.linear_metadata((EMBED,), ("gate", MLP))
        )
        self.w3 = nnx.Linear(hidden, hidden_size, **kinds, **axes.linear_metadata((MLP,), (EMBED,)))

    def __call__(self, x: Tokens) -> Tokens:
        # Two products. On a GPU XLA would transpose the result of one, for the backward pass.
        given = (x, self.w12.kernel[...], self.w12.bias[...])
        x, kernel, bias = (jnp.asarray(array, self.w12.dtype) for array in given)
        gate, value = (x @ kernel[:, i] + bias[i][None, None] for i in range(2))
        return self.w3(nnx.silu(gate) * value)


def mlp_width(hidden_size: int, ratio: float, options: BlockOptions) -> int:
    """Of a block. A gated MLP has three matrices instead of two, so 2/3 of the width."""
    hidden = hidden_size * ratio
    return int(2 / 3 * hidden) if options.swiglu else int(hidden)


def mlp(hidden_size: int, ratio: float, options: BlockOptions, *, dtype, rngs: nnx.Rngs):
    """The MLP of a block."""
    kind = SwiGlu if options.swiglu else Mlp
    width = mlp_width(hidden_size, ratio, options)
    return kind(hidden_size, width, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
    """adaLN-Zero transformer block: shift, scale, gate for attention, then for the MLP."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        options: BlockOptions,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.norm1 = norm(hidden_size, options, rngs)
        self.attn = Attention(hidden_size, num_heads, options, dtype=dtype, rngs=rngs)
        self.norm2 = norm(hidden_size, options, rngs)
        self.mlp = mlp(hidden_size, mlp_ratio, options, dtype=dtype, rngs=rngs)
        self.options = options
        self.modulation = nnx.Linear(
            hidden_size,
            (6 if options.shift else 4) * hidden_size,
            kernel_init=zeros,
            dtype=dtype,
            rngs=rngs,
            **axes.linear_metadata((CONDITION,), ("modulation",)),
        )

    def __call__(
        self, x: Tokens, c: Float[Array, "b *g d"], groups: TokenGroups | None = None
    ) -> Tokens:
        m = self.modulation(nnx.silu(c))
        parts = jnp.split(m, 6 if self.options.shift else 4, axis=-1)
        each = [of_tokens(part, groups) for part in parts]
        if self.options.shift:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = each
        else:
            scale_a, gate_a, scale_m, gate_m = each
            shift_a = shift_m = None
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a), groups)
        return x + gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nnx.Module):
    """Tokens -> p*p*c values each: norm, modulate, linear; both matrices start as `init` says."""

    def __init__(
        self,
        hidden_size: int,
        features: int,
        options: BlockOptions,
        init: nnx.Initializer,
        *,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.norm = norm(hidden_size, options, rngs)
        kinds = {"kernel_init": init, "dtype": dtype, "rngs": rngs}
        self.modulation = nnx.Linear(
            hidden_size,
            2 * hidden_size,
            **kinds,
            **axes.linear_metadata((CONDITION,), ("modulation",)),
        )
        self.linear = nnx.Linear(
            hidden_size, features, **kinds, **axes.linear_metadata((EMBED,), ("patch_values",))
        )

    def __call__(
        self, x: Tokens, c: Float[Array, "b *g d"], groups: TokenGroups | None = None
    ) -> Float[Array, "b n f"]:
        parts = jnp.split(self.modulation(nnx.silu(c)), 2, axis=-1)
        shift, scale = (of_tokens(part, groups) for part in parts)
        return self.linear(modulate(self.norm(x), shift, scale))
