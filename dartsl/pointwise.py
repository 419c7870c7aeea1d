"""A pointwise convolution, its BatchNorm and a ReLU as one operation, which is fast on a CPU.

Shapes: B images, H x W pixels, G groups of I inputs and O outputs.

A CPU waits for its memory, and one after the other they pass over their maps many times.
`dartsl.native` passes over them fewer times. The function is the same.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.native import pointwise as native


def is_pointwise(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution of single pixels, without bias and stride."""
    return (
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == layer.stride == (1, 1)
        and layer.padding == (0, 0)
        and layer.bias is None
    )


def can_normalize(x: Tensor, weight: Tensor, scale: Tensor | None, addend: Tensor | None) -> bool:
    """Whether `normalized_pointwise` takes these here."""
    # Autocast chooses a precision for each of the operations.
    autocast = torch.is_autocast_enabled("cpu")
    return not autocast and native.can_normalize(x, weight, scale, addend)


def normalized_pointwise(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    scale: Tensor | None = None,
    addend: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    rectify: bool = False,
) -> Tensor:
    """`relu(batch_norm(conv2d(x, weight))) + addend` in training, the ReLU only if `rectify`.

    Args:
        x: [B, G I, H, W].
        weight: of the convolution in G groups, [G O, I, 1, 1].
        running_mean: of the BatchNorm, [G O]; it follows the batch's.
        running_var: the same of the variance.
        scale: the weight of the BatchNorm, [G O]; None for 1.
        addend: [B, G O, H, W]; None for 0.
        momentum: of the running statistics.
        eps: is added to the variance.
        rectify: whether a ReLU comes after the BatchNorm.

    Returns:
        [B, G O, H, W].
    """
    output, _, statistics = NormalizedPointwise.apply(x, weight, scale, addend, eps, rectify)
    mean, _, var = statistics.unbind()
    torch._foreach_lerp_([running_mean, running_var], [mean, var], momentum)
    return output


class NormalizedPointwise(torch.autograd.Function):
    """`normalized_pointwise` in training, with the convolution and the statistics of the batch.

    x is kept for the gradient of the weight alone: the passes of a search that take gradients of
    alpha keep much less. All else follows from the convolution, which is an output so that second
    derivatives find their way through it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        addend: Tensor | None,
        eps: float,
        rectify: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output and convolution [B, G O, H, W], statistics [3, G O] (see `dartsl.native`)."""
        output, y, statistics = native.normalized_pointwise(x, weight, scale, addend, eps, rectify)
        kept = x if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, weight, scale, y, statistics)
        ctx.eps, ctx.rectify, ctx.groups = eps, rectify, x.shape[1] // weight.shape[1]
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return output, y, statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, scale and addend, as far as they are wanted."""
        gradient, of_y, _ = gradients
        x, weight, scale, y, statistics = ctx.saved_tensors
        *wanted, addend_wanted = ctx.needs_input_grad[:4]
        if gradient is None and of_y is None:
            return (None,) * 6
        of_scale = None
        found: Sequence[Tensor | None]
        if of_y is None and not torch.is_grad_enabled():
            found = native.normalized_pointwise_backward(
                gradient, x, weight, scale, y, statistics, ctx.groups, ctx.rectify, wanted
            )
        else:
            if gradient is not None:
                more, of_scale = _gradients_of_norm(gradient, y, scale, ctx.eps, ctx.rectify)
                of_y = more if of_y is None else of_y + more
            found = *_gradients_of_convolution(of_y, x, weight, ctx.groups), of_scale
        of_inputs = (single if want else None for single, want in zip(found, wanted, strict=True))
        return *of_inputs, gradient if addend_wanted else None, None, None


def _gradients_of_norm(
    gradient: Tensor, y: Tensor, scale: Tensor | None, eps: float, rectify: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of y [B, G O, H, W] and scale [G O]; they can be differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: the gradients end here, even where one of them is made from another.
        inputs = [t.view_as(t).requires_grad_() for t in (y, scale) if t is not None]
        weight = None if scale is None else inputs[1]
        output = F.batch_norm(inputs[0], None, None, weight, None, True, 0.0, eps)
        output = F.relu(output) if rectify else output
        found = torch.autograd.grad(output, inputs, gradient, create_graph=again)
    return found[0], None if scale is None else found[1]


def _gradients_of_convolution(
    gradient: Tensor, x: Tensor | None, weight: Tensor, groups: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x [B, G I, H, W], and of weight [G O, I, 1, 1] where there is x."""
    of_x = F.conv_transpose2d(gradient, weight, groups=groups)
    if x is None:
        return of_x, None
    by_group = (tensor.unflatten(1, (groups, -1)) for tensor in (gradient, x))
    return of_x, torch.einsum("bgohw,bgihw->goi", *by_group).reshape(weight.shape)
