"""Internal Guidance and its relatives for diffusion transformers, in JAX."""
