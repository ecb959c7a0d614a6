"""The model card of an export: what the network is, how to import it, where else it loads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ig_jax.interop.declared import NOISE_TO_DATA, ONLY, Declared

PAPERS = {  # of each family
    "sit": ("SiT", "arXiv 2401.08740"),
    "dit": ("DiT", "arXiv 2212.09748"),
    "lightningdit": ("LightningDiT", "arXiv 2501.01423"),
}
DDAE = "a reading of DDAE++, arXiv 2505.10999, whose code is not public"
IG = "Internal Guidance (arXiv 2512.24176)"

# YAML first, as the Hugging Face Hub reads it.
CARD = """---
library_name: ig-jax
pipeline_tag: unconditional-image-generation
---

# {title}

{source}{parts}. {parameters:,} parameters, the `{weights}` weights of step {step:,}, under the
names and in the layouts of the published PyTorch code.

| | |
|---|---|
| depth, width, heads, patch | {depth}, {hidden_size}, {num_heads}, {patch_size} |
| latents | {side} x {side} x {channels}, {classes} classes{null_class} |
| predicts | {predicts} |
| time | {time} |
| loads strictly in | {loads} |
| trained | {trained} |
| made with | {versions} |

The file's own metadata says all of this that its names and shapes do not:

```bash
python main.py --mode=import --checkpoint={file} --workdir={workdir}
```

## Config

```json
{config}
```
"""


@dataclass(frozen=True)
class Export:
    """The export that a model card describes."""

    names: Collection[str]  # of the arrays in the file
    declared: Declared  # its metadata
    with_sigma: bool
    rows: int  # of the label table
    left_out: tuple[str, ...]  # what a published file had that this one has not


def write(
    export: Export,
    meta: Mapping[str, Any],
    *,
    file: str,
    weights: str,
    parameters: int,
    latent_shape: tuple[int, int, int],
) -> str:
    """The card, in Markdown.

    Args:
      meta: of the checkpoint that was exported.
      file: its name.
      weights: which of the checkpoint.
      parameters: their number.
    """
    model, declared = meta["config"]["model"], export.declared
    (family, paper), depth = PAPERS[model["name"]], declared.readout_depth
    side, _, channels = latent_shape
    # A name may hold line breaks, which no line of this card should.
    shown = file if file.isprintable() else "FILE"
    return CARD.format(
        title=f"{family}{' + Internal Guidance' if depth else ''}",
        source=f"{family} ({paper})",
        parts=_parts(declared),
        parameters=parameters,
        **{n: model[n] for n in ("depth", "hidden_size", "num_heads", "patch_size")},
        **{"weights": weights, "step": meta["step"], "side": side, "channels": channels},
        classes=declared.num_classes,
        null_class="" if export.rows > declared.num_classes else ", no null class",
        predicts=_predicts(declared),
        time=_time(declared),
        loads=_loads(export),
        trained=_trained(meta),
        versions=", ".join(f"{n} {v}" for n, v in meta["versions"].items()),
        file=shlex.quote(shown),
        workdir=shlex.quote(f"runs/{shown.removesuffix('.safetensors')}"),
        config=json.dumps(meta["config"], indent=2),
    )


def _parts(declared: Declared) -> str:
    depth, rerouted, parts = declared.readout_depth, declared.self_conditioning, []
    if depth:
        parts.append(f"a readout at depth {depth} for {IG}")
    if rerouted:
        parts.append(f"self-conditioning from block {rerouted['tap']} on ({DDAE})")
    return f" with {' and '.join(parts)}" if parts else ""


def _predicts(declared: Declared) -> str:
    if declared.process != "flow":
        return "the noise, on DDPM's schedule of 1000 steps"
    return f"the {declared.prediction}, on the {declared.path} path"


def _time(declared: Declared) -> str:
    scale = (
        "" if declared.time_scale == 1 else f", times {declared.time_scale:g} before its features"
    )
    if declared.process != "flow":
        return f"steps 0 (data) to 999 (noise){scale}"
    if declared.time_direction == NOISE_TO_DATA:
        who = "the official SiT and LightningDiT"
        return f"t = 0 is noise and t = 1 is data, as in the code of {who}{scale}"
    return f"t = 0 is data and t = 1 is noise, as in the code of REPA, SRA and SiT + IG{scale}"


def _loads(export: Export) -> str:
    """The published class that has exactly these names, and what it would make of them."""
    only = sorted(n.removeprefix(ONLY) for n in export.names if n.startswith(ONLY))
    if only:
        return (
            f"no published class: none has these settings: {', '.join(only)}. The arrays "
            f"`{ONLY}*` are there so that a strict load fails"
        )
    if export.left_out:
        return (
            f"not in the class it was imported from, which also has {', '.join(export.left_out)}: "
            f"they were not trained on here. Otherwise: {_class_of(export)}"
        )
    return _class_of(export)


def _class_of(export: Export) -> str:
    firsts, declared = {name.split(".")[0] for name in export.names}, export.declared
    readout, family = "final_layer_xr" in firsts, declared.family
    sigma = f"learn_sigma={export.with_sigma}"
    sigma += "" if export.rows > declared.num_classes else ", class_dropout_prob=0"
    q_norm = any("q_norm" in name for name in export.names)
    if family == "lightningdit":
        code = "Internal Guidance" if readout else "the official code"
        return f"LightningDiT of {code} ({sigma})"
    known = {"projectors": "REPA", "ap_head": "SRA", "final_layer_xr": "SiT + IG"}
    codes = [code for first, code in known.items() if first in firsts]
    if family == "dit" and (readout or (q_norm and not codes)):
        return f"no published class: no DiT has {'a second final layer' if readout else 'q_norm'}"
    if family == "dit":
        return f"DiT of {codes[0] if codes else f'the official code ({sigma})'}"
    official = declared.time_direction == NOISE_TO_DATA
    if len(codes) == 1 and not official:
        return f"SiT of {codes[0]}"
    if official and not q_norm and not codes:
        return f"SiT of the official code ({sigma})"
    if official or codes or export.with_sigma:
        return "no published class: none has all of these layers and this direction of time"
    with_q_norm = "no published class, but with strict=False and qk_norm=True"
    alone = f"SiT of the official code ({sigma}), whose samplers count time the other way; else"
    return f"{with_q_norm if q_norm else f'{alone} with strict=False'} those of REPA and SRA"


def _trained(meta: Mapping[str, Any]) -> str:
    """Describes the training of the weights."""
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
