"""Sampling: plans, compiled generators, batches, sample files."""
