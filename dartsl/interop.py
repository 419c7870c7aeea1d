"""Checkpoints of the official code (quark0/darts), both ways.

The modules carry the official submodule names but for one: what the official code calls `_ops` is
`edges` in a search cell and `operations` in a mixed operation and a final cell.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dartsl.errors import UserError
from dartsl.modules.resumable import check_same_tensors
from dartsl.networks import FinalNetwork, Supernet

_OURS_TO_OFFICIAL = re.compile(r"\.(?:edges|operations)\.(?=\d)")
_SEARCHED = ("alphas.", "relaxations.")  # in no state_dict of the official code
_COUNTER = "num_batches_tracked"


def load_official_supernet(
    supernet: Supernet, state_dict: Mapping[str, Tensor], alphas: Sequence[Tensor]
) -> None:
    """Load the official search network's weights, buffers and alphas [normal, reduce], strictly.

    Args:
        supernet: of the same size.
        state_dict: official key names; `num_batches_tracked` may be missing.
        alphas: raw alpha of the normal and the reduction cell, [E, P] each.

    Raises:
        UserError: where names or shapes differ.
    """
    named = dict(zip(supernet.alphas, alphas, strict=True))
    check_same_tensors(dict(supernet.alphas), named, "this supernet")
    _load(supernet, state_dict, "this supernet")
    with torch.no_grad():
        for kind, alpha in named.items():
            supernet.alphas[kind].copy_(alpha)


def load_official_network(network: FinalNetwork, state_dict: Mapping[str, Tensor]) -> None:
    """Load the official evaluation network's weights and buffers, strictly.

    Args:
        network: of the same genotype and size.
        state_dict: official key names; `num_batches_tracked` may be missing, as in the published
            files.

    Raises:
        UserError: where names or shapes differ.
    """
    _load(network, state_dict, "this network")


def official_state_dict(model: Supernet | FinalNetwork) -> dict[str, Tensor]:
    """Weights and buffers under the official names; alphas are not among them."""
    return {
        official: tensor.detach().clone()
        for official, tensor in _official(model.state_dict(keep_vars=True)).items()
    }


def official_gradients(model: Supernet | FinalNetwork) -> dict[str, Tensor]:
    """The `.grad` of the weights under the official names; weights without one are left out."""
    return {
        official: parameter.grad
        for official, parameter in _official(dict(model.named_parameters())).items()
        if parameter.grad is not None
    }


def _official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        _OURS_TO_OFFICIAL.sub("._ops.", name): tensor
        for name, tensor in tensors.items()
        if not name.startswith(_SEARCHED)
    }


def _load(model: nn.Module, state_dict: Mapping[str, Tensor], name: str) -> None:
    targets = _official(model.state_dict(keep_vars=True))
    # Old files have no counters of BatchNorm batches: then ours stay as they are.
    expected = {
        key: value
        for key, value in targets.items()
        if key in state_dict or not key.endswith(_COUNTER)
    }
    if not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise UserError("A state_dict holds tensors only; this file holds something else.")
    check_same_tensors(expected, dict(state_dict), name)
    with torch.no_grad():
        for key, target in expected.items():
            target.copy_(state_dict[key])
