"""Checkpoints of the official code (quark0/darts), both ways.

The modules carry the official submodule names but for one: what the official code calls `_ops` is
`operations` in a final cell. In a search cell it is `sources` and, within, `operations`: the
operations of all edges that leave one node are merged, and so are their tensors.
"""

import re
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dartsl.errors import UserError
from dartsl.modules.resumable import check_same_tensors
from dartsl.networks import FinalNetwork, SearchCell, Supernet
from dartsl.networks.merged import PerEdge

_MERGED = re.compile(
    r"(?P<operation>(?P<cell>cells\.\d+)\.sources\.(?P<source>\d+)\.operations\.(?P<primitive>\d+))"
    r"\.(?P<rest>.+)"
)
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
    if len(alphas) != len(supernet.alphas):
        raise UserError(f"Expected alphas of {', '.join(supernet.alphas)}, not {len(alphas)}.")
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
    _load(network, state_dict, "the one given")


def official_state_dict(model: Supernet | FinalNetwork) -> dict[str, Tensor]:
    """Weights and buffers under the official names; alphas are not among them."""
    state = official_tensors(model, model.state_dict())
    return {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }


def official_gradients(model: Supernet | FinalNetwork) -> dict[str, Tensor]:
    """The `.grad` of the weights under the official names; weights without one are left out."""
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return official_tensors(model, {k: v for k, v in gradients.items() if v is not None})


def official_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official name -> tensor, itself or a view of one, of `tensors` under our names."""
    official: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        merged = _MERGED.fullmatch(name)
        if merged is not None:
            official |= _edge_tensors(model, merged, tensor)
        elif not name.startswith(_SEARCHED):
            official[name.replace(".operations.", "._ops.")] = tensor
    return official


def _edge_tensors(model: nn.Module, name: re.Match[str], tensor: Tensor) -> dict[str, Tensor]:
    """The tensor's parts by official name: one for each edge, along the first dimension."""
    cell = cast(SearchCell, model.get_submodule(name["cell"]))
    edges = cell.rows[int(name["source"])]
    operation = model.get_submodule(name["operation"])
    rest = name["rest"]
    if isinstance(operation, PerEdge):
        number, rest = rest.split(".", 1)
        parts = {edges[int(number)]: tensor}
    else:
        # Of a counter, one number for each edge.
        by_edge = tensor.unbind() if rest.endswith(_COUNTER) else tensor.chunk(len(edges))
        parts = dict(zip(edges, by_edge, strict=True))
    prefix, primitive = f"{name['cell']}._ops", name["primitive"]
    return {f"{prefix}.{edge}._ops.{primitive}.{rest}": part for edge, part in parts.items()}


def _load(model: nn.Module, state_dict: Mapping[str, Tensor], name: str) -> None:
    targets = official_tensors(model, model.state_dict())
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
