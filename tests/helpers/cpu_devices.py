"""The flags of XLA for a process with several CPU devices."""

import os


def xla_flags(devices: int) -> str:
    """Those of this process and a number of devices: of two equal flags the last one counts.

    So the tests can be run under other settings: XLA_FLAGS=--xla_cpu_max_isa=AVX2 make test
    """
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
