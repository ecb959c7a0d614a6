"""--mode=export: a run's network as safetensors under the published names, with its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from ig_jax import build, checkpoint, logs, tree
from ig_jax.build import Experiment
from ig_jax.errors import UserError
from ig_jax.formats import files
from ig_jax.interop import names
from ig_jax.types import Params

PAPERS = {  # of each family
    "sit": ("SiT", "arXiv 2401.08740"),
    "dit": ("DiT", "arXiv 2212.09748"),
    "lightningdit": ("LightningDiT", "arXiv 2501.01423"),
}
IG = "Internal Guidance (arXiv 2512.24176)"

# YAML first, as the Hugging Face Hub reads it.
CARD = """---
library_name: ig-jax
pipeline_tag: unconditional-image-generation
---

# {title}

{source}{readout}. {parameters:,} parameters, the `{weights}` weights of step {step:,}, under the
names and in the layouts of the published PyTorch code.

| | |
|---|---|
| depth, width, heads, patch | {depth}, {hidden_size}, {num_heads}, {patch_size} |
| latents | {side} x {side} x {channels}, {classes} classes |
| trained | {trained} |
| made with | {versions} |

Time in this file runs as in the published code of its family.

```bash
python main.py --mode=import --checkpoint={file} --workdir=runs/{stem}{told}
```

## Config

```json
{config}
```
"""


def _trained(meta: dict[str, Any]) -> str:
    """What the weights have seen, in words."""
    c, start = meta["config"], ""
    if meta["imported"]:
        start = "imported from a published checkpoint"
    if not meta["step"]:
        return start or "not at all"
    images = meta["step"] * c["train"]["batch_size"]
    terms = ", ".join(c["objective"]["terms"])
    own = (
        f"{meta['step']:,} steps, {images:,} images, on {c['data']['source']['name']} with "
        f"{c['optim']['name']}; loss terms {terms}"
    )
    return f"{start}, then {own}" if start else own


def _card(exp: Experiment, meta: dict[str, Any], params: Params, weights: str, file: Path) -> str:
    model, name = exp.config.model, meta["config"]["model"]["name"]
    (family, paper), readouts = PAPERS[name], model.readouts
    told = f" --readout_depth={readouts[0]}" if readouts else ""
    side, _, channels = exp.net.latent_shape
    return CARD.format(
        title=f"{family}{' + Internal Guidance' if readouts else ''}",
        source=f"{family} ({paper})",
        readout=f" with a readout at depth {readouts[0]} for {IG}" if readouts else "",
        parameters=tree.count(params),
        **{n: getattr(model, n) for n in ("depth", "hidden_size", "num_heads", "patch_size")},
        **{"weights": weights, "step": meta["step"], "side": side, "channels": channels},
        classes=exp.num_classes,
        trained=_trained(meta),
        versions=", ".join(f"{n} {v}" for n, v in meta["versions"].items()),
        file=file.name,
        stem=file.stem,
        told=told + (" --family=dit" if name == "dit" else ""),
        config=json.dumps(meta["config"], indent=2),
    )


def export(workdir: Path, output: Path, weights: str) -> None:
    """Writes the newest checkpoint of a run as safetensors under the published names.

    Beside it lies its model card (.md, same name): what it is, how it was trained, its config.

    Raises:
      UserError: there is no checkpoint, no such average, or no published form of this network.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"--output={output}: must end in .safetensors")
    checkpoints = checkpoint.of_run(workdir, "--workdir")
    try:
        step, _ = checkpoints.newest(arrays=checkpoint.WEIGHTS)
        meta = checkpoints.meta(step)
        exp = build.of_checkpoint(checkpoints, step, jax.devices()[:1])
        if len(exp.config.model.readouts) > 1:
            raise UserError(
                f"model.readouts = {exp.config.model.readouts}: the published networks have one"
            )
        params = checkpoints.weights(step, weights, exp.weights_here)
    finally:
        checkpoints.close()
    state = names.to_published(jax.tree.map(np.asarray, params))
    model = exp.config.model
    if model.options.rotary:
        tokens = exp.net.side // model.patch_size
        state |= names.rotary_tables(tokens, model.hidden_size // model.num_heads)
    with files.replaced(output) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    files.write_text(output.with_suffix(".md"), _card(exp, meta, params, weights, output))
    logs.say(f"{output}: {len(state)} arrays, {tree.num_bytes(state) / 2**20:,.1f} MiB")
