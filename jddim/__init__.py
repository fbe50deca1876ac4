"""DDIM sampling in JAX for diffusion models trained in PyTorch (arXiv:2010.02502)."""

__version__ = "0.1.0"
