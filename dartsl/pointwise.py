"""A pointwise convolution, its BatchNorm and a ReLU as one operation, which is fast on a CPU.

Shapes: B images, H x W pixels, G groups of I inputs and O outputs.

One after the other, they read and write their maps ten times in a forward and backward pass, and a
CPU waits for its memory. `dartsl.native` passes over them fewer times, in training, where it is
built; everywhere else PyTorch's functions are called. The function is the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.native import pointwise as native


def is_pointwise(layer: nn.Module) -> bool:
    """Whether it is a convolution of single pixels, without bias and stride."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.bias is None
    )


def normalized_pointwise(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    scale: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    rectify: bool = False,
    addend: Tensor | None = None,
) -> Tensor:
    """`relu(batch_norm(conv2d(x, weight))) + addend`, the ReLU only if `rectify`.

    Args:
        x: [B, G I, H, W].
        weight: of the convolution in G groups, [G O, I, 1, 1].
        running_mean: of the BatchNorm, [G O]; in training it follows the batch's.
        running_var: the same of the variance.
        scale: the weight of the BatchNorm, [G O]; None for 1.
        training: whether the batch's statistics normalize, not the running ones.
        momentum: of the running statistics.
        eps: is added to the variance.
        rectify: whether a ReLU comes after the BatchNorm.
        addend: [B, G O, H, W]; None for 0.

    Returns:
        [B, G O, H, W].
    """
    # Autocast chooses a precision for each of the operations.
    alone = training and not torch.is_autocast_enabled("cpu")
    if alone and native.can_normalize(x, weight, scale, addend):
        output, statistics = NormalizedPointwise.apply(x, weight, scale, addend, eps, rectify)
        mean, _, var = statistics.unbind()
        torch._foreach_lerp_([running_mean, running_var], [mean, var], momentum)
        return output
    groups = x.shape[1] // weight.shape[1]
    convolved = F.conv2d(x, weight, groups=groups)
    output = F.batch_norm(
        convolved, running_mean, running_var, scale, None, training, momentum, eps
    )
    output = F.relu(output) if rectify else output
    return output if addend is None else output + addend


class NormalizedPointwise(torch.autograd.Function):
    """`normalized_pointwise` in training, and the statistics of the batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        addend: Tensor | None,
        eps: float,
        rectify: bool,
    ) -> tuple[Tensor, Tensor]:
        """Output [B, G O, H, W]; mean, 1 / sqrt(var + eps), variance without bias [3, G O]."""
        output, y, statistics = native.normalized_pointwise(x, weight, scale, addend, eps, rectify)
        ctx.save_for_backward(x, weight, scale, y, statistics)
        ctx.eps, ctx.rectify = eps, rectify
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return output, statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, scale and addend, as far as they are wanted."""
        gradient, _ = gradients
        if gradient is None:
            return (None,) * 6
        x, weight, scale, y, statistics = ctx.saved_tensors
        *wanted, addend_wanted = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            found = _differentiable_gradients(gradient, x, weight, scale, ctx.eps, ctx.rectify)
        else:
            found = native.normalized_pointwise_backward(
                gradient, x, weight, scale, y, statistics, ctx.rectify, wanted
            )
        of_inputs = (single if want else None for single, want in zip(found, wanted, strict=True))
        return *of_inputs, gradient if addend_wanted else None, None, None


def _differentiable_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, rectify: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and scale that can be differentiated again, by PyTorch's functions."""
    inputs = [x, weight] if scale is None else [x, weight, scale]
    # Views: the gradients end here, even where one of the inputs is made from another.
    inputs = [tensor.view_as(tensor).requires_grad_() for tensor in inputs]
    convolved = F.conv2d(inputs[0], inputs[1], groups=x.shape[1] // weight.shape[1])
    normalized = F.batch_norm(convolved, None, None, *inputs[2:], training=True, eps=eps)
    output = F.relu(normalized) if rectify else normalized
    found = torch.autograd.grad(output, inputs, gradient, create_graph=True)
    return found if scale is not None else (*found, None)
