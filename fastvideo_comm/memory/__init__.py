"""Memory that ranks can write into on each other: see `host.py` for the interface."""
