"""Memory that ranks can write into on each other: `host.py` for CPUs, `device.py` for GPUs."""
