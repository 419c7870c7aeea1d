"""The oracle itself, against the numbers of the official implementation, float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.golden_files import load_golden, relative_error, unpack, unpack_state_dict
from tests.literal_darts import Architect, Network, search_step


def build_network(golden: dict, alphas: list) -> Network:
    config = golden["config"]
    network = Network(config["C"], config["classes"], config["layers"]).double()
    network.load_state_dict(unpack_state_dict(golden["state_dict"]))
    for alpha, value in zip(network.arch_parameters(), alphas, strict=True):
        alpha.data.copy_(value)
    return network


def test_the_literal_networks_forward_pass_and_gradients() -> None:
    golden = load_golden("search_forward.pt")
    network = build_network(golden, [golden["alphas_normal"], golden["alphas_reduce"]])
    x, y = golden["input"].double(), golden["target"]
    logits = network(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    assert relative_error(logits, golden["logits"]) < 1e-12
    assert abs(loss.item() - float(golden["loss"])) < 1e-12
    for alpha, kind in zip(network.arch_parameters(), ("normal", "reduce"), strict=True):
        assert relative_error(alpha.grad, golden[f"grad_alphas_{kind}"]) < 1e-11
    parameters = dict(network.named_parameters())
    for name, expected in unpack(golden["grad_weights"]).items():
        assert relative_error(parameters[name].grad, expected) < 1e-11, name
    norms = torch.stack([parameters[name].grad.norm() for name in golden["param_order"]])
    assert relative_error(norms, torch.as_tensor(golden["grad_norm_per_param"])) < 1e-11
    state = network.state_dict()
    for name, expected in unpack_state_dict(golden["buffers_after"]).items():
        assert torch.allclose(state[name].double(), expected.double(), rtol=1e-12, atol=1e-13)
    assert relative_error(network.eval()(x), golden["logits_eval_after"]) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["search_first_order.pt", "search_unrolled.pt"])
def test_five_literal_search_steps(name) -> None:
    golden = load_golden(name)
    config = golden["config"]
    network = build_network(golden, golden["alphas_init"])
    architect = Architect(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9, weight_decay=3e-4)
    for step in range(5):
        (x, y), (val_x, val_y) = golden["train_batches"][step], golden["val_batches"][step]
        loss, logits = search_step(
            network,
            architect,
            optimizer,
            (x.double(), y),
            (val_x.double(), val_y),
            lr=float(config["lrs"][step]),
            unrolled=name == "search_unrolled.pt",
        )
        assert abs(loss.item() - float(golden["train_loss"][step])) < 1e-12
        assert relative_error(logits, golden["train_logits"][step]) < 1e-11
        for alpha, expected in zip(network.arch_parameters(), golden["alphas"][step], strict=True):
            assert (alpha - expected).abs().max() < 1e-12, f"alpha after step {step}"
    state, expected_state = network.state_dict(), unpack_state_dict(golden["final_state_dict"])
    assert state.keys() == expected_state.keys()
    for key, expected in expected_state.items():
        assert (state[key].double() - expected.double()).abs().max() < 1e-12, key
    adam = architect.optimizer.state
    for alpha, first in zip(network.arch_parameters(), golden["adam_exp_avg"], strict=True):
        assert relative_error(adam[alpha]["exp_avg"], first) < 1e-9


def test_the_alphas_are_leaves_that_go_along_and_stand_in_no_state_dict() -> None:
    network = Network(2, 3, 3)
    before = network.arch_parameters()
    network.double()
    for alpha, old in zip(network.arch_parameters(), before, strict=True):
        assert alpha is old
        assert alpha.is_leaf
        assert alpha.requires_grad
        assert alpha.dtype == torch.float64
    assert not any("alpha" in name for name in network.state_dict())
