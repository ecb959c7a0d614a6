"""Successive halving over guidance settings."""
