"""The LightningModules: the search, and the training of what it found."""

from dartsl.modules.search import SearchModule
from dartsl.modules.train import TrainModule

__all__ = ["SearchModule", "TrainModule"]
