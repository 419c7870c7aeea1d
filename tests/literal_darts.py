# ruff: noqa: N803, N806  (C, C_p, C_pp: channels, as the official code names them)
"""The search of arXiv:1806.09055, literally: one loop per sum, one module per operation.

The oracle that dartsl is compared with, and the baseline of the speed benchmarks. It knows nothing
of dartsl, mirrors the structure and the key names of the official code (quark0/darts), and does
not try to be fast. From the official code: even sizes of images only, and at least three cells.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)

Batch = tuple[Tensor, Tensor]


class Zero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride] * 0.0


class ReLUConvBN(nn.Module):
    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(), nn.Conv2d(C_in, C_out, 1, bias=False), nn.BatchNorm2d(C_out, affine=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class FactorizedReduce(nn.Module):
    def __init__(self, C_in: int, C_out: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


def depthwise_pointwise(C: int, k: int, stride: int, dilation: int) -> list[nn.Module]:
    padding = dilation * (k - 1) // 2
    return [
        nn.ReLU(),
        nn.Conv2d(C, C, k, stride, padding, dilation, groups=C, bias=False),
        nn.Conv2d(C, C, 1, bias=False),
        nn.BatchNorm2d(C, affine=False),
    ]


class SepConv(nn.Module):
    def __init__(self, C: int, k: int, stride: int) -> None:
        super().__init__()
        first, second = depthwise_pointwise(C, k, stride, 1), depthwise_pointwise(C, k, 1, 1)
        self.op = nn.Sequential(*first, *second)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class DilConv(nn.Module):
    def __init__(self, C: int, k: int, stride: int) -> None:
        super().__init__()
        self.op = nn.Sequential(*depthwise_pointwise(C, k, stride, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def pool_bn(pool: nn.Module, C: int) -> nn.Module:
    return nn.Sequential(pool, nn.BatchNorm2d(C, affine=False))


OPS = {
    "none": lambda C, s: Zero(s),
    "max_pool_3x3": lambda C, s: pool_bn(nn.MaxPool2d(3, s, 1), C),
    "avg_pool_3x3": lambda C, s: pool_bn(nn.AvgPool2d(3, s, 1, count_include_pad=False), C),
    "skip_connect": lambda C, s: nn.Identity() if s == 1 else FactorizedReduce(C, C),
    "sep_conv_3x3": lambda C, s: SepConv(C, 3, s),
    "sep_conv_5x5": lambda C, s: SepConv(C, 5, s),
    "sep_conv_7x7": lambda C, s: SepConv(C, 7, s),
    "dil_conv_3x3": lambda C, s: DilConv(C, 3, s),
    "dil_conv_5x5": lambda C, s: DilConv(C, 5, s),
    "conv_7x1_1x7": lambda C, s: nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 7), (1, s), (0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), (s, 1), (3, 0), bias=False),
        nn.BatchNorm2d(C, affine=False),
    ),
}


class MixedOp(nn.Module):
    """Eq. 2: the sum over all primitives of softmax(alpha) * operation(x)."""

    def __init__(self, C: int, stride: int, primitives: tuple[str, ...]) -> None:
        super().__init__()
        self._ops = nn.ModuleList(OPS[primitive](C, stride) for primitive in primitives)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


class Cell(nn.Module):
    """Eq. 1: each of `steps` nodes sums mixed operations of every node before it."""

    def __init__(
        self,
        steps: int,
        multiplier: int,
        C_pp: int,
        C_p: int,
        C: int,
        reduction: bool,
        reduction_prev: bool,
        primitives: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.reduction, self.steps, self.multiplier = reduction, steps, multiplier
        self.preprocess0 = FactorizedReduce(C_pp, C) if reduction_prev else ReLUConvBN(C_pp, C)
        self.preprocess1 = ReLUConvBN(C_p, C)
        self._ops = nn.ModuleList(
            MixedOp(C, 2 if reduction and j < 2 else 1, primitives)
            for i in range(steps)
            for j in range(2 + i)
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self.steps):
            node = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(node)
        return torch.cat(states[-self.multiplier :], dim=1)


class Network(nn.Module):
    """The supernet; `alphas_normal` and `alphas_reduce` [edges, primitives] are plain leaves."""

    def __init__(
        self,
        C: int,
        num_classes: int,
        layers: int,
        in_channels: int = 3,
        steps: int = 4,
        multiplier: int = 4,
        stem_multiplier: int = 3,
        primitives: tuple[str, ...] = PRIMITIVES,
    ) -> None:
        super().__init__()
        width = stem_multiplier * C
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        C_pp, C_p, reduction_prev = width, width, False
        self.cells = nn.ModuleList()
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C = 2 * C if reduction else C
            cell = Cell(steps, multiplier, C_pp, C_p, C, reduction, reduction_prev, primitives)
            self.cells.append(cell)
            C_pp, C_p, reduction_prev = C_p, multiplier * C, reduction
        self.classifier = nn.Linear(C_p, num_classes)

        edges = sum(2 + i for i in range(steps))
        self.alphas_normal = (1e-3 * torch.randn(edges, len(primitives))).requires_grad_()
        self.alphas_reduce = (1e-3 * torch.randn(edges, len(primitives))).requires_grad_()

    def arch_parameters(self) -> list[Tensor]:
        return [self.alphas_normal, self.alphas_reduce]

    def _apply(self, fn, recurse: bool = True):
        """Let the alphas go along with `.double()` and `.to(device)`, the same leaves as before."""
        for alpha in self.arch_parameters():
            alpha.data = fn(alpha.data)
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            alpha = self.alphas_reduce if cell.reduction else self.alphas_normal
            s0, s1 = s1, cell(s0, s1, F.softmax(alpha, dim=-1))
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self(x), y)


def concat(tensors) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class Architect:
    """The alpha step, of first order or unrolled by one virtual step of the weights."""

    def __init__(
        self,
        network: Network,
        momentum: float = 0.9,
        weight_decay: float = 3e-4,
        arch_learning_rate: float = 3e-4,
        arch_weight_decay: float = 1e-3,
    ) -> None:
        self.network = network
        self.momentum, self.weight_decay = momentum, weight_decay
        self.optimizer = torch.optim.Adam(
            network.arch_parameters(),
            lr=arch_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=arch_weight_decay,
        )

    def step(
        self,
        train: Batch,
        val: Batch,
        xi: float,
        weight_optimizer: torch.optim.Optimizer,
        unrolled: bool,
    ) -> None:
        self.optimizer.zero_grad()
        if unrolled:
            self.backward_unrolled(train, val, xi, weight_optimizer)
        else:
            self.network.loss(*val).backward()
        self.optimizer.step()

    def backward_unrolled(
        self, train: Batch, val: Batch, xi: float, weight_optimizer: torch.optim.Optimizer
    ) -> None:
        """Eq. 7: grad_alpha L_val(w', alpha) - xi * (g+ - g-) / (2 epsilon)."""
        virtual = self.virtual_network(train, xi, weight_optimizer)
        virtual.loss(*val).backward()
        vector = [w.grad for w in virtual.parameters()]
        products = self.finite_difference(vector, train)
        for alpha, direct, product in zip(
            self.network.arch_parameters(), virtual.arch_parameters(), products, strict=True
        ):
            alpha.grad = direct.grad - xi * product

    def virtual_network(
        self, train: Batch, xi: float, weight_optimizer: torch.optim.Optimizer
    ) -> Network:
        """Eq. 6: a copy at w' = w - xi (momentum * buffer + gradient + weight decay * w)."""
        weights = list(self.network.parameters())
        gradients = torch.autograd.grad(self.network.loss(*train), weights)
        virtual = copy.deepcopy(self.network)
        for alpha in virtual.arch_parameters():
            alpha.grad = None
        for new, w, gradient in zip(virtual.parameters(), weights, gradients, strict=True):
            buffer = weight_optimizer.state[w].get("momentum_buffer", torch.zeros_like(w))
            direction = self.momentum * buffer + gradient + self.weight_decay * w.data
            new.data = w.data - xi * direction
        return virtual

    def finite_difference(self, vector: list[Tensor], train: Batch) -> list[Tensor]:
        """Eq. 8: epsilon = 0.01 / ||v||, at w + epsilon v first, then at w - epsilon v."""
        epsilon = 0.01 / concat(vector).norm()
        plus = self.alpha_gradients_at(vector, epsilon, train)
        minus = self.alpha_gradients_at(vector, -2 * epsilon, train)
        self.move(vector, epsilon)
        return [(p - m) / (2 * epsilon) for p, m in zip(plus, minus, strict=True)]

    def alpha_gradients_at(self, vector: list[Tensor], by: Tensor, train: Batch):
        self.move(vector, by)
        return torch.autograd.grad(self.network.loss(*train), self.network.arch_parameters())

    def move(self, vector: list[Tensor], by: Tensor) -> None:
        for w, v in zip(self.network.parameters(), vector, strict=True):
            w.data += by * v


def search_step(
    network: Network,
    architect: Architect,
    weight_optimizer: torch.optim.Optimizer,
    train: Batch,
    val: Batch,
    lr: float,
    unrolled: bool,
    grad_clip: float = 5.0,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1, one iteration: alpha, then the weights; returns the training loss and logits."""
    for group in weight_optimizer.param_groups:
        group["lr"] = lr
    architect.step(train, val, lr, weight_optimizer, unrolled)
    weight_optimizer.zero_grad()
    x, y = train
    logits = network(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
    weight_optimizer.step()
    return loss.detach(), logits.detach()
