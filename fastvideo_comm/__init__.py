"""Triton-accelerated communication for sequence-parallel video diffusion."""

__version__ = "0.1.0"
