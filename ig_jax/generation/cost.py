"""Network evaluations and FLOPs of a sample."""

from __future__ import annotations

from ig_jax import guidance
from ig_jax.generation.generator import Generator
from ig_jax.guidance import Guidances
from ig_jax.monitoring import flops
from ig_jax.samplers.base import Sampler


def cost(
    generator: Generator, guidances: Guidances | None = None, sampler: Sampler | None = None
) -> dict[str, int] | None:
    """Evaluations of the networks for one image and their FLOPs, without the decoder.

    None: an adaptive sampler, which decides for each image.
    """
    chosen = generator.plan(guidances, sampler)
    if chosen.sampler.adaptive:
        return None
    calls = chosen.sampler.calls()
    count = guidance.evaluations(chosen.segments, calls, chosen.null)
    # Where Internal Guidance is off the early heads are never computed.
    guided = guidance.evaluations(chosen.segments, calls, chosen.null, kind="ig").network
    head = () if chosen.readout is None else (chosen.readout,)
    net, guide = generator.net, generator.guide
    params = net.abstract_params
    with_head = flops.forward(net, params, heads=head)
    without = flops.forward(net, params, heads=())
    total = guided * with_head + (count.network - guided) * without
    if count.to_readout:
        total += count.to_readout * flops.to_readout(net, params, chosen.null.readout)
    if count.other:
        total += count.other * flops.forward(guide.net, guide.params, heads=())
    passes = {"evaluations": count.network, "of_the_guide": count.other}
    return {**passes, "to_readout": count.to_readout, "flops": total}
