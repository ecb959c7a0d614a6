"""Weights in and out, under the names of the published state dicts."""
