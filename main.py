"""Trains, samples and evaluates diffusion transformers with Internal Guidance.

python main.py --config=configs/digits.py
python main.py --help
"""

import time

STARTED = time.perf_counter()  # before the imports, which it measures

from ig_jax import cli

if __name__ == "__main__":
    cli.entry(STARTED)
