"""The gradient of the validation loss with respect to alpha, through the weights.

Alpha is chosen for the weights that it leads to: minimise L_val(w*(alpha), alpha) (Eq. 3, 4 of
arXiv:1806.09055). One training step stands for w* (Eq. 6), which gives Eq. 7:

    grad_alpha L_val(w', alpha) - xi * d2 L_train(w, alpha) / (d alpha d w) . v,
    v = grad_w' L_val(w', alpha)

What stands here knows tensors and losses, not networks: losses are functions of nothing that read
the tensors of a `BilevelProblem` where they are. The weights are moved in place and put back bit
for bit; no model is copied.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from dartsl.errors import UserError, unknown

Loss = Callable[[], Tensor]
Tensors = list[Tensor]
Average = Callable[[Sequence[Tensor]], Tensors]
Product = Literal["finite_difference", "exact"]


@dataclass(frozen=True)
class BilevelProblem:
    """Two losses over the same weights and alphas, at one step of the search.

    Attributes:
        train_loss: scalar L_train of the present values of `weights` and `alphas`.
        val_loss: scalar L_val of the same.
        weights: leaf tensors w.
        alphas: leaf tensors, the architecture parameters.
        xi: the learning rate of the virtual step (Eq. 6).
        virtual_direction: from the gradients of L_train to the direction in which the optimizer
            of the weights would go (momentum, weight decay); the gradients alone if left out.
        buffers: gives the tensors that a loss changes as it is computed (running statistics); what
            happens to them at the virtual weights is undone.
        average: from this process' gradients to those of all processes.
        may_overflow: whether gradients are of float16, which is no mistake where they overflow.
    """

    train_loss: Loss
    val_loss: Loss
    weights: Sequence[Tensor]
    alphas: Sequence[Tensor]
    xi: float = 0.0
    virtual_direction: Callable[[Tensors], Tensors] = field(default=lambda gradients: gradients)
    buffers: Callable[[], Tensors] = list
    average: Average = list
    may_overflow: bool = False


class Hypergradient(Protocol):
    """From a bilevel problem to the gradient of alpha.

    One that differentiates the gradient of a loss says so by an attribute `differentiates_twice`,
    for what torch.compile makes is differentiated once only.
    """

    def __call__(self, problem: BilevelProblem) -> Tensors:
        """Gradients of the alphas, in their order; weights and alphas are left as they were."""


class FirstOrder:
    """xi = 0: the present weights stand for the optimal ones (section 2.3)."""

    def __call__(self, problem: BilevelProblem) -> Tensors:
        """grad_alpha L_val(w, alpha)."""
        with held_constant(problem.weights):
            return _gradients(problem.val_loss(), problem.alphas, problem.average)


class Unrolled:
    """One virtual step of the weights (Eq. 6, 7).

    Args:
        product: how the matrix-vector product of Eq. 7 is computed: "finite_difference" is the
            paper's algorithm (Eq. 8); "exact" differentiates twice.
        epsilon_scale: epsilon = epsilon_scale / ||v||, 0.01 in the paper.

    Attributes:
        differentiates_twice: whether the gradient of a loss is differentiated.

    Raises:
        UserError: for an unknown product, and an epsilon_scale that is not positive and finite.

    Note:
        In a network with ReLU and max pooling the two products do not converge to each other: the
        finite difference crosses kinks that the second derivative cannot see. In a smooth network
        they agree.
    """

    def __init__(self, product: Product = "finite_difference", epsilon_scale: float = 0.01) -> None:
        if product not in get_args(Product):
            raise unknown("product", product, get_args(Product))
        if not 0 < epsilon_scale < math.inf:
            raise UserError(f"epsilon_scale is {epsilon_scale}; it must be positive and finite.")
        self.product = product
        self.differentiates_twice = product == "exact"
        self.epsilon_scale = epsilon_scale

    def __call__(self, problem: BilevelProblem) -> Tensors:
        """grad_alpha L_val(w', alpha) - xi * product (Eq. 7)."""
        weights, alphas = problem.weights, problem.alphas
        with held_constant(alphas):
            gradients = _gradients(problem.train_loss(), weights, problem.average)
        with virtual_weights(problem, problem.virtual_direction(gradients)):
            both = _gradients(problem.val_loss(), [*alphas, *weights], problem.average)
        direct, vector = both[: len(alphas)], both[len(alphas) :]
        if self.product == "exact":
            product = exact_product(problem.train_loss, weights, alphas, vector, problem.average)
        else:
            product = finite_difference_product(
                problem.train_loss, weights, alphas, vector, self.epsilon_scale, problem.average,
                problem.may_overflow,
            )  # fmt: skip
        return list(torch._foreach_add(direct, product, alpha=-problem.xi))


@contextmanager
def virtual_weights(problem: BilevelProblem, direction: Tensors) -> Iterator[None]:
    """Within: weights are w' = w - xi * direction (Eq. 6); after: weights and buffers as before."""
    weights, buffers = list(problem.weights), problem.buffers()
    saved, saved_buffers = _copies(weights), _copies(buffers)
    with torch.no_grad():
        torch._foreach_add_(weights, direction, alpha=-problem.xi)
    try:
        yield
    finally:
        _copy_(weights, saved)
        _copy_(buffers, saved_buffers)


def finite_difference_product(
    loss: Loss,
    weights: Sequence[Tensor],
    alphas: Sequence[Tensor],
    vector: Sequence[Tensor],
    epsilon_scale: float = 0.01,
    average: Average = list,
    may_overflow: bool = False,
) -> Tensors:
    """d2 L / (d alpha d w) . v as a central difference of alpha gradients (Eq. 8).

    Args:
        loss: L of the present values of `weights` and `alphas`; evaluated at w + epsilon v, then
            at w - epsilon v (the order shows in running statistics, and is the official one).
        weights: w, moved in place and put back bit for bit.
        alphas: what is differentiated by.
        vector: v, in the shapes of `weights`.
        epsilon_scale: epsilon = epsilon_scale / ||v||, the norm over all weights.
        average: of `BilevelProblem`; v is the mean over all processes already.
        may_overflow: whether v may be infinite or NaN. Then the product is NaN, but no pass sees
            weights that are, and running statistics stay finite.

    Returns:
        (g+ - g-) / (2 epsilon), in the shapes of `alphas`; zeros where v is zero. Both passes run
        in full precision, autocast or not, and where a relaxation samples they see one sample.
    """
    weights = list(weights)
    # The square of a small gradient is 0 in single precision, but not in double.
    double = None if vector[0].device.type == "mps" else torch.float64  # which has none
    norm = torch.stack(torch._foreach_norm(list(vector), dtype=double)).norm().to(vector[0].dtype)
    # A tensor, not a number: reading it would make a GPU wait. v = 0 gives a finite epsilon.
    epsilon = epsilon_scale / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    step = torch._foreach_mul(list(vector), epsilon)
    if may_overflow:
        step = tuple(torch.where(norm.isfinite(), part, 0.0) for part in step)
    saved = _copies(weights)
    # In half precision the difference of two gradients so close would be noise.
    full_precision = torch.autocast(norm.device.type, enabled=False)
    try:
        with torch.no_grad():
            torch._foreach_add_(weights, step)
        with full_precision, held_constant(weights), _random_numbers_come_again(norm.device):
            plus = _gradients(loss(), alphas, average)
        with torch.no_grad():
            torch._foreach_sub_(weights, step, alpha=2.0)
        with full_precision, held_constant(weights):
            minus = _gradients(loss(), alphas, average)
    finally:
        _copy_(weights, saved)
    return list(torch._foreach_div(torch._foreach_sub(plus, minus), 2.0 * epsilon))


def exact_product(
    loss: Loss,
    weights: Sequence[Tensor],
    alphas: Sequence[Tensor],
    vector: Sequence[Tensor],
    average: Average = list,
) -> Tensors:
    """d2 L / (d alpha d w) . v by differentiating twice (the product in Eq. 7).

    Args:
        loss: L of the present values of `weights` and `alphas`.
        weights: w.
        alphas: what is differentiated by.
        vector: v, in the shapes of `weights`.
        average: of `BilevelProblem`; the product is linear in L, so it alone is averaged.

    Returns:
        The product, in the shapes of `alphas`.
    """
    moving = [(w, v) for w, v in zip(weights, vector, strict=True) if w.requires_grad]
    value = loss()
    if not (moving and value.requires_grad):
        return average([torch.zeros_like(alpha) for alpha in alphas])
    gradients = torch.autograd.grad(
        value, [w for w, _ in moving], create_graph=True, allow_unused=True, materialize_grads=True
    )
    dot = torch.stack([(g * v).sum() for g, (_, v) in zip(gradients, moving, strict=True)]).sum()
    return _gradients(dot, alphas, average)


def sgd_direction(optimizer: torch.optim.Optimizer, gradients: Tensors) -> Tensors:
    """Where SGD would go from here: momentum * buffer + gradient + weight_decay * w.

    Args:
        optimizer: a `torch.optim.SGD` without Nesterov, dampening and maximize.
        gradients: of its parameters, in their order.

    Returns:
        The direction d of w' = w - xi * d; the buffer counts as 0 before the first step.

    Raises:
        UserError: for an optimizer whose step is another.
    """
    check_virtual_step(optimizer)
    direction: Tensors = []
    for group in optimizer.param_groups:
        weights = group["params"]
        steps = gradients[len(direction) : len(direction) + len(weights)]
        with torch.no_grad():
            steps = list(torch._foreach_add(steps, weights, alpha=group["weight_decay"]))
        buffers = [optimizer.state.get(w, {}).get("momentum_buffer") for w in weights]
        moving = [(s, b) for s, b in zip(steps, buffers, strict=True) if b is not None]
        if moving:
            torch._foreach_add_(*map(list, zip(*moving, strict=True)), alpha=group["momentum"])
        # What is frozen is passed by, its weight decay and its momentum too.
        direction += [
            s if w.requires_grad else torch.zeros_like(s)
            for s, w in zip(steps, weights, strict=True)
        ]
    return direction


def check_virtual_step(optimizer: torch.optim.Optimizer) -> None:
    """Raise a UserError unless `sgd_direction` describes the optimizer's step."""
    options = ("nesterov", "dampening", "maximize")
    if not isinstance(optimizer, torch.optim.SGD) or any(
        group[option] for group in optimizer.param_groups for option in options
    ):
        raise UserError(
            "The unrolled hypergradient knows the step of plain SGD (momentum, weight decay; no "
            f"nesterov, dampening or maximize), not of {type(optimizer).__name__}: choose such an "
            "SGD for the weights, or method=darts_first_order."
        )
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) > 1:
        raise UserError(
            "The unrolled hypergradient knows one learning rate, xi, but the optimizer's groups of "
            f"weights have {sorted(rates)}: give them one, or choose method=darts_first_order."
        )


