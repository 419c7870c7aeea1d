"""The network derived from a genotype, trained from scratch (section 3.1.2, 3.3).

Shapes: B images, C channels, H x W pixels.
"""

from collections.abc import Hashable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.batch_norm import following_together
from dartsl.errors import UserError, unknown
from dartsl.genotype import Edge, Genotype
from dartsl.networks.layout import check_sizes, preprocess_previous_previous, reduction_cells
from dartsl.networks.regions import recomputed
from dartsl.operations import OPERATIONS, ReLUConvBN, drop_path


class Cell(nn.Module):
    """A cell whose every node sums two operations."""

    def __init__(
        self,
        edges: Sequence[Edge],
        concat: Sequence[int],
        channels_prev_prev: int,
        channels_prev: int,
        channels: int,
        reduction: bool,
        reduction_prev: bool,
    ) -> None:
        super().__init__()
        self.preprocess0 = preprocess_previous_previous(
            channels_prev_prev, channels, reduction_prev, affine=True
        )
        self.preprocess1 = ReLUConvBN(channels_prev, channels)
        self.sources = tuple(source for _, source in edges)
        self.concat = tuple(concat)
        self.operations = nn.ModuleList(
            OPERATIONS[primitive](channels, 2 if reduction and source < 2 else 1, True)
            for primitive, source in edges
        )

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: float | Tensor | None) -> Tensor:
        """The concatenation of the nodes in `concat`.

        Args:
            s0: output of the cell before the last, [B, channels_prev_prev, H, W].
            s1: output of the last cell, [B, channels_prev, H, W].
            drop_path_prob: of every operation but the identity; None drops none.
        """
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        outputs: list[Tensor] = []
        for source, operation in zip(self.sources, self.operations, strict=True):
            output = operation(states[source])
            if drop_path_prob is not None and not isinstance(operation, nn.Identity):
                output = drop_path(output, drop_path_prob)
            outputs.append(output)
            if len(outputs) == 2:
                states.append(outputs[0] + outputs[1])
                outputs = []
        return torch.cat([states[node] for node in self.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier behind the second reduction cell, in training only.

    Note:
        The official heads take one size of image only (8 x 8 maps on CIFAR, 7 x 7 on ImageNet),
        for which this is identical. Larger maps are averaged before the classifier; maps smaller
        than the pooling window are pooled adaptively to the 2 x 2 that the convolution needs.
    """

    def __init__(self, channels: int, num_classes: int, stem: str) -> None:
        super().__init__()
        layers = [
            nn.ReLU(),
            _AuxiliaryPool(stride=3 if stem == "cifar" else 2),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            # The official ImageNet head and its checkpoints have no second BatchNorm.
            *([nn.BatchNorm2d(768)] if stem == "cifar" else []),
            nn.ReLU(),
        ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of a cell's output [B, C, H, W]."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class _AuxiliaryPool(nn.Module):
    """5 x 5 average pooling without padding; to 2 x 2 where the input is smaller than 8 (7)."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 5 + self.stride:
            return F.adaptive_avg_pool2d(x, 2)
        return F.avg_pool2d(x, 5, self.stride)


class FinalNetwork(nn.Module):
    """The network that a genotype stands for.

    Args:
        genotype: the two cells.
        channels: of the first cell's nodes (CIFAR 36, ImageNet 48).
        num_cells: 20 on CIFAR, 14 on ImageNet; reduction cells at a third and two thirds.
        num_classes: size of the logits.
        in_channels: of the images.
        stem: "cifar" keeps the size, "imagenet" divides it by 8.
        auxiliary: whether to build the auxiliary head.
        recompute: whether the backward pass computes cells again, to save memory.

    Attributes:
        drop_path_prob: probability of drop path in training; the training's schedule sets it.

    Raises:
        UserError: for an unknown primitive or stem, and for a size below 1.
    """

    def __init__(
        self,
        genotype: Genotype,
        channels: int = 36,
        num_cells: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        stem: str = "cifar",
        auxiliary: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            channels=channels,
            num_cells=num_cells,
            num_classes=num_classes,
            in_channels=in_channels,
        )
        for primitive in sorted(genotype.primitives):
            if primitive not in OPERATIONS:
                raise unknown("primitive", primitive, OPERATIONS)
        self.genotype = genotype
        # Read where it is by a pass that is replayed.
        self.register_buffer("drop_path_prob_on_device", torch.zeros(()), persistent=False)
        self.drop_path_prob_on_device: Tensor
        self.drop_path_prob = 0.0
        self.recompute = recompute
        self.stem_name = stem
        width, reduction_prev = self._build_stem(stem, in_channels, channels)
        reductions = reduction_cells(num_cells)
        self.auxiliary_cell = 2 * num_cells // 3
        self.cells = nn.ModuleList()
        channels_prev_prev = channels_prev = auxiliary_channels = width
        for index in range(num_cells):
            reduction = index in reductions
            channels *= 2 if reduction else 1
            edges = genotype.reduce if reduction else genotype.normal
            concat = genotype.reduce_concat if reduction else genotype.normal_concat
            sizes = (channels_prev_prev, channels_prev, channels)
            self.cells.append(Cell(edges, concat, *sizes, reduction, reduction_prev))
            reduction_prev = reduction
            channels_prev_prev, channels_prev = channels_prev, channels * len(concat)
            if index == self.auxiliary_cell:
                auxiliary_channels = channels_prev
        self.auxiliary_head = (
            AuxiliaryHead(auxiliary_channels, num_classes, stem) if auxiliary else None
        )
        self.classifier = nn.Linear(channels_prev, num_classes)
        self.memory_format = torch.channels_last
        self.to(memory_format=self.memory_format)

    @property
    def drop_path_prob(self) -> float:
        """Probability of drop path in training, in [0, 1).

        Raises:
            UserError: where it is set to anything else.
        """
        return self._drop_path_prob

    @drop_path_prob.setter
    def drop_path_prob(self, value: float) -> None:
        if not 0 <= value < 1:
            raise UserError(f"drop_path_prob={value} must be at least 0 and below 1.")
        self._drop_path_prob = value
        self.drop_path_prob_on_device.fill_(value)

    def variant(self) -> Hashable:
        """What a pass depends on beside tensors: whether there is drop path."""
        return self.drop_path_prob > 0

    def regions(self) -> list[nn.Module]:
        """What `compile_regions` compiles: the operations that compute anything."""
        operations = [op for cell in self.cells for op in cast(Cell, cell).operations]
        return [op for op in operations if not isinstance(op, nn.Identity)]

    def _build_stem(self, stem: str, in_channels: int, channels: int) -> tuple[int, bool]:
        """Build the stem; returns its channels and whether cell 0 follows a reduction."""
        if stem == "cifar":
            width = 3 * channels
            self.stem = nn.Sequential(
                nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            )
            return width, False
        if stem == "imagenet":
            half = max(channels // 2, 1)
            self.stem0 = nn.Sequential(
                nn.Conv2d(in_channels, half, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(),
                nn.Conv2d(half, channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
            )
            self.stem1 = nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
            )
            return channels, True
        raise unknown("stem", stem, ("cifar", "imagenet"))

    def _stem(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two inputs of cell 0."""
        if self.stem_name == "cifar":
            x = self.stem(x)
            return x, x
        s0 = self.stem0(x)
        return s0, self.stem1(s0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, num_classes] of images [B, in_channels, H, W], and the auxiliary head's.

        The second is None in evaluation mode and without an auxiliary head.
        """
        drop_path_prob: float | Tensor | None = None
        if self.training and self.drop_path_prob > 0:
            drop_path_prob = self.drop_path_prob_on_device if x.is_cuda else self.drop_path_prob
        auxiliary_logits = None
        s0, s1 = self._stem(x.contiguous(memory_format=self.memory_format))
        with following_together():
            for index, cell in enumerate(self.cells):
                inputs = s0, s1, drop_path_prob
                s0, s1 = s1, recomputed(cell, *inputs) if self.recompute else cell(*inputs)
                if index == self.auxiliary_cell and self.auxiliary_head and self.training:
                    auxiliary_logits = self.auxiliary_head(s1)
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1)), auxiliary_logits
