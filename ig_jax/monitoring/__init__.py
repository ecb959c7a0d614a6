"""What a run reports: console, metrics, throughput, profiles."""
