"""Network evaluations and FLOPs of a sample."""

from __future__ import annotations

from typing import Any

from ig_jax import guidance
from ig_jax.generation.generator import Generator
from ig_jax.generation.plan import plan
from ig_jax.monitoring import flops


def cost(generator: Generator, **chosen: Any) -> dict[str, int] | None:
    """What one image takes: evaluations of the networks and their FLOPs, without the decoder.

    `chosen` may name guidances and a sampler, as for `Generator`. None: an adaptive sampler, which
    decides for each image.
    """
    exp, other = generator.exp, generator.worse
    sampler = chosen.get("sampler") or exp.config.sample.sampler
    guidances = chosen.get("guidances") or exp.config.sample.guidances
    if sampler.adaptive:
        return None
    cut, calls = plan(exp.config, sampler, guidances).cut, sampler.calls()
    count = guidance.evaluations(cut, calls)
    # Where Internal Guidance is off the early heads are never computed.
    guided = guidance.evaluations(cut, calls, kind="ig").network
    head = () if exp.config.readout is None else (exp.config.readout,)
    with_head = flops.forward(exp.net, exp.abstract_params, heads=head)
    without = flops.forward(exp.net, exp.abstract_params, heads=())
    total = guided * with_head + (count.network - guided) * without
    if count.other:
        total += count.other * flops.forward(other.net, other.params, heads=())
    return {"evaluations": count.network, "of_the_guide": count.other, "flops": total}
