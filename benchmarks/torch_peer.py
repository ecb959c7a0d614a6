"""The same training step, and the same sampler, in plain PyTorch beside ours, in turns.

  python benchmarks/torch_peer.py [--config=configs/sit_xl.py] [--batch=64] [--compile]
  python benchmarks/torch_peer.py --config=configs/lightningdit_xl.py --what=sample --steps=20
  python benchmarks/torch_peer.py --config=configs/sit_b.py --hidden_size=384 --num_heads=6 \\
      --batch=4 --dtype=float32 --remat=none --unroll=12 --calls=2    # SiT-S on a CPU

Needs PyTorch, which nothing else here does. The peer (torch_network.py) starts from our initial
weights and latents, with autocast to the config's type and float32 weights. A step is one of the
same kind: noise, times and dropped labels, forward, backward, clipping, AdamW (fused on a GPU), or
PyTorch's own Muon and AdamW, and one average. It recomputes nothing in the backward pass, whatever
--remat says of ours. --what=sample takes Euler's steps under the config's IG and CFG, conditional
and unconditional halves in one batch while CFG is on, as the published samplers do. --compile
gives its loss, or its network, to torch.compile.

One process, one device; the two take turns, window by window, and both keep their memory. So JAX is
told not to take most of a GPU's beforehand.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring, sample, torch_network
from benchmarks.measuring import Seconds
from benchmarks.torch_network import F, torch
from benchmarks.train import Stepping, examples, noised
from ig_jax import guidance, pytree
from ig_jax.errors import UserError
from ig_jax.experiment import Experiment
from ig_jax.samplers import SAMPLERS
from ig_jax.training import step
from ig_jax.training.step import Noised

MISSING = (
    "PyTorch is not installed: it is what this benchmark compares with; install it with "
    "`pip install torch`, for the device that jax uses"
)
OURS, PEER = "ig_jax", "PyTorch"
TERMS = {"flow", "internal_guidance", "cosine"}


def optimizers(exp: Experiment, weights: torch_network.Weights, device: str) -> list[Any]:
    """What the config trains with.

    Raises:
      UserError: PyTorch has no such optimizer.
    """
    o, muon = exp.config.optim, exp.config.raw["optim"]["name"] == "muon"
    trained = {name: w for name, w in weights.items() if w.requires_grad}
    if muon and not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"--config: trains with Muon, which PyTorch {torch.__version__} lacks; install 2.9 or "
            "newer, or choose a config with AdamW"
        )
    names = torch_network.matrices(exp.abstract_params) if muon else set()
    adam = {"lr": o.learning_rate, "betas": (o.b1, o.b2), "eps": o.eps, "fused": device == "cuda"}
    decay = 0.0 if muon else o.weight_decay
    rest = [w for name, w in trained.items() if name not in names]
    found = [torch.optim.AdamW(rest, weight_decay=decay, **adam)]
    if names:
        kinds = {"momentum": o.momentum, "ns_steps": o.ns_steps, "weight_decay": o.weight_decay}
        of_matrices = [trained[name] for name in sorted(names)]
        found.append(
            torch.optim.Muon(
                of_matrices, lr=o.learning_rate, adjust_lr_fn="match_rms_adamw", **kinds
            )
        )
    return found


class Peer:
    """Training of a `PeerNetwork`; each call is a step on the same examples."""

    def __init__(self, exp: Experiment, params: Any, batch: Noised, *, compiled: bool):
        if not set(exp.config.objective.terms) <= TERMS:
            raise UserError(
                "--config: the PyTorch peer knows the terms flow, internal_guidance and cosine; "
                "choose configs/sit_xl.py or one like it"
            )
        self.config = exp.config
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.net = torch_network.peer_of(exp, self.device)
        self.null_class = exp.num_classes
        self.weights = torch_network.from_ours(params, self.device)
        self.average = {name: w.detach().clone() for name, w in self.weights.items()}
        x0 = np.array(batch.x0.transpose(0, 3, 1, 2))
        self.x0 = torch.tensor(x0, device=self.device)
        self.labels = torch.tensor(np.array(batch.labels), dtype=torch.int64, device=self.device)
        self.trained = [w for w in self.weights.values() if w.requires_grad]
        self.optimizers = optimizers(exp, self.weights, self.device)
        self._loss = torch.compile(self.loss) if compiled else self.loss

    def loss(self, x0: Any, noise: Any, t: Any, y: Any) -> Any:
        """The weighted sum of the terms."""
        half = self.config.model.dtype == "bfloat16"
        wide, target = t[:, None, None, None], noise - x0
        with torch.autocast(self.device, torch.bfloat16, enabled=half):
            predictions = self.net(self.weights, (1 - wide) * x0 + wide * noise, t, y)
        final, *early = [p.float() for p in predictions]
        terms = self.config.objective.terms
        loss = terms["flow"].weight * torch.mean((final - target) ** 2)
        if "cosine" in terms:
            loss += terms["cosine"].weight * torch.mean(1 - F.cosine_similarity(final, target))
        if "internal_guidance" in terms:
            errors = [torch.mean((p - target) ** 2) for p in early]
            loss += terms["internal_guidance"].weight * sum(errors)
        return loss

    def __call__(self) -> None:
        n = len(self.x0)
        noise = torch.randn_like(self.x0)
        t = torch.rand(n, device=self.device)
        dropped = torch.rand(n, device=self.device) < self.config.objective.label_drop
        y = torch.where(dropped, self.null_class, self.labels)
        self._loss(self.x0, noise, t, y).backward()
        if self.config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = self.config.train.ema_decays[0]
        with torch.no_grad():
            pairs = list(self.average.values()), list(self.weights.values())
            torch._foreach_lerp_(*pairs, 1 - decay)

    def window(self, calls: int) -> float:
        """Seconds a step, of several one after the other."""
        return timed(self, calls, self.device)


class PeerSampler:
    """Euler's method with a `PeerNetwork` under the config's IG and CFG."""

    def __init__(self, exp: Experiment, params: Any, grid: tuple[float, ...], *, compiled: bool):
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.weights = torch_network.from_ours(params, self.device)
        net = torch_network.peer_of(exp, self.device)
        self.net = torch.compile(net.__call__) if compiled else net
        self.half = exp.config.model.dtype == "bfloat16"
        self.ig, self.cfg = exp.config.sample.ig, exp.config.sample.cfg
        self.null_class, self.grid = exp.num_classes, grid
        self.readout = exp.config.readout and exp.config.model.readouts.index(exp.config.readout)

    def velocity(self, x: Any, t: float, y: Any) -> Any:
        both = self.cfg.on(t)
        if both:
            x, y = torch.cat([x, x]), torch.cat([y, torch.full_like(y, self.null_class)])
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            times = torch.full((len(x),), t, device=self.device)
            final, *early = [p.float() for p in self.net(self.weights, x, times, y)]
        if self.ig.on(t):
            worse = early[self.readout]
            final = worse + self.ig.scale * (final - worse)
        if both:
            labelled, null = final.chunk(2)
            final = null + self.cfg.scale * (labelled - null)
        return final

    def __call__(self, x: Any, y: Any) -> Any:
        with torch.no_grad():
            for t, t_next in zip(self.grid, self.grid[1:], strict=False):
                x = x + (t_next - t) * self.velocity(x, t, y)
        return x


def timed(call: Callable[[], Any], calls: int, device: str) -> float:
    """Seconds a call of PyTorch's, of several one after the other."""

    def several() -> None:
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    return measuring.window(several, 1) / calls


