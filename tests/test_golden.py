"""Parity with the official implementation, float64, through the Public API."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from dartsl.genotype import Genotype
from dartsl.hypergradient import FirstOrder, Unrolled
from dartsl.interop import (
    load_official_network,
    load_official_supernet,
    official_gradients,
    official_state_dict,
)
from dartsl.modules import SearchModule
from dartsl.networks import FinalNetwork, Supernet
from dartsl.search_space import SearchSpace, discretize
from tests.golden_files import load_golden, relative_error, unpack, unpack_state_dict


def build_supernet(golden: dict, alphas: list) -> Supernet:
    config = golden["config"]
    supernet = Supernet(SearchSpace(), config["C"], config["layers"], config["classes"]).double()
    load_official_supernet(supernet, unpack_state_dict(golden["state_dict"]), alphas)
    return supernet


def test_supernet_forward_and_gradients() -> None:
    golden = load_golden("search_forward.pt")
    supernet = build_supernet(golden, [golden["alphas_normal"], golden["alphas_reduce"]])
    x, y = golden["input"].double(), golden["target"]
    logits = supernet(x)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    assert relative_error(logits, golden["logits"]) < 1e-10
    assert abs(loss.item() - float(golden["loss"])) < 1e-10
    for alpha, kind in zip(supernet.arch_parameters(), ("normal", "reduce"), strict=True):
        assert relative_error(alpha.grad, golden[f"grad_alphas_{kind}"]) < 1e-10
    gradients = official_gradients(supernet)
    expected_gradients = unpack(golden["grad_weights"])
    for name, expected in expected_gradients.items():
        assert relative_error(gradients[name], expected) < 1e-10, name
    norms = torch.stack([gradients[name].norm() for name in golden["param_order"]])
    assert relative_error(norms, torch.as_tensor(golden["grad_norm_per_param"])) < 1e-10
    state = official_state_dict(supernet)
    for name, expected in unpack_state_dict(golden["buffers_after"]).items():
        assert torch.allclose(state[name].double(), expected.double(), rtol=1e-10, atol=1e-12)
    supernet.eval()
    assert relative_error(supernet(x), golden["logits_eval_after"]) < 1e-10


class Recorder(pl.Callback):
    """Sets the learning rate of each step, and keeps the alphas and genotype after it."""

    def __init__(self, learning_rates: list[float]) -> None:
        self.learning_rates = learning_rates
        self.alphas: list[list[torch.Tensor]] = []
        self.genotypes: list[Genotype] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        for group in pl_module.optimizers()[0].param_groups:
            group["lr"] = self.learning_rates[batch_idx]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        supernet = pl_module.supernet
        self.alphas.append([alpha.detach().clone() for alpha in supernet.arch_parameters()])
        self.genotypes.append(supernet.genotype())
        self.losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))


@pytest.mark.parametrize(
    ("name", "hypergradient"),
    [("search_first_order.pt", FirstOrder()), ("search_unrolled.pt", Unrolled())],
)
def test_five_search_steps(name, hypergradient, tmp_path) -> None:
    golden = load_golden(name)
    config = golden["config"]
    supernet = build_supernet(golden, golden["alphas_init"])
    module = SearchModule(
        supernet,
        hypergradient,
        partial(torch.optim.SGD, lr=1.0, momentum=0.9, weight_decay=3e-4),
        partial(torch.optim.Adam, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3),
    )
    batches = [
        {"train": (x.double(), y), "val": (val_x.double(), val_y)}
        for (x, y), (val_x, val_y) in zip(
            golden["train_batches"], golden["val_batches"], strict=True
        )
    ]
    recorder = Recorder([float(lr) for lr in config["lrs"]])
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, train_dataloaders=torch.utils.data.DataLoader(batches, batch_size=None))

    assert trainer.global_step == len(batches)
    for step, (alphas, expected) in enumerate(zip(recorder.alphas, golden["alphas"], strict=True)):
        for actual, target in zip(alphas, expected, strict=True):
            assert (actual - target).abs().max() < 1e-10, f"alpha after step {step}"
    for actual, target in zip(recorder.losses, golden["train_loss"], strict=True):
        assert abs(actual - float(target)) < 1e-10
    for actual, (normal, normal_concat, reduce, reduce_concat) in zip(
        recorder.genotypes, golden["genotype"], strict=True
    ):
        assert actual == Genotype(normal, normal_concat, reduce, reduce_concat)
    state = official_state_dict(supernet)
    expected_state = unpack_state_dict(golden["final_state_dict"])
    assert state.keys() == expected_state.keys()
    for key, target in expected_state.items():
        assert (state[key].double() - target.double()).abs().max() < 1e-9, key
    adam = trainer.optimizers[1].state
    for alpha, first, second in zip(
        supernet.arch_parameters(), golden["adam_exp_avg"], golden["adam_exp_avg_sq"], strict=True
    ):
        assert torch.allclose(adam[alpha]["exp_avg"], first, rtol=1e-9, atol=1e-12)
        assert torch.allclose(adam[alpha]["exp_avg_sq"], second, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("eval_forward_cifar_DARTS_V1.pt", "cifar"),
        ("eval_forward_cifar_DARTS_V2.pt", "cifar"),
        ("eval_forward_imagenet_DARTS_V2.pt", "imagenet"),
    ],
)
def test_final_network(name, stem) -> None:
    golden = load_golden(name)
    config = golden["config"]
    genotype = Genotype(
        golden["genotype_normal"],
        golden["normal_concat"],
        golden["genotype_reduce"],
        golden["reduce_concat"],
    )
    network = FinalNetwork(
        genotype, config["C"], config["layers"], config["classes"], stem=stem
    ).double()
    load_official_network(network, unpack_state_dict(golden["state_dict"]))
    x, y = golden["input"].double(), golden["target"]
    logits, auxiliary = network.eval()(x)
    assert auxiliary is None
    assert relative_error(logits, golden["logits_eval"]) < 1e-10

    logits, auxiliary = network.train()(x)
    assert relative_error(logits, golden["logits_train"]) < 1e-10
    assert relative_error(auxiliary, golden["aux_logits_train"]) < 1e-10
    loss, auxiliary_loss = F.cross_entropy(logits, y), F.cross_entropy(auxiliary, y)
    assert abs(loss.item() - float(golden["loss"])) < 1e-10
    assert abs(auxiliary_loss.item() - float(golden["aux_loss"])) < 1e-10
    total = loss + config["auxiliary_weight"] * auxiliary_loss
    assert abs(total.item() - float(golden["total_loss"])) < 1e-10
    total.backward()
    gradients = official_gradients(network)
    norms = torch.stack([gradients[key].norm() for key in golden["param_order"]])
    assert relative_error(norms, torch.as_tensor(golden["grad_norm_per_param"])) < 1e-9


def test_discretization_of_every_published_case() -> None:
    golden = load_golden("genotype_parse.pt")
    for case in golden["cases"] + golden["tie_cases"]:
        strengths = {
            "normal": torch.softmax(case["alphas_normal"].double(), dim=-1),
            "reduce": torch.softmax(case["alphas_reduce"].double(), dim=-1),
        }
        assert discretize(strengths, SearchSpace()) == Genotype(**case["genotype"])
