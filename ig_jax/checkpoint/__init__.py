"""Checkpoints of training runs: saved, verified, restored."""