def in_turns(ways: Mapping[str, Callable[[int], float]], flags: Any) -> dict[str, list[float]]:
    """Times of ways to do the same, window by window; what each does first is left out."""
    for way in ways.values():
        way(1)
    rounds = [{n: way(flags.calls) for n, way in ways.items()} for _ in range(flags.windows)]
    return {name: [each[name] for each in rounds] for name in ways}


def compared(took: Mapping[str, list[float]], images: int, flops: int) -> dict[str, Any]:
    """The record of both; the ratios are of the windows of a round."""
    ratios = [peer / ours for ours, peer in zip(took[OURS], took[PEER], strict=True)]
    seconds = {name: measuring.of(each) for name, each in took.items()}
    return {
        "batch": images,
        "torch": torch.__version__,
        "runs": {
            name: {
                "seconds": s._asdict(),
                "images_per_second": images / s.median,
                "model_tflops": flops / s.median / 1e12,
            }
            for name, s in seconds.items()
        },
        "ours_over_peer": measuring.of(ratios)._asdict(),
    }


def training(exp: Experiment, flags: argparse.Namespace) -> dict[str, Any]:
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
    counts = {
        OURS: pytree.count(exp.abstract_params),
        PEER: sum(w.numel() for w in peer.weights.values()),
    }
    return {"parameters": counts, **compared(took, size, exp.gradient_flops(size))}


