"""What supernet and final network share: where cells reduce, and how they take their inputs."""

from dartsl.errors import UserError
from dartsl.genotype import is_whole_number
from dartsl.operations import FactorizedReduce, ReLUConvBN

_LARGEST = 65_536  # beyond any network; torch fails on what is no 64-bit number


def check_sizes(**sizes: int) -> None:
    """Raise a UserError for a size of a network, given by name, that is below 1 or absurd."""
    for name, value in sizes.items():
        if not is_whole_number(value):
            raise UserError(f"{name} is {value!r}; it is a whole number.")
        if value < 1:
            raise UserError(f"{name} is {value}; it is at least 1.")
        if value > _LARGEST:
            raise UserError(f"{name} is {value}; it is at most {_LARGEST:,}.")


def reduction_cells(num_cells: int) -> frozenset[int]:
    """Indices of the cells that halve the size and double the channels (section 3.1.1)."""
    return frozenset({num_cells // 3, 2 * num_cells // 3})


def preprocess_previous_previous(
    channels_in: int, channels: int, reduction_prev: bool, affine: bool, rectified: bool = False
) -> ReLUConvBN | FactorizedReduce:
    """Brings a cell's first input to its channels, and to its size after a reduction cell."""
    if reduction_prev:
        return FactorizedReduce(channels_in, channels, affine, rectified)
    return ReLUConvBN(channels_in, channels, affine=affine, rectified=rectified)
