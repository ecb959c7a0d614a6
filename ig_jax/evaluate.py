"""Judging samples against real images: Frechet distance, precision, recall, accuracy, memorisation.

Everything is measured twice: for the samples, and for held-out real images in their place. The
second is the floor (or the ceiling): what a perfect generator would reach on these measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from ig_jax import guidance, guide, logs, pictures, sample, sharding
from ig_jax.build import Experiment
from ig_jax.density import FLOOR, DensityJudge
from ig_jax.errors import UserError
from ig_jax.guidance import Guidance, Guidances
from ig_jax.metrics import feature_classifier
from ig_jax.metrics.feature_classifier import FeatureClassifier
from ig_jax.metrics.frechet import frechet_distance
from ig_jax.metrics.inception_score import inception_score
from ig_jax.metrics.moments import Moments
from ig_jax.metrics.precision_recall import nearest_distance, precision_recall
from ig_jax.sample import Generator
from ig_jax.types import Params

# Name of a measure -> (heading, decimals, factor to what the heading says).
MEASURES = {
    "outliers": ("outliers %", 1, 100.0),
    "fd": ("FD", 2, 1.0),
    "accuracy": ("label accuracy %", 1, 100.0),
    "precision": ("precision %", 1, 100.0),
    "recall": ("recall %", 1, 100.0),
    "inception_score": ("IS", 2, 1.0),
    "nearest": ("nearest real", 2, 1.0),
}
# Which way is better, of those that a search may go by.
BETTER = {
    "fd": "lower",
    "accuracy": "higher",
    "precision": "higher",
    "recall": "higher",
    "inception_score": "higher",
    "outliers": "lower",
}
SHOWN_ROWS = 5
IS_SPLIT = 5000  # as ADM; one split at the size of the digits


def measure_to_text(name: str, stats: Mapping[str, float]) -> str:
    """'2.31 ± 0.05' in the unit of the measure's heading."""
    _, decimals, factor = MEASURES[name]
    mean, std = (f"{stats[key] * factor:.{decimals}f}" for key in ("mean", "std"))
    return f"{mean} ± {std}" if stats["std"] else mean


