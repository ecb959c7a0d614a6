"""The training loop and what happens during it."""
