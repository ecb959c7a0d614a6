"""The same training step in plain PyTorch beside ours, in turns, in one process on one device.

  python benchmarks/torch_peer.py [--config=configs/sit_xl.py] [--batch=64] [--compile]
  python benchmarks/torch_peer.py --depth=4 --hidden_size=256 --batch=8 --calls=1    # on a CPU

Needs PyTorch, which nothing else here does. The peer is a SiT with its early heads, written the
usual way: adaLN-Zero blocks, scaled_dot_product_attention, autocast to the config's type with
float32 weights, clipping, AdamW (fused on a GPU) and one average. It starts from our initial
weights and latents, and makes a step of the same kind: noise, times and dropped labels, forward,
backward, update, average. --compile gives its loss to torch.compile. It recomputes nothing in the
backward pass, whatever --remat says of ours.

Both have the device to themselves while they are timed, but both keep their memory. So JAX is told
not to take most of a GPU's beforehand.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np

from benchmarks import measuring
from benchmarks.measuring import Seconds
from benchmarks.train import Stepping, examples, noised
from ig_jax import pytree
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.models.embed import MAX_PERIOD, NUM_TIME_FEATURES
from ig_jax.training import step
from ig_jax.training.step import Noised

try:
    import torch
    import torch.nn.functional as F
except ImportError:  # told by `main`
    torch = F = None

MISSING = (
    "PyTorch is not installed: it is what this benchmark compares with; install it with "
    "`pip install torch`, for the device that jax uses"
)
Weights = Mapping[str, Any]  # dotted name -> tensor
OURS, PEER = "ig_jax", "PyTorch"


def matrix(path: str, leaf: np.ndarray) -> np.ndarray:
    """A parameter as torch.nn.functional wants it: matrices (out, in), convolutions OIHW."""
    if path.endswith("x_embedder.proj.kernel"):
        return leaf.transpose(3, 2, 0, 1)
    if path.endswith("attn.qkv.kernel"):
        return leaf.reshape(leaf.shape[0], -1).T
    if path.endswith("attn.proj.kernel"):
        return leaf.reshape(-1, leaf.shape[-1]).T
    if path.endswith("attn.qkv.bias"):
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


@dataclass(frozen=True)
class PeerSit:
    """A SiT on latents [b, c, h, w]; its weights are an argument, named as `from_ours` does."""

    depth: int
    num_heads: int
    patch_size: int
    readouts: tuple[int, ...]
    time_scale: float

    def linear(self, w: Weights, name: str, x: Any) -> Any:
        return F.linear(x, w[f"{name}.kernel"], w[f"{name}.bias"])

    def modulated(self, x: Any, shift: Any, scale: Any) -> Any:
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
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

    def attention(self, w: Weights, name: str, x: Any) -> Any:
        b, n, d = x.shape
        qkv = self.linear(w, f"{name}.qkv", x).view(b, n, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.linear(w, f"{name}.proj", mixed.transpose(1, 2).reshape(b, n, d))

    def block(self, w: Weights, name: str, x: Any, c: Any) -> Any:
        six = self.linear(w, f"{name}.modulation", c).chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
        mixed = self.attention(w, f"{name}.attn", self.modulated(x, shift_a, scale_a))
        x = x + gate_a[:, None] * mixed
        hidden = self.linear(w, f"{name}.mlp.fc1", self.modulated(x, shift_m, scale_m))
        out = self.linear(w, f"{name}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
        return x + gate_m[:, None] * out

    def head(self, w: Weights, name: str, x: Any, c: Any) -> Any:
        """Tokens -> latents [b, c, h, w]."""
        shift, scale = self.linear(w, f"{name}.modulation", c).chunk(2, dim=-1)
        x = self.linear(w, f"{name}.linear", self.modulated(x, shift, scale))
        p, side = self.patch_size, round(x.shape[1] ** 0.5)
        x = x.view(len(x), side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(*x.shape[:2], side * p, side * p)

    def __call__(self, w: Weights, x: Any, t: Any, y: Any) -> list[Any]:
        """Predictions: the final one, then those of the early heads."""
        kernel, bias = w["x_embedder.proj.kernel"], w["x_embedder.proj.bias"]
        x = F.conv2d(x, kernel, bias, stride=self.patch_size).flatten(2).transpose(1, 2)
        x, c, early = x + w["pos_embed"], self.condition(w, t, y), []
        for i in range(self.depth):
            x = self.block(w, f"blocks.{i}", x, c)
            if i + 1 in self.readouts:
                early.append(self.head(w, f"heads.depth_{i + 1}", x, c))
        return [self.head(w, "final_layer", x, c), *early]


def peer_of(exp: Experiment) -> PeerSit:
    """The same network, if it is a plain SiT that AdamW trains.

    Raises:
      UserError: it is another.
    """
    c, raw = exp.config, exp.config.raw
    process = raw["process"]
    plain = [
        raw["model"]["name"] == "sit" and not c.model.qk_norm,
        set(c.objective.terms) in ({"flow"}, {"flow", "internal_guidance"}),
        (process["name"], process.get("path")) == ("flow", "linear"),
        process.get("prediction") == "velocity",
        raw["optim"]["name"] == "adamw",
    ]
    if not all(plain):
        raise UserError(
            "--config: the PyTorch peer is a SiT without qk_norm on the linear path, trained by "
            "AdamW on the terms flow and internal_guidance; choose configs/sit_xl.py or one like it"
        )
    if exp.mesh.size > 1:
        raise UserError("--devices: the PyTorch peer has one device; say --devices=1")
    m = c.model
    return PeerSit(m.depth, m.num_heads, m.patch_size, m.readouts, m.time_scale)


class Peer:
    """Training of a `PeerSit`; each call is a step on the same examples."""

    def __init__(self, exp: Experiment, params: Any, batch: Noised, *, compiled: bool):
        self.config, self.net = exp.config, peer_of(exp)
        self.null_class = exp.num_classes
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.weights = from_ours(params, self.device)
        self.average = {name: w.detach().clone() for name, w in self.weights.items()}
        x0 = np.array(batch.x0.transpose(0, 3, 1, 2))
        self.x0 = torch.tensor(x0, device=self.device)
        self.labels = torch.tensor(np.array(batch.labels), dtype=torch.int64, device=self.device)
        self.trained = [w for w in self.weights.values() if w.requires_grad]
        o = self.config.optim
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=o.learning_rate,
            betas=(o.b1, o.b2),
            eps=o.eps,
            weight_decay=o.weight_decay,
            fused=self.device == "cuda",
        )
        self._loss = torch.compile(self.loss) if compiled else self.loss

    def loss(self, x0: Any, noise: Any, t: Any, y: Any) -> Any:
        """The weighted sum of the mean squared errors of all heads."""
        half = self.config.model.dtype == "bfloat16"
        wide = t[:, None, None, None]
        with torch.autocast(self.device, torch.bfloat16, enabled=half):
            predictions = self.net(self.weights, (1 - wide) * x0 + wide * noise, t, y)
        terms = self.config.objective.terms
        final, *early = [torch.mean((p.float() - (noise - x0)) ** 2) for p in predictions]
        guided = terms["internal_guidance"].weight if "internal_guidance" in terms else 0
        return terms["flow"].weight * final + guided * sum(early)

    def __call__(self) -> None:
        n = len(self.x0)
        noise = torch.randn_like(self.x0)
        t = torch.rand(n, device=self.device)
        dropped = torch.rand(n, device=self.device) < self.config.objective.label_drop
        y = torch.where(dropped, self.null_class, self.labels)
        self._loss(self.x0, noise, t, y).backward()
        if self.config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = self.config.train.ema_decays[0]
        with torch.no_grad():
            pairs = list(self.average.values()), list(self.weights.values())
            torch._foreach_lerp_(*pairs, 1 - decay)

    def window(self, calls: int) -> float:
        """Seconds a step, of several one after the other."""

        def several() -> None:
            for _ in range(calls):
                self()
            if self.device == "cuda":
                torch.cuda.synchronize()

        return measuring.window(several, 1) / calls


def in_turns(ways: Mapping[str, Callable[[int], float]], flags: Any) -> dict[str, Seconds]:
    """Times of ways to do the same, window by window; what each does first is left out."""
    for way in ways.values():
        way(1)
    rounds = [{n: way(flags.calls) for n, way in ways.items()} for _ in range(flags.windows)]
    return {name: measuring.of([each[name] for each in rounds]) for name in ways}


def measure(exp: Experiment, flags: argparse.Namespace) -> dict[str, Any]:
    batches, size = examples(exp), exp.config.train.batch_size
    state = step.init_state(exp)
    encoder = jax.device_put(exp.encoder_weights)
    first = {name: value[0] for name, value in batches.items()}
    peer = Peer(exp, state.params, noised(exp)(state.step, first, encoder), compiled=flags.compile)
    ours = Stepping(step.make_dispatch(exp), state, (batches, encoder))
    steps = exp.config.train.steps_per_dispatch
    took = in_turns(
        {OURS: lambda calls: measuring.window(ours, calls) / steps, PEER: peer.window}, flags
    )
    once = exp.gradient_flops(size)
    return {
        "batch": size,
        "torch": {"version": torch.__version__, "compiled": flags.compile},
        "parameters": {
            OURS: pytree.count(exp.abstract_params),
            PEER: sum(w.numel() for w in peer.weights.values()),
        },
        "steps": {
            name: {
                "seconds_per_step": s._asdict(),
                "images_per_second": size / s.median,
                "model_tflops": once / s.median / 1e12,
            }
            for name, s in took.items()
        },
        "ours_over_peer": took[PEER].median / took[OURS].median,
    }


def table(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", "images/s", "s/step", "spread", "TFLOP/s", "times PyTorch"]]
    slowest = found["steps"][PEER]["seconds_per_step"]["median"]
    for name, each in found["steps"].items():
        took = Seconds(**each["seconds_per_step"])
        told = f"{name} {found['torch']['version']}" if name == PEER else name
        told += ", compiled" * (name == PEER and found["torch"]["compiled"])
        row = [told, f"{each['images_per_second']:.4g}", f"{took.median:.4g}", took.spread]
        rows.append([*row, f"{each['model_tflops']:.3g}", f"{slowest / took.median:.2f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    measuring.add_flags(parser)
    parser.add_argument("--compile", action="store_true", help="torch.compile the peer's loss")
    flags = parser.parse_args()
    with measuring.mistakes_told():
        if torch is None:
            raise UserError(MISSING)
        if jax.default_backend() == "gpu" and not torch.cuda.is_available():
            raise UserError("PyTorch sees no GPU, but jax does: install its build for CUDA")
        exp = measuring.load(flags.config, measuring.changes(flags), flags.devices)
        record = {"what": "torch_peer", **measuring.circumstances(exp, flags)}
        record |= measure(exp, flags)
    measuring.tell(record, table(record), json_file=flags.json)


if __name__ == "__main__":
    main()