@dataclass(frozen=True)
class Judge:
    """Real images and the feature space of a small classifier fitted on them."""

    classifier: FeatureClassifier
    images: np.ndarray  # the training images, uint8
    features: np.ndarray

    decode: ClassVar[None] = None  # it looks at the codec's pictures
    shows_readout: ClassVar[bool] = False

    def measure(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """All measures of uint8 images [n, h, w, c] meant to show classes `labels` [n].

        fd: squared Frechet distance to the training images, in feature space.
        accuracy: share that the classifier reads as the class asked for.
        precision, recall: shares, k = 3, in feature space.
        nearest: median Euclidean distance, in pixels of range [-1, 1], to the nearest training
          image;
          well below the held-out images' own value, it means memorised images.
        """
        features = self.classifier.features(images)
        pr = precision_recall(self.features, features)
        score, _ = inception_score(self.classifier.logits(images), IS_SPLIT)
        return {
            "fd": frechet_distance(
                Moments.from_features(self.features), Moments.from_features(features)
            ),
            "accuracy": float(np.mean(self.classifier.predict(images) == labels)),
            "precision": pr.precision,
            "recall": pr.recall,
            "inception_score": score,
            "nearest": float(np.median(nearest_distance(_pixels(images), _pixels(self.images)))),
        }

    def draw(
        self,
        path: Path,
        drawn: Mapping[str, tuple[np.ndarray, np.ndarray]],
        results: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """The first samples of every way side by side, a column for each class, as PNG."""
        columns = min(int(max(labels.max() for _, labels in drawn.values())) + 1, 10)
        grids = {}
        for name, (images, labels) in drawn.items():
            chosen = [np.flatnonzero(labels == c)[:SHOWN_ROWS] for c in range(columns)]
            rows = min(map(len, chosen))
            order = np.array([c[:rows] for c in chosen]).T.reshape(-1)
            grids[name] = pictures.grid(images[order], columns, least_side=32)
        pictures.save(path, pictures.panels(grids))


def _pixels(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 127.5 - 1


def _real(source: Any) -> tuple[np.ndarray, np.ndarray]:
    batch = source.batch(np.arange(len(source)))
    return batch["stored"], batch["label"]


def make_judge(exp: Experiment) -> tuple[Judge | DensityJudge, dict[str, float]]:
    """The judge of this data set, and what the held-out examples score.

    Raises:
      UserError: the source has no held-out split to compare with.
    """
    source = exp.config.data.source
    held_out = source.held_out()
    if held_out is None:
        raise UserError(
            f"data.source.name = {exp.config.raw['data']['source']['name']!r}: has no held-out "
            "split to judge samples with; evaluation works on digits"
        )
    if hasattr(source, "log_density"):
        judge = DensityJudge(source, held_out)
        return judge, judge.measure(*_real(held_out))
    images, labels = _real(source)
    classifier = feature_classifier.fit(images, labels)
    judge = Judge(classifier, images, classifier.features(images))
    return judge, judge.measure(*_real(held_out))


def spread(values: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """{'fd': {'mean', 'std'}, ...} over seeds; the standard deviation is the sample's (n - 1)."""
    several = len(values) > 1
    return {
        name: {
            "mean": float(np.mean([v[name] for v in values])),
            "std": float(np.std([v[name] for v in values], ddof=1)) if several else 0.0,
        }
        for name in values[0]
    }


def variants(exp: Experiment, *, readout: bool = False) -> dict[str, Guidances]:
    """Name -> guidances: none, each that the config has on alone, IG with CFG.

    Names join the kinds by '_': plain, ig, cfg, autoguidance, ig_cfg. With `readout` the first is
    'readout': the early head alone, which is IG at scale 0.
    """
    given = exp.config.sample.guidances
    on = {kind for kind, g in given.items() if g.scale != 1}
    wanted = [(), ("ig",), ("cfg",), ("autoguidance",), ("ig", "cfg")]
    found = {
        "_".join(kinds) or "plain": guidance.only(given, kinds)
        for kinds in wanted
        if on >= set(kinds)
    }
    alone = {"readout": guidance.only(given, ()) | {"ig": Guidance(0.0, 0.0, 1.0)}}
    return (alone if readout and "ig" in on else {}) | found


def draw(
    generator: Generator, params: Params, num: int, seed: int, bar: Any, **chosen: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(decoded samples, labels) of the first `num` samples under `seed`.

    `chosen` may name guidances and a sampler, as for `Generator`.
    """
    own, parts = np.array(sharding.mine(num)), []
    for part in sample.batches(generator, params, seed, own, **chosen):
        parts.append(part)
        bar.update(len(part[0]) * jax.process_count())
    images, labels = (np.concatenate([p[i] for p in parts]) for i in (1, 2))
    return sharding.everybodys(images, num), sharding.everybodys(labels, num)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table, a row for each entry of {name: {measure: {'mean', 'std'}}}."""
    shown = [m for m in MEASURES if m in next(iter(results.values()))]
    rows = [["", *(MEASURES[m][0] for m in shown)]]
    rows += [
        [name, *(measure_to_text(m, stats[m]) for m in shown)] for name, stats in results.items()
    ]
    return logs.markdown(rows)


def run(exp: Experiment, workdir: Path) -> dict[str, Any]:
    """Judges the newest checkpoint under the configured guidance; writes evaluation.json."""
    step, params = sample.load_weights(exp, workdir)
    judge, floor = make_judge(exp)
    generator = Generator(exp, guide.load(exp), judge.decode)
    c = exp.config
    total = c.evaluate.num * len(c.evaluate.seeds)
    with logs.progress(total, unit="image", what="evaluating") as bar:
        measured = [
            judge.measure(*draw(generator, params, c.evaluate.num, seed, bar))
            for seed in c.evaluate.seeds
        ]
    results = {"floor": spread([floor]), "samples": spread(measured)}
    logs.say(table({FLOOR: results["floor"], "samples": results["samples"]}))
    record = {**results, "settings": {**sample.settings(exp, step), **c.raw["evaluate"]}}
    if jax.process_index() == 0:
        logs.write_json(workdir / "evaluation.json", record)
    return record
