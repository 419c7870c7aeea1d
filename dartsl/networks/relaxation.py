"""Continuous relaxation: from alpha to the weights of the operations on every edge.

A relaxation is an `nn.Module` that maps alpha [E, P] of one kind of cell to edge weights [E, P].
It may hold parameters of its own (they are searched with alpha) and may sample, but in training
mode only: in evaluation mode it returns the weights that a genotype is read from.
"""

import torch
from torch import Tensor, nn


class Softmax(nn.Module):
    """Softmax over all primitives of an edge, 'none' included (Eq. 2 of arXiv:1806.09055)."""

    def forward(self, alpha: Tensor) -> Tensor:
        """Edge weights [E, P] of alpha [E, P]; each row sums to 1."""
        return torch.softmax(alpha, dim=-1)
