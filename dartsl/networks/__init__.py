"""The two networks of DARTS: the supernet that is searched and the network that is derived."""

from dartsl.networks.final import Cell, FinalNetwork
from dartsl.networks.relaxation import Softmax
from dartsl.networks.supernet import MixedOperation, SearchCell, Supernet

__all__ = ["Cell", "FinalNetwork", "MixedOperation", "SearchCell", "Softmax", "Supernet"]
