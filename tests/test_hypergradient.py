"""The gradient of alpha (section 2.3 of arXiv:1806.09055), against closed forms and autograd.

The example of Fig. 2, L_train = (w - alpha)^2 and L_val = alpha w - 2 alpha + 1, from
(alpha, w) = (2, -2): by hand

    dL_train/dw = 2 (w - alpha)      d2 L_train / (d alpha d w) = -2
    dL_val/d alpha = w - 2           v = dL_val/dw = alpha
    unrolled gradient = (w' - 2) + 2 xi alpha,   w' = w - xi (virtual direction)
"""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dartsl.errors import UserError
from dartsl.hypergradient import (
    BilevelProblem,
    FirstOrder,
    Unrolled,
    check_virtual_step,
    exact_product,
    finite_difference_product,
    sgd_direction,
    virtual_weights,
)
from dartsl.native import build as native
from dartsl.networks import Supernet
from dartsl.search_space import SearchSpace

PRODUCTS = ("finite_difference", "exact")


def scalar(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


def figure_2(w: Tensor, alpha: Tensor, **kwargs) -> BilevelProblem:
    return BilevelProblem(
        train_loss=lambda: ((w - alpha) ** 2).sum(),
        val_loss=lambda: (alpha * w - 2 * alpha + 1).sum(),
        weights=[w],
        alphas=[alpha],
        **kwargs,
    )


# The example of Fig. 2


@pytest.mark.parametrize(("alpha", "w"), [(2.0, -2.0), (0.5, 3.0), (1.0, 1.0)])
def test_first_order_is_the_gradient_at_the_present_weights(alpha, w) -> None:
    (gradient,) = FirstOrder()(figure_2(scalar(w), scalar(alpha)))
    assert gradient.item() == w - 2


def test_first_order_does_not_see_the_training_loss() -> None:
    def forbidden() -> Tensor:
        raise AssertionError

    w, alpha = scalar(1.0), scalar(2.0)
    FirstOrder()(BilevelProblem(forbidden, lambda: (w * alpha).sum(), [w], [alpha], xi=0.5))


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("xi", [0.025, 0.5, 2.0])
@pytest.mark.parametrize(("alpha", "w"), [(2.0, -2.0), (0.5, 3.0), (-1.0, 1.0)])
def test_unrolled_in_closed_form(alpha, w, xi, product) -> None:
    result = Unrolled(product)(figure_2(scalar(w), scalar(alpha), xi=xi))
    virtual = w - xi * 2 * (w - alpha)
    assert result[0].item() == pytest.approx(virtual - 2 + 2 * xi * alpha, abs=1e-9)


@pytest.mark.parametrize("product", PRODUCTS)
def test_unrolled_with_momentum_and_weight_decay_in_closed_form(product) -> None:
    """w' = w - xi (momentum * buffer + gradient + weight decay * w), as the official code."""
    alpha, w, xi, momentum, decay, buffer = 2.0, -2.0, 0.1, 0.9, 0.3, 5.0
    weight = scalar(w)
    optimizer = torch.optim.SGD([weight], lr=xi, momentum=momentum, weight_decay=decay)
    optimizer.state[weight]["momentum_buffer"] = torch.tensor([buffer], dtype=torch.float64)
    problem = figure_2(
        weight, scalar(alpha), xi=xi, virtual_direction=partial(sgd_direction, optimizer)
    )
    virtual = w - xi * (momentum * buffer + 2 * (w - alpha) + decay * w)
    result = Unrolled(product)(problem)
    assert result[0].item() == pytest.approx(virtual - 2 + 2 * xi * alpha, abs=1e-9)


def descend(hypergradient: Callable, xi: float) -> tuple[float, float]:
    """Where Algorithm 1 ends from (alpha, w) = (2, -2); the weights learn at rate 0.25."""
    w, alpha = scalar(-2.0), scalar(2.0)
    for _ in range(300):
        (gradient,) = hypergradient(figure_2(w, alpha, xi=xi))
        with torch.no_grad():
            alpha -= 0.1 * gradient
            w -= 0.25 * 2 * (w - alpha)
    return alpha.item(), w.item()


@pytest.mark.parametrize("product", PRODUCTS)
def test_unrolled_descent_ends_at_the_bilevel_optimum(product) -> None:
    """With xi = 1/2 the virtual step solves the inner problem: w' = alpha."""
    assert descend(Unrolled(product), xi=0.5) == pytest.approx((1.0, 1.0), abs=1e-6)


@pytest.mark.parametrize("hypergradient", [FirstOrder(), Unrolled(), Unrolled("exact")])
def test_descent_with_xi_0_ends_elsewhere(hypergradient) -> None:
    assert descend(hypergradient, xi=0.0) == pytest.approx((2.0, 2.0), abs=1e-6)


def test_descent_with_another_xi_ends_between() -> None:
    """The stationary point is alpha = w = 2 / (1 + 2 xi)."""
    assert descend(Unrolled(), xi=0.1) == pytest.approx((2 / 1.2, 2 / 1.2), abs=1e-6)


# Against double backward through the virtual step, on smooth networks


class SmoothNetwork(nn.Module):
    """Softplus, average pooling and BatchNorm, two operations mixed by alpha in each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(2, 2))
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for alpha, conv, norm in zip(self.alpha, self.convs, self.norms, strict=True):
            weights = torch.softmax(alpha, dim=-1)
            x = weights[0] * norm(conv(F.softplus(x))) + weights[1] * F.avg_pool2d(x, 3, 1, 1)
        return self.classifier(x.mean((2, 3)))

    def arch_parameters(self) -> list[nn.Parameter]:
        return [self.alpha]

    def weight_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name != "alpha"]


def supernet() -> Supernet:
    space = SearchSpace(("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3"), 2)
    # Three cells are the fewest with a normal one: of two, both reduce.
    return Supernet(space, channels=2, num_cells=3, num_classes=3, in_channels=2).double()


def smooth_supernet(monkeypatch) -> Supernet:
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.softplus(x))
    monkeypatch.setattr(native, "is_built", lambda: False)  # its ReLU would be one
    return supernet()


def build(kind: str, monkeypatch) -> tuple[nn.Module, torch.optim.SGD, Tensor, Tensor]:
    """A network, its optimizer after one step (so with momentum), images and labels."""
    torch.manual_seed(3)
    if kind == "small":
        network = SmoothNetwork().double()
    else:
        network = supernet() if kind == "with ReLUs" else smooth_supernet(monkeypatch)
    optimizer = torch.optim.SGD(
        network.weight_parameters(), lr=0.1, momentum=0.9, weight_decay=0.01
    )
    x, y = torch.randn(2, 8, 2, 6, 6, dtype=torch.float64), torch.arange(16).view(2, 8) % 3
    F.cross_entropy(network(x[0]), y[0]).backward()
    optimizer.step()
    network.zero_grad()
    return network, optimizer, x, y


def problem_of(network: nn.Module, optimizer: torch.optim.SGD, x: Tensor, y: Tensor, **kwargs):
    return BilevelProblem(
        train_loss=lambda: F.cross_entropy(network(x[0]), y[0]),
        val_loss=lambda: F.cross_entropy(network(x[1]), y[1]),
        weights=network.weight_parameters(),
        alphas=network.arch_parameters(),
        virtual_direction=partial(sgd_direction, optimizer),
        buffers=lambda: list(network.buffers()),
        **kwargs,
    )


def through_the_virtual_step(
    network: nn.Module, optimizer: torch.optim.SGD, x: Tensor, y: Tensor, xi: float
) -> Sequence[Tensor]:
    """d L_val(w'(alpha), alpha) / d alpha by autograd, w' as a function of alpha (Eq. 6)."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    weights, alphas = network.weight_parameters(), network.arch_parameters()
    loss = F.cross_entropy(network(x[0]), y[0])
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    virtual = {
        names[id(w)]: w - xi * (0.9 * optimizer.state[w]["momentum_buffer"] + g + 0.01 * w)
        for w, g in zip(weights, gradients, strict=True)
    }
    logits = torch.func.functional_call(network, virtual, (x[1],))
    return torch.autograd.grad(F.cross_entropy(logits, y[1]), alphas)


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative, over all alphas."""
    ours, theirs = (torch.cat([g.flatten() for g in gs]) for gs in (actual, expected))
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("kind", ["small", "supernet", "with ReLUs"])
@pytest.mark.parametrize("xi", [0.025, 0.5])
def test_exact_is_double_backward_through_the_virtual_step(kind, xi, monkeypatch) -> None:
    parts = build(kind, monkeypatch)
    expected = through_the_virtual_step(*parts, xi)
    actual = Unrolled("exact")(problem_of(*parts, xi=xi))
    assert distance(actual, expected) < 1e-12


def test_exact_is_the_same_without_the_c_code(monkeypatch) -> None:
    if not native.is_built():
        pytest.skip("no C compiler on this machine")
    found = Unrolled("exact")(problem_of(*build("with ReLUs", monkeypatch), xi=0.5))
    monkeypatch.setattr(native, "is_built", lambda: False)
    expected = Unrolled("exact")(problem_of(*build("with ReLUs", monkeypatch), xi=0.5))
    assert distance(found, expected) < 1e-10


@pytest.mark.parametrize("kind", ["small", "supernet"])
def test_the_finite_difference_agrees_on_a_smooth_network(kind, monkeypatch) -> None:
    parts = build(kind, monkeypatch)
    exact = Unrolled("exact")(problem_of(*parts, xi=0.5))
    first_order = FirstOrder()(problem_of(*parts, xi=0.5))
    # The second-order term matters here: what agrees below is not the first-order gradient.
    assert distance(first_order, exact) > 1e-2
    scales = (1e-2, 1e-3, 1e-4)
    errors = [
        distance(Unrolled(epsilon_scale=scale)(problem_of(*parts, xi=0.5)), exact)
        for scale in scales
    ]
    # A central difference: the error is c * epsilon^2, with the same c at every epsilon.
    assert errors[2] < 1e-7
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(100, rel=0.05)


# The finite difference itself


def quadratic(w: Sequence[Tensor], alpha: Tensor) -> Callable[[], Tensor]:
    """alpha^T (w0, w1): its mixed derivative times v is v, exactly, at any epsilon."""
    return lambda: (alpha * torch.cat(list(w))).sum()


def test_the_difference_is_divided_by_2_epsilon() -> None:
    """(g+ - g-) / 2 * epsilon, seen elsewhere, is epsilon^2 = 1e-4 / ||v||^2 too small."""
    w = [scalar(0.3), scalar(-0.7)]
    alpha = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    vector = [torch.tensor([30.0]).double(), torch.tensor([40.0]).double()]  # norm 50
    (product,) = finite_difference_product(quadratic(w, alpha), w, [alpha], vector)
    assert torch.allclose(product, torch.tensor([30.0, 40.0]).double(), rtol=1e-9)


def test_epsilon_is_the_scale_by_the_norm_over_all_weights_and_plus_comes_first() -> None:
    w = [scalar(0.3), scalar(-0.7)]
    alpha = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    vector = [torch.tensor([3.0]).double(), torch.tensor([4.0]).double()]  # norm 5
    seen = []

    def loss() -> Tensor:
        seen.append([weight.item() for weight in w])
        return quadratic(w, alpha)()

    finite_difference_product(loss, w, [alpha], vector, epsilon_scale=0.01)
    epsilon = 0.01 / 5
    assert seen[0] == pytest.approx([0.3 + 3 * epsilon, -0.7 + 4 * epsilon], abs=1e-15)
    assert seen[1] == pytest.approx([0.3 - 3 * epsilon, -0.7 - 4 * epsilon], abs=1e-15)
    assert len(seen) == 2


def test_the_step_is_as_long_where_gradients_are_small() -> None:
    """The square of 1e-25 is 0 in single precision."""
    w, alpha = torch.zeros(4, requires_grad=True), torch.ones(4, requires_grad=True)
    vector, seen = torch.full((4,), 1e-25), []

    def loss() -> Tensor:
        seen.append(w.detach().clone())
        return (alpha * w).sum()

    (product,) = finite_difference_product(loss, [w], [alpha], [vector])
    assert [step.norm().item() for step in seen] == pytest.approx([0.01, 0.01])
    assert torch.allclose(product, vector, rtol=1e-5, atol=0)


def test_both_passes_of_the_difference_see_one_sample() -> None:
    """Of a relaxation that samples; the random numbers after it are those after one pass."""
    w = [scalar(0.3), scalar(-0.7)]
    alpha = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    vector = [torch.tensor([3.0]).double(), torch.tensor([4.0]).double()]
    samples = []

    def loss() -> Tensor:
        samples.append(torch.rand(2, dtype=torch.float64))
        return (alpha * samples[-1] * torch.cat(w)).sum()

    torch.manual_seed(0)
    (product,) = finite_difference_product(loss, w, [alpha], vector)
    assert torch.allclose(product, samples[0] * torch.cat(vector), rtol=1e-9)
    following = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(samples[0], torch.rand(2, dtype=torch.float64))
    assert torch.equal(following, torch.rand(1))


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_epsilon_does_not_matter_where_the_loss_is_quadratic(scale) -> None:
    w = [scalar(0.3), scalar(-0.7)]
    alpha = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    vector = [torch.tensor([3.0]).double(), torch.tensor([4.0]).double()]
    (product,) = finite_difference_product(quadratic(w, alpha), w, [alpha], vector, scale)
    assert torch.allclose(product, torch.tensor([3.0, 4.0]).double(), rtol=1e-8)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_validation_loss_without_weights_gives_the_direct_gradient(product) -> None:
    """v = 0, where epsilon = 0.01 / ||v|| is infinite."""
    w, alpha = scalar(1.0), scalar(3.0)
    problem = BilevelProblem(
        lambda: (w * alpha).sum(), lambda: (alpha**2).sum(), [w], [alpha], xi=0.1
    )
    assert Unrolled(product)(problem)[0].item() == 6.0


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    "train", ["does not see alpha", "is linear in w alone", "does not see w", "leaves one w out"]
)
def test_what_a_loss_does_not_depend_on_counts_as_0(train, product) -> None:
    w, unused, alpha = scalar(1.0), scalar(5.0), scalar(3.0)
    train_loss = {
        "does not see alpha": lambda: (w**2).sum(),
        "is linear in w alone": lambda: w.sum(),
        "does not see w": lambda: (alpha**2).sum(),
        "leaves one w out": lambda: (w**2).sum() + (unused * 0).sum(),
    }[train]
    problem = BilevelProblem(train_loss, lambda: (w * alpha).sum(), [w, unused], [alpha], xi=0.5)
    slope = {"is linear in w alone": 1.0, "does not see w": 0.0}.get(train, 2.0)
    # No mixed derivative: only the move to w' = 1 - slope / 2 is left.
    assert Unrolled(product)(problem)[0].item() == pytest.approx(1 - slope / 2)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_training_loss_that_is_a_constant_leaves_the_direct_gradient(product) -> None:
    w, alpha = scalar(2.0), scalar(3.0)
    constant = torch.tensor(1.0, dtype=torch.float64)
    problem = BilevelProblem(lambda: constant, lambda: (w * alpha**2).sum(), [w], [alpha], xi=0.5)
    assert Unrolled(product)(problem)[0].item() == pytest.approx(2 * 2 * 3)


@pytest.mark.parametrize("hypergradient", [FirstOrder(), Unrolled(), Unrolled("exact")])
def test_a_frozen_weight_counts_as_a_constant(hypergradient) -> None:
    w, alpha, frozen = scalar(2.0), scalar(3.0), scalar(0.7).requires_grad_(False)

    def gradient(*weights: Tensor) -> float:
        sgd = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.5)
        for weight in weights:
            sgd.state[weight]["momentum_buffer"] = torch.ones_like(weight)
        problem = BilevelProblem(
            train_loss=lambda: (frozen * w**2 * alpha**2).sum(),
            val_loss=lambda: (frozen * w**3 * alpha).sum(),
            weights=weights,
            alphas=[alpha],
            xi=0.1,
            virtual_direction=partial(sgd_direction, sgd),
        )
        return hypergradient(problem)[0].item()

    expected = gradient(w)
    assert gradient(frozen, w) == pytest.approx(expected, rel=1e-12)
    assert gradient(w, frozen) == pytest.approx(expected, rel=1e-12)
    assert frozen.item() == 0.7
    assert not frozen.requires_grad


@pytest.mark.parametrize("product", [exact_product, finite_difference_product])
def test_of_weights_that_are_all_frozen_the_product_is_zero(product) -> None:
    w, alpha = scalar(2.0).requires_grad_(False), scalar(3.0)
    vector = [torch.zeros_like(w)]
    assert product(lambda: (w * alpha**2).sum(), [w], [alpha], vector)[0].item() == 0


def test_the_exact_product_of_a_known_mixed_derivative() -> None:
    w, alpha = scalar(2.0), scalar(3.0)
    (product,) = exact_product(
        lambda: (w**3 * alpha**2).sum(), [w], [alpha], [torch.tensor([0.5]).double()]
    )
    assert product.item() == pytest.approx(3 * 2**2 * 2 * 3 * 0.5)


# What a call leaves behind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hypergradient", [FirstOrder(), Unrolled(), Unrolled("exact")])
def test_weights_and_alphas_are_left_bit_for_bit(hypergradient, dtype, monkeypatch) -> None:
    network, optimizer, x, y = build("small", monkeypatch)
    network, x = network.to(dtype), x.to(dtype)
    optimizer.state.clear()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    pointers = [parameter.data_ptr() for parameter in network.parameters()]
    hypergradient(problem_of(network, optimizer, x, y, xi=0.3))
    for parameter, value, pointer in zip(network.parameters(), before, pointers, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.data_ptr() == pointer
        assert parameter.requires_grad


@pytest.mark.parametrize("hypergradient", [FirstOrder(), Unrolled(), Unrolled("exact")])
def test_no_grad_is_touched(hypergradient, monkeypatch) -> None:
    """Kept references to .grad alias in other implementations, and the term becomes 0."""
    parts = build("small", monkeypatch)
    parameters = list(parts[0].parameters())
    parameters[0].grad = kept = torch.full_like(parameters[0], 7.0)
    hypergradient(problem_of(*parts, xi=0.3))
    assert parameters[0].grad is kept
    assert (kept == 7.0).all()
    assert all(parameter.grad is None for parameter in parameters[1:])


def test_the_gradients_of_two_calls_do_not_share_memory(monkeypatch) -> None:
    parts = build("small", monkeypatch)
    first = Unrolled()(problem_of(*parts, xi=0.3))[0]
    value = first.clone()
    second = Unrolled()(problem_of(*parts, xi=0.0))[0]
    assert torch.equal(first, value)
    assert not torch.equal(first, second)
    assert not first.requires_grad


def test_the_momentum_buffer_is_left_as_it_was(monkeypatch) -> None:
    network, optimizer, x, y = build("small", monkeypatch)
    buffers = [optimizer.state[w]["momentum_buffer"] for w in network.weight_parameters()]
    before = [buffer.clone() for buffer in buffers]
    Unrolled()(problem_of(network, optimizer, x, y, xi=0.3))
    assert all(torch.equal(now, then) for now, then in zip(buffers, before, strict=True))


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_weights_are_put_back_when_a_pass_fails(failing, monkeypatch) -> None:
    network, optimizer, x, y = build("small", monkeypatch)
    before = [weight.detach().clone() for weight in network.weight_parameters()]
    passes = 0

    def fail(*_) -> None:
        nonlocal passes
        passes += 1
        if passes == failing:
            raise MemoryError

    network.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        Unrolled()(problem_of(network, optimizer, x, y, xi=0.3))
    for weight, value in zip(network.weight_parameters(), before, strict=True):
        assert torch.equal(weight, value)


def running(network: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in network.buffers()]


def test_running_statistics_of_first_order_are_those_of_the_validation_pass(monkeypatch) -> None:
    parts = build("small", monkeypatch)
    network, _, x, _ = parts
    state = {name: value.clone() for name, value in network.state_dict().items()}
    FirstOrder()(problem_of(*parts))
    ours = running(network)
    network.load_state_dict(state)
    network(x[1])
    for actual, expected in zip(ours, running(network), strict=True):
        assert torch.equal(actual, expected)


def test_running_statistics_of_unrolled_are_those_of_three_training_passes(monkeypatch) -> None:
    """At w, w + epsilon v and w - epsilon v; those of the virtual weights are discarded."""
    parts = build("small", monkeypatch)
    network, optimizer, x, y = parts
    xi, weights = 0.5, network.weight_parameters()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    Unrolled()(problem_of(*parts, xi=xi))
    ours = running(network)

    network.load_state_dict(state)
    gradients = torch.autograd.grad(F.cross_entropy(network(x[0]), y[0]), weights)
    after_first = running(network)
    values = [weight.detach().clone() for weight in weights]
    direction = [
        0.9 * optimizer.state[w]["momentum_buffer"] + g + 0.01 * w.detach()
        for w, g in zip(weights, gradients, strict=True)
    ]
    for weight, d in zip(weights, direction, strict=True):
        weight.data -= xi * d
    vector = torch.autograd.grad(F.cross_entropy(network(x[1]), y[1]), weights)
    for buffer, value in zip(network.buffers(), after_first, strict=True):
        buffer.copy_(value)
    epsilon = 0.01 / torch.cat([v.flatten() for v in vector]).norm()
    for sign in (1, -1):
        for weight, value, v in zip(weights, values, vector, strict=True):
            weight.data = value + sign * epsilon * v
        network(x[0])
    for actual, expected in zip(ours, running(network), strict=True):
        assert torch.allclose(actual.double(), expected.double(), rtol=1e-12)
    assert network.norms[0].num_batches_tracked == 1 + 3  # one of `build`


def test_virtual_weights_hold_within_only(monkeypatch) -> None:
    network, optimizer, x, y = build("small", monkeypatch)
    problem = problem_of(network, optimizer, x, y, xi=0.5)
    weights = network.weight_parameters()
    before = [weight.detach().clone() for weight in weights]
    with virtual_weights(problem, [torch.ones_like(weight) for weight in weights]):
        for weight, value in zip(weights, before, strict=True):
            assert torch.allclose(weight, value - 0.5)
    for weight, value in zip(weights, before, strict=True):
        assert torch.equal(weight, value)


@pytest.mark.parametrize("product", PRODUCTS)
def test_xi_0_is_first_order(product, monkeypatch) -> None:
    parts = build("small", monkeypatch)
    first_order = FirstOrder()(problem_of(*parts))[0]
    assert torch.equal(Unrolled(product)(problem_of(*parts, xi=0.0))[0], first_order)


# The virtual step of the weights' optimizer


def test_the_momentum_buffer_counts_as_0_before_the_first_step() -> None:
    w = scalar(2.0)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, weight_decay=0.5)
    (direction,) = sgd_direction(optimizer, [torch.tensor([3.0]).double()])
    assert direction.item() == 3.0 + 0.5 * 2.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_direction_is_where_sgd_goes(steps, momentum) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3).double()), nn.Parameter(torch.randn(2).double())]
    groups = [
        {"params": parameters[:1], "weight_decay": 0.0},
        {"params": parameters[1:], "weight_decay": 0.3},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=momentum)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    gradients = [parameter.grad.clone() for parameter in parameters]
    direction = sgd_direction(optimizer, gradients)
    expected = [p.detach() - 0.1 * d for p, d in zip(parameters, direction, strict=True)]
    optimizer.step()
    for parameter, value in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter, value, rtol=1e-14)


@pytest.mark.parametrize(
    "factory",
    [
        torch.optim.Adam,
        torch.optim.RMSprop,
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.1),
        partial(torch.optim.SGD, lr=0.1, maximize=True),
    ],
)
def test_an_optimizer_of_another_step_is_refused(factory) -> None:
    optimizer = factory([scalar(1.0)])
    with pytest.raises(UserError, match=rf"{type(optimizer).__name__}.*darts_first_order"):
        check_virtual_step(optimizer)
    with pytest.raises(UserError):
        sgd_direction(optimizer, [torch.ones(1)])


def test_groups_of_several_learning_rates_are_refused() -> None:
    """Which one virtual step of length xi is not."""
    groups = [{"params": [scalar(1.0)]}, {"params": [scalar(2.0)], "lr": 0.2}]
    with pytest.raises(UserError, match=r"one learning rate, xi, .* have \[0\.1, 0\.2\]"):
        check_virtual_step(torch.optim.SGD(groups, lr=0.1))
    groups[1] |= {"lr": 0.1, "weight_decay": 0.3}
    check_virtual_step(torch.optim.SGD(groups, lr=0.1))


# What a person may misspell


def test_a_misspelt_product_names_the_choices() -> None:
    with pytest.raises(UserError, match=r"product 'exakt'.*'exact'\? Choices: exact, finite_diff"):
        Unrolled("exakt")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.0, -0.01, float("nan"), float("inf")])
def test_an_epsilon_scale_is_positive_and_finite(scale) -> None:
    with pytest.raises(UserError, match=r"epsilon_scale is .*; it must be positive and finite"):
        Unrolled(epsilon_scale=scale)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_reaches_no_running_statistics(bad) -> None:
    """The step of alpha is skipped for it, but what BatchNorm has seen would stay NaN."""
    torch.manual_seed(0)
    norm, x = nn.BatchNorm1d(3).double(), torch.randn(8, 3, dtype=torch.float64)
    weights, alpha = [torch.randn(3, 3, dtype=torch.float64, requires_grad=True)], scalar(0.5)
    vector = [torch.ones_like(weights[0])]
    vector[0][1, 1] = bad
    before = weights[0].detach().clone()

    def loss() -> Tensor:
        return (alpha * norm(x @ weights[0])).square().sum()

    (product,) = finite_difference_product(loss, weights, [alpha], vector, may_overflow=True)
    assert product.isnan().all()
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()
    assert norm.num_batches_tracked == 2
    assert torch.equal(weights[0], before)