def _random_numbers_come_again(device: torch.device) -> AbstractContextManager[None]:
    """After it, those are drawn again that were drawn within, on the CPU and on this device.

    Of two samples the difference, divided by 2 epsilon, would be noise.
    """
    others = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(others, device_type=device.type)


@contextmanager
def held_constant(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within: leaf tensors take no gradients, so that no pass computes what nobody asked for."""
    held = [tensor for tensor in tensors if tensor.requires_grad]
    for tensor in held:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in held:
            tensor.requires_grad_(True)


def _gradients(loss: Tensor, inputs: Sequence[Tensor], average: Average) -> Tensors:
    """Gradients of the inputs alone; zeros of one that is frozen or not in the loss."""
    moving = [tensor for tensor in inputs if tensor.requires_grad]
    if not (moving and loss.requires_grad):
        return average([torch.zeros_like(tensor) for tensor in inputs])
    found = torch.autograd.grad(loss, moving, allow_unused=True, materialize_grads=True)
    gradients = iter(found)
    return average([next(gradients) if t.requires_grad else torch.zeros_like(t) for t in inputs])


@torch.no_grad()
def _copies(tensors: Sequence[Tensor]) -> Tensors:
    # Times 1: all at once, where a copy each would keep a GPU waiting.
    return list(torch._foreach_mul(list(tensors), 1)) if tensors else []


@torch.no_grad()
def _copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
