"""Images as LightningDataModules: halves for a bilevel search, batches that resume exactly."""

from dartsl.data.cifar10 import CIFAR10
from dartsl.data.digits import Digits
from dartsl.data.image_data import ImageDataModule
from dartsl.data.image_folder import ImageFolder, count_classes

__all__ = ["CIFAR10", "Digits", "ImageDataModule", "ImageFolder", "count_classes"]
