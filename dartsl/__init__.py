"""dartsl: differentiable architecture search (DARTS, arXiv:1806.09055) in PyTorch Lightning."""

__version__ = "0.1.0"
