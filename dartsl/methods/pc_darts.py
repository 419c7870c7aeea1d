"""PC-DARTS: partial channel connections (Xu et al., arXiv:1907.05737).

It fills three slots: the mixed operation (partial channels, section 3.2), the relaxation (edge
normalisation, section 3.3) and the stages (alpha warm-up, section 4.2).

Shapes: B images, C channels, E edges, P primitives.
"""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.errors import UserError
from dartsl.modules import SearchModule
from dartsl.networks.supernet import ALPHA_INIT_STD, MixedOperation

log = logging.getLogger(__name__)


class PartialMixedOperation(MixedOperation):
    """Operations on one of `proportion` parts of the channels; the others pass by (Eq. 2).

    Args:
        channels: C, divisible by `proportion`.
        stride: 1 or 2; what passes by is then max-pooled.
        primitives: of the search space.
        num_edges: k, the edges that leave the node.
        proportion: K of the paper, at least 2; 4 on CIFAR-10.

    Raises:
        UserError: where the channels cannot be parted.
    """

    def __init__(
        self,
        channels: int,
        stride: int,
        primitives: Sequence[str],
        num_edges: int,
        proportion: int = 4,
    ) -> None:
        if proportion < 2:
            raise UserError(f"proportion is {proportion}; to part the channels it is at least 2.")
        if channels % proportion:
            raise UserError(
                f"PC-DARTS parts the channels in {proportion}: {channels} is not a multiple of it."
            )
        super().__init__(channels // proportion, stride, primitives, num_edges)
        self.stride = stride
        self.proportion = proportion

    def forward(self, x: Tensor, weights: Tensor) -> list[Tensor]:
        """[B, C, H, W] and [k, P] -> k outputs [B, C, ceil(H / stride), ceil(W / stride)]."""
        part = x.shape[1] // self.proportion
        sampled, passed = x.split([part, x.shape[1] - part], dim=1)
        if self.stride == 2:
            passed = F.max_pool2d(passed, 2, ceil_mode=True)
        # An edge weighs both parts. Its weight is the sum over its primitives, whose softmax sums
        # to 1 before edge normalisation.
        outputs = zip(super().forward(sampled, weights), weights.sum(dim=1).unbind(), strict=True)
        # The next operation samples other channels than this one.
        return [
            F.channel_shuffle(torch.cat([output, passed * weight], dim=1), self.proportion)
            for output, weight in outputs
        ]


class EdgeNormalizedSoftmax(nn.Module):
    """Softmax over primitives times a softmax over the edges into each node (Eq. 3, 4).

    Args:
        num_intermediate_nodes: node i has i + 2 edges.

    Raises:
        UserError: in a pass, for the alpha of a cell with another number of nodes.
    """

    def __init__(self, num_intermediate_nodes: int = 4) -> None:
        super().__init__()
        self.edges_per_node = [node + 2 for node in range(num_intermediate_nodes)]
        self.beta = nn.Parameter(torch.empty(sum(self.edges_per_node)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw beta anew, as small as alpha."""
        nn.init.normal_(self.beta, std=ALPHA_INIT_STD)

    def forward(self, alpha: Tensor) -> Tensor:
        """Edge weights [E, P] of alpha [E, P]; the weights of a node's edges sum to 1."""
        if len(alpha) != len(self.beta):
            raise UserError(
                f"A cell of num_intermediate_nodes={len(self.edges_per_node)} has {len(self.beta)} "
                f"edges, but alpha has {len(alpha)}: give edge normalisation the search space's."
            )
        shares = [torch.softmax(beta, dim=0) for beta in self.beta.split(self.edges_per_node)]
        return torch.softmax(alpha, dim=-1) * torch.cat(shares)[:, None]


class AlphaWarmup:
    """Leaves alpha alone for the first epochs, while the weights learn.

    Args:
        num_epochs: 15 of 50 in the paper.
    """

    def __init__(self, num_epochs: int = 15) -> None:
        self.num_epochs = num_epochs
        self.has_warned = False

    def enter(self, module: SearchModule, epoch: int) -> None:
        """Switch the alpha steps on after the warm-up; warns where the search ends within it."""
        module.updates_alpha = epoch >= self.num_epochs
        last = module.num_epochs()
        if not self.has_warned and last is not None and last <= self.num_epochs:
            self.has_warned = True
            log.warning(
                "Alpha is left alone for %d epochs (method.stages.num_epochs), and this search has "
                "%d: its genotype will be that of the random alphas it begins with.",
                self.num_epochs,
                last,
            )
