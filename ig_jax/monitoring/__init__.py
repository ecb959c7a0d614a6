"""Reports of a run: console, metrics, throughput, profiles."""
