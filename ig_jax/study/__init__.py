"""Methods trained under the same seeds, measured alike, and compared seed by seed."""
