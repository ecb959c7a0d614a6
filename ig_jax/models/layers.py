"""Building blocks of diffusion transformers: initialisers, attention, MLP, modulation, final layer.

Parameters are float32. Matrix products run in the compute type that a layer is given; norms,
softmax and whatever feeds them stay in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ig_jax.types import Tokens

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


def modulate(x: Tokens, shift: Float[Array, "b d"], scale: Float[Array, "b d"]) -> Tokens:
    """x (1 + scale) + shift, the same for every token (adaLN: DiT, arXiv 2212.09748)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def layer_norm(hidden_size: int, *, affine: bool, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm that computes in float32; two-pass variance, because E[x^2] - E[x]^2 cancels."""
    return nnx.LayerNorm(
        hidden_size,
        use_scale=affine,
        use_bias=affine,
        epsilon=epsilon,
        use_fast_variance=False,
        dtype=jnp.float32,
        rngs=rngs,
    )


def attend(q: Array, k: Array, v: Array) -> Array:
    """Scaled dot-product attention of [b, n, heads, head_dim], softmax in float32.

    A GPU computing in half precision gets cuDNN's fused kernel; everything else XLA's, which is as
    fast at the 256 tokens of a 256-pixel image. `implementation=None` would never choose cuDNN.
    """
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fused = half and q.shape[-1] % 8 == 0 and jax.default_backend() == "gpu"
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if fused else "xla")


class Attention(nnx.Module):
    """Multi-head self-attention; optional affine LayerNorm (eps 1e-5) on each head's q and k."""

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool, dtype, rngs: nnx.Rngs):
        head_dim = hidden_size // num_heads
        # (3, heads, head_dim) as axes of their own, so that heads can be split over devices.
        self.qkv = nnx.LinearGeneral(
            hidden_size, (3, num_heads, head_dim), kernel_init=xavier, dtype=dtype, rngs=rngs
        )
        self.proj = nnx.LinearGeneral(
            (num_heads, head_dim),
            hidden_size,
            axis=(-2, -1),
            kernel_init=xavier,
            dtype=dtype,
            rngs=rngs,
        )
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_norm = layer_norm(head_dim, affine=True, epsilon=1e-5, rngs=rngs)
            self.k_norm = layer_norm(head_dim, affine=True, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: Tokens) -> Tokens:
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)
        if self.qk_norm:
            q, k = self.q_norm(q).astype(v.dtype), self.k_norm(k).astype(v.dtype)
        return self.proj(attend(q, k, v))


class Mlp(nnx.Module):
    """hidden_size -> hidden -> hidden_size with the tanh-approximated GELU."""

    def __init__(self, hidden_size: int, hidden: int, *, dtype, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(hidden_size, hidden, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, hidden_size, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: Tokens) -> Tokens:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=True))


class Block(nnx.Module):
    """adaLN-Zero transformer block: shift, scale, gate for attention, then for the MLP."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: bool,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.norm = layer_norm(hidden_size, affine=False, epsilon=1e-6, rngs=rngs)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), dtype=dtype, rngs=rngs)
        self.modulation = nnx.Linear(
            hidden_size, 6 * hidden_size, kernel_init=zeros, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Tokens, c: Float[Array, "b d"]) -> Tokens:
        modulation = jnp.split(self.modulation(nnx.silu(c)), 6, axis=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x = x + gate_a[:, None] * self.attn(modulate(self.norm(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm(x), shift_m, scale_m))


class FinalLayer(nnx.Module):
    """Tokens -> p*p*c values each: norm, modulate, linear. Both matrices start at zero."""

    def __init__(self, hidden_size: int, features: int, *, dtype, rngs: nnx.Rngs):
        self.norm = layer_norm(hidden_size, affine=False, epsilon=1e-6, rngs=rngs)
        self.modulation = nnx.Linear(
            hidden_size, 2 * hidden_size, kernel_init=zeros, dtype=dtype, rngs=rngs
        )
        self.linear = nnx.Linear(hidden_size, features, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x: Tokens, c: Float[Array, "b d"]) -> Float[Array, "b n f"]:
        shift, scale = jnp.split(self.modulation(nnx.silu(c)), 2, axis=-1)
        return self.linear(modulate(self.norm(x), shift, scale))
