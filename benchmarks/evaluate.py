"""How fast samples are judged: Inception's features, and what every measure takes after them.

  python benchmarks/evaluate.py [--batch=256] [--side=256] [--samples=50000] [--references=10000]
  python benchmarks/evaluate.py --batch=8 --samples=2000 --references=1000 --calls=1    # on a CPU

Weights of Inception are made up, images and features too: neither changes a time. Features go
through `look.Look`, as --mode=evaluate takes them, from images on the host to rows on the host. A
measure's time is that of its first call, with what it compiles: it is called once a run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks import measuring
from ig_jax import pytree
from ig_jax.errors import UserError
from ig_jax.evaluation.feature_extractor import FeatureExtractor
from ig_jax.metrics import inception_network
from ig_jax.metrics.frechet import frechet_distance
from ig_jax.metrics.inception import Inception
from ig_jax.metrics.inception_score import inception_score
from ig_jax.metrics.moments import Moments
from ig_jax.metrics.precision_recall import precision_recall
from ig_jax.parallel.mesh import make_mesh

POOL, SPATIAL, CLASSES = 2048, 2023, 1008
SPLIT = 5000


def weights(rng: np.random.Generator) -> dict[str, Any]:
    """Of Inception's shapes."""
    drawn = {}
    for conv in inception_network.convolutions():
        shape = (*conv.window, conv.inputs, conv.outputs)
        drawn[f"{conv.name}.kernel"] = rng.standard_normal(shape, np.float32) / np.sqrt(conv.inputs)
        drawn[f"{conv.name}.bias"] = np.zeros(conv.outputs, np.float32)
    drawn["fc.kernel"] = rng.standard_normal(inception_network.HEAD, np.float32)
    return pytree.unflatten(drawn)


def of_features(flags: argparse.Namespace, rng: np.random.Generator) -> dict[str, Any]:
    """Images a second, and FLOP/s by XLA's count of the program."""
    mesh = make_mesh(jax.devices()[: flags.devices])
    if flags.batch % mesh.size:
        raise UserError(f"--batch={flags.batch}: must divide over {mesh.size} devices")
    look = FeatureExtractor(Inception(""), weights(rng), mesh, flags.batch, "evaluate.features")
    shape = (flags.batch, flags.side, flags.side, 3)
    pictures = rng.integers(0, 256, shape, np.uint8)
    started = time.perf_counter()
    look(pictures)
    first = time.perf_counter() - started
    found = measuring.seconds(lambda: look(pictures), calls=flags.calls, windows=flags.windows)
    rows = look.rows(shape[1:])
    return {
        "seconds_per_batch": found._asdict(),
        "images_per_second": flags.batch / found.median,
        "first_call_seconds": first,
        "bytes_kept_per_image": sum(
            int(np.prod(row.shape)) * np.dtype(row.dtype).itemsize for row in rows.values()
        ),
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def of_measures(flags: argparse.Namespace, rng: np.random.Generator) -> dict[str, float]:
    """Seconds of every measure of so many samples, on features without any structure."""

    def drawn(n: int, d: int) -> np.ndarray:
        return rng.standard_normal((n, d), np.float32)

    pool, spatial = drawn(flags.samples, POOL), drawn(flags.samples, SPATIAL)
    real = drawn(flags.references, POOL)
    moments, found = timed(lambda: Moments.from_features(pool).gaussian)
    frechet, _ = timed(lambda: frechet_distance(found, Moments.from_features(real).gaussian))
    spatials, _ = timed(lambda: Moments.from_features(spatial))
    pr, _ = timed(lambda: precision_recall(real, pool))
    score, _ = timed(lambda: inception_score(drawn(flags.samples, CLASSES), SPLIT))
    return {
        "moments of the pooled features": moments,
        "moments of the spatial features": spatials,
        "Frechet distance, 2048 dimensions": frechet,
        "precision and recall": pr,
        "inception score": score,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=256, help="images together")
    parser.add_argument("--side", type=int, default=256, help="of the images, in pixels")
    parser.add_argument("--samples", type=int, default=50_000, help="that are judged")
    parser.add_argument("--references", type=int, default=10_000, help="of precision and recall")
    parser.add_argument("--devices", type=int, help="how many are used; all by default")
    parser.add_argument("--windows", type=int, default=5, help="timed; their median is told")
    parser.add_argument("--calls", type=int, default=4, help="in each window")
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    flags = parser.parse_args()
    rng = np.random.default_rng(0)
    with measuring.mistakes_told():
        features = of_features(flags, rng)
    record = {
        **measuring.machine(jax.devices()[: flags.devices]),
        "batch": flags.batch,
        "side": flags.side,
        "samples": flags.samples,
        "references": flags.references,
        "features": features,
        "seconds": of_measures(flags, rng),
    }
    speed = [
        ["features", "images/s", "seconds a batch", "spread", "first call, s"],
        [
            f"{flags.batch} images of {flags.side} pixels",
            measuring.shown(features["images_per_second"]),
            measuring.shown(features["seconds_per_batch"]["median"]),
            measuring.Seconds(**features["seconds_per_batch"]).spread,
            measuring.shown(features["first_call_seconds"]),
        ],
    ]
    rows = [[name, measuring.shown(value)] for name, value in record["seconds"].items()]
    of = f"measure of {flags.samples:,} samples, {flags.references:,} references"
    measuring.tell(record, speed, [[of, "seconds"], *rows], json_file=flags.json)


if __name__ == "__main__":
    main()
