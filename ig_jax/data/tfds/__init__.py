"""Data sets in the layout of TensorFlow Datasets, read without TensorFlow."""