def sampling(exp: Experiment, flags: argparse.Namespace) -> dict[str, Any]:
    """Euler's steps, without a decoder."""
    size, params = exp.config.sample.batch_size, step.init_state(exp).params
    euler = SAMPLERS["euler"](num_steps=flags.steps)
    guidances = guidance.only(exp.config.sample.guidances, ("ig", "cfg"))
    generator = exp.pipeline.generator(decode=lambda latents: latents)
    generator.sampling = replace(generator.sampling, sampler=euler)
    grid = generator.plan(guidances).grid
    peer = PeerSampler(exp, params, grid, compiled=flags.compile)
    noise = np.random.default_rng(0).standard_normal((size, *exp.net.latent_shape), np.float32)
    labels = np.arange(size, dtype=np.int32) % exp.num_classes
    given = jnp.uint32(0), jnp.arange(size), jnp.asarray(labels), jnp.asarray(noise)
    theirs = (
        torch.tensor(noise.transpose(0, 3, 1, 2).copy(), device=peer.device),
        torch.tensor(labels, dtype=torch.int64, device=peer.device),
    )

    def ours() -> Any:
        return generator(params, *given, guidances=guidances).decoded

    took = in_turns(
        {
            OURS: lambda calls: measuring.window(ours, calls),
            PEER: lambda calls: timed(lambda: peer(*theirs), calls, peer.device),
        },
        flags,
    )
    apart = np.abs(np.asarray(ours()) - peer(*theirs).cpu().numpy().transpose(0, 2, 3, 1)).max()
    cost = sample.cost(generator, guidances)
    evaluations = {"steps": flags.steps, "evaluations": cost["evaluations"]}
    return {**evaluations, "apart": float(apart), **compared(took, size, size * cost["flops"])}


WHAT = {"train": training, "sample": sampling}


def table(found: Mapping[str, Any], flags: argparse.Namespace) -> list[list[str]]:
    rows = [["", "images/s", "seconds", "spread", "TFLOP/s", "times PyTorch"]]
    for name, each in found["runs"].items():
        took, said = Seconds(**each["seconds"]), name
        if name == PEER:
            said += f" {found['torch']}, {'torch.compile' if flags.compile else 'eager'}"
        row = [said, f"{each['images_per_second']:.4g}", f"{took.median:.4g}", took.spread]
        rows.append([*row, f"{each['model_tflops']:.3g}", "1"])
    ratio = Seconds(**found["ours_over_peer"])
    rows[1][-1] = f"{ratio.median:.2f} [{ratio.least:.2f}, {ratio.most:.2f}]"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    measuring.add_flags(parser)
    parser.add_argument("--what", default="train", choices=WHAT)
    parser.add_argument("--steps", type=int, default=20, help="of Euler's method")
    parser.add_argument("--compile", action="store_true", help="give the peer to torch.compile")
    flags = parser.parse_args()
    with measuring.mistakes_told():
        if torch is None:
            raise UserError(MISSING)
        if jax.default_backend() == "gpu" and not torch.cuda.is_available():
            raise UserError("PyTorch sees no GPU, but jax does: install its build for CUDA")
        exp = measuring.load(flags.config, measuring.changes(flags), flags.devices)
        record = {"what": f"torch_peer, {flags.what}", **measuring.circumstances(exp, flags)}
        record |= WHAT[flags.what](exp, flags)
    measuring.tell(record, table(record, flags), json_file=flags.json)


if __name__ == "__main__":
    main()
