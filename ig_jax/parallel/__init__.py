"""Devices and processes: the mesh, partitioning, collectives, locks, preemption."""
