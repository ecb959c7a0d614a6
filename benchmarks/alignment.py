"""Ways of training on the digits: SiT + IG, the SiT alone, SRA, DTS_AS, Self-Flow; by seeds.

  python benchmarks/alignment.py --folder=runs/alignment [--seeds=5] [--variants=sit,sra]

Every run is the demo under another seed, trained and sampled. Reports FD and precision of its
samples without guidance and, where the network has a readout, with IG, and the accuracy of a linear
classifier on the mean tokens of blocks 2 and 4 at t = 0.1 without labels, fitted to the training
images and tested on those held out. The variant `readouts` is `no_readout` of the same seed with a
readout of block 4 trained afterwards, its trunk as it was, and IG 1.2 in place of 2. Rows are means
with 95 % t intervals over training seeds; behind each stands the difference from the first variant,
paired by seed. Runs that are done are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ig_jax.study.paired import Interval, interval, paired

DEPTHS, TIME = (2, 4), 0.1


def train(variant: str, seed: int, workdir: Path) -> None:
    """Runs the demo of a variant in a process of its own."""
    settings = {"seed": seed, "evaluate.seeds": (seed,), "log.samples_every_steps": 0}
    config, start = variant, []
    if variant == "readouts":
        config, start = "sit", [f"--init_from={workdir.parent / f'no_readout_{seed}'}"]
        settings |= {"train.only": "readouts", "train.steps": 500, "model.readouts": (4,)}
        settings |= {"sample.ig.scale": 1.2}  # it is worse than one trained with its trunk
    flags = [f"--config.{name}={value}" for name, value in settings.items()] + start
    command = ["main.py", f"--config=configs/digits.py:{config}", f"--workdir={workdir}"]
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "log.txt", "w") as log:
        process = [sys.executable, *command, "--mode=demo", *flags]
        subprocess.run(process, cwd=ROOT, stdout=log, stderr=log, check=True)


def probe(workdir: Path) -> dict[str, float]:
    """Accuracy of a linear classifier on mean tokens, by depth."""
    import ig_jax
    from ig_jax.data.sources.digits import Digits
    from ig_jax.study import probe

    found = probe.accuracy(ig_jax.load(workdir), Digits("train"), DEPTHS, TIME, seed=0)
    return {f"probe of block {d}": found[probe.name(d, TIME)] for d in DEPTHS}


def measure(workdir: Path) -> dict[str, float]:
    """All numbers of a run that is done."""
    results = json.loads((workdir / "results.json").read_text())
    found = {
        f"{metric}, {way}": results[way][metric]["mean"]
        for way in ("plain", "ig")
        if way in results
        for metric in ("fd", "precision")
    }
    return found | probe(workdir)


def text(found: Interval) -> str:
    """Mean and half of its 95 % interval."""
    return f"{found.mean:.3f} ± {found.half:.3f}"


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a variant a row, a metric a column."""
    names = list(next(iter(rows.values()))[0])
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    first = next(iter(rows.values()))
    for variant, runs in rows.items():
        cells = []
        for name in names:
            if name not in runs[0]:
                cells.append("–")
                continue
            values = [run[name] for run in runs]
            change = paired(values, [run[name] for run in first])
            minus = f" ({text(change)})" if runs is not first else ""
            cells.append(text(interval(values)) + minus)
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the runs and the record")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--variants", default="sit,no_readout,sra,dts,self_flow")
    args = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {v: [] for v in args.variants.split(",")}
    for seed in range(args.seeds):
        for variant, runs in rows.items():
            workdir = (args.folder / f"{variant}_{seed}").absolute()
            record = workdir / "measured.json"
            if not record.exists():
                train(variant, seed, workdir)
                record.write_text(json.dumps(measure(workdir)))
            runs.append(json.loads(record.read_text()))
            print(f"{variant}, seed {seed}: {runs[-1]}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
