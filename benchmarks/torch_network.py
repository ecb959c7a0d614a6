"""A SiT or a LightningDiT with its early heads in plain PyTorch, on our weights.

Written the usual way: adaLN-Zero blocks, scaled_dot_product_attention, one Python loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ig_jax import pytree
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.models import layers
from ig_jax.models.embed import MAX_PERIOD, NUM_TIME_FEATURES
from ig_jax.optim import matrix_axes

try:
    import torch
    import torch.nn.functional as F
except ImportError:  # told by torch_peer.py
    torch = F = None

Weights = Mapping[str, Any]  # dotted name -> tensor
EPSILON = 1e-6  # of every norm


def matrix(path: str, leaf: np.ndarray) -> np.ndarray:
    """A parameter as torch.nn.functional wants it: matrices (out, in), convolutions OIHW."""
    if path.endswith("x_embedder.proj.kernel"):
        return leaf.transpose(3, 2, 0, 1)
    if path.endswith(("attn.qkv.kernel", "mlp.w12.kernel")):
        return leaf.reshape(leaf.shape[0], -1).T
    if path.endswith("attn.proj.kernel"):
        return leaf.reshape(-1, leaf.shape[-1]).T
    if path.endswith(("attn.qkv.bias", "mlp.w12.bias")):
        return leaf.reshape(-1)
    return leaf.T if path.endswith("kernel") else leaf


def from_ours(params: Any, device: str) -> Weights:
    """Tensors of our parameters, the stack of the blocks taken apart."""
    named: dict[str, np.ndarray] = {}
    for path, leaf in pytree.flatten(jax.device_get(params)).items():
        if path.startswith("blocks."):
            rest = path.removeprefix("blocks.")
            named |= {f"blocks.{i}.{rest}": matrix(path, each) for i, each in enumerate(leaf)}
        else:
            named[path] = matrix(path, leaf)
    return {
        path: torch.tensor(np.array(leaf), device=device, requires_grad=path != "pos_embed")
        for path, leaf in named.items()
    }


def matrices(params: Any) -> set[str]:
    """Names, as in `from_ours`, of what Muon trains; the patch convolution is left to AdamW."""
    found = set()
    for path, leaf in pytree.flatten(params).items():
        if matrix_axes.matrix_of(path, leaf.shape) and not path.startswith("x_embedder"):
            rest = path.removeprefix("blocks.")
            stack = path.startswith("blocks.")
            found |= {f"blocks.{i}.{rest}" for i in range(len(leaf))} if stack else {path}
    return found


@dataclass(frozen=True)
class PeerNetwork:
    """Predictions for latents [b, c, h, w]; its weights, those of `from_ours`, are an argument."""

    depth: int
    num_heads: int
    patch_size: int
    readouts: tuple[int, ...]
    time_scale: float
    rotation: Any  # (cosines, sines) [tokens, 1, head_dim / 2]; None: no rotations
    rms_norm: bool
    swiglu: bool
    reversed: bool  # time runs from noise to data, and the prediction with it

    def linear(self, w: Weights, name: str, x: Any) -> Any:
        return F.linear(x, w[f"{name}.kernel"], w[f"{name}.bias"])

    def modulated(self, w: Weights, norm: str, x: Any, shift: Any, scale: Any) -> Any:
        if self.rms_norm:
            normed = F.rms_norm(x, x.shape[-1:], w[f"{norm}.scale"], eps=EPSILON)
        else:
            normed = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
        return normed * (1 + scale[:, None]) + shift[:, None]

    def condition(self, w: Weights, t: Any, y: Any) -> Any:
        """silu of the time's and the label's vectors, added: what every modulation reads."""
        half = NUM_TIME_FEATURES // 2
        steps = torch.arange(half, device=t.device, dtype=torch.float32) / half
        angles = (t * self.time_scale)[:, None] * torch.exp(-np.log(MAX_PERIOD) * steps)
        features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        hidden = F.silu(self.linear(w, "t_embedder.fc1", features))
        table = w["y_embedder.table.embedding"]
        return F.silu(self.linear(w, "t_embedder.fc2", hidden) + F.embedding(y, table))

    def rotated(self, x: Any) -> Any:
        """Queries or keys [b, n, heads, head_dim], neighbouring channels turned together."""
        cos, sin = self.rotation
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    def attention(self, w: Weights, name: str, x: Any) -> Any:
        b, n, d = x.shape
        q, k, v = self.linear(w, f"{name}.qkv", x).view(b, n, 3, self.num_heads, -1).unbind(2)
        if self.rotation is not None:
            q, k = self.rotated(q).to(v.dtype), self.rotated(k).to(v.dtype)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.linear(w, f"{name}.proj", mixed.transpose(1, 2).reshape(b, n, d))

    def mlp(self, w: Weights, name: str, x: Any) -> Any:
        if self.swiglu:
            gate, value = self.linear(w, f"{name}.w12", x).chunk(2, dim=-1)
            return self.linear(w, f"{name}.w3", F.silu(gate) * value)
        hidden = self.linear(w, f"{name}.fc1", x)
        return self.linear(w, f"{name}.fc2", F.gelu(hidden, approximate="tanh"))

    def block(self, w: Weights, name: str, x: Any, c: Any) -> Any:
        six = self.linear(w, f"{name}.modulation", c).chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
        normed = self.modulated(w, f"{name}.norm1", x, shift_a, scale_a)
        x = x + gate_a[:, None] * self.attention(w, f"{name}.attn", normed)
        normed = self.modulated(w, f"{name}.norm2", x, shift_m, scale_m)
        return x + gate_m[:, None] * self.mlp(w, f"{name}.mlp", normed)

    def head(self, w: Weights, name: str, x: Any, c: Any) -> Any:
        """Tokens -> latents [b, c, h, w]."""
        shift, scale = self.linear(w, f"{name}.modulation", c).chunk(2, dim=-1)
        x = self.linear(w, f"{name}.linear", self.modulated(w, f"{name}.norm", x, shift, scale))
        p, side = self.patch_size, round(x.shape[1] ** 0.5)
        x = x.view(len(x), side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(*x.shape[:2], side * p, side * p)

    def __call__(self, w: Weights, x: Any, t: Any, y: Any) -> list[Any]:
        """Predictions: the final one, then those of the early heads."""
        t = 1 - t if self.reversed else t
        kernel, bias = w["x_embedder.proj.kernel"], w["x_embedder.proj.bias"]
        x = F.conv2d(x, kernel, bias, stride=self.patch_size).flatten(2).transpose(1, 2)
        x, c, early = x + w["pos_embed"], self.condition(w, t, y), []
        for i in range(self.depth):
            x = self.block(w, f"blocks.{i}", x, c)
            if i + 1 in self.readouts:
                early.append(self.head(w, f"heads.depth_{i + 1}", x, c))
        found = [self.head(w, "final_layer", x, c), *early]
        return [-prediction for prediction in found] if self.reversed else found


def peer_of(exp: Experiment, device: str) -> PeerNetwork:
    """The same network.

    Raises:
      UserError: it is another than a plain SiT or a LightningDiT of velocities.
    """
    m, process = exp.config.model, exp.config.raw["process"]
    options = m.options
    plain = [
        exp.config.raw["model"]["name"] in ("sit", "lightningdit"),
        m.self_conditioning is None and not m.qk_norm and options.shift,
        (process["name"], process.get("path")) == ("flow", "linear"),
        process.get("prediction") == "velocity",
    ]
    if not all(plain):
        raise UserError(
            "--config: the PyTorch peer is a SiT or a LightningDiT with shift, without qk_norm and "
            "self-conditioning, that predicts velocities on the linear path; choose "
            "configs/sit_xl.py or configs/lightningdit_xl.py, or one like them"
        )
    if exp.mesh.size > 1:
        raise UserError("--devices: the PyTorch peer has one device; say --devices=1")
    rotation = None
    if options.rotary:
        side, head_dim = exp.net.latent_shape[0] // m.patch_size, m.hidden_size // m.num_heads
        angles = torch.tensor(layers.rotation_angles(side, head_dim), device=device)[:, None]
        rotation = torch.cos(angles).float(), torch.sin(angles).float()
    return PeerNetwork(
        *(m.depth, m.num_heads, m.patch_size, m.readouts, m.time_scale),
        rotation=rotation,
        rms_norm=options.rms_norm,
        swiglu=options.swiglu,
        reversed=exp.config.raw["model"]["name"] == "lightningdit",
    )
