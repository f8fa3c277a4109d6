"""emqlib: one network, trained once, run at any bit-width.

A companion to *Efficient Multi-bit Quantization Network Training via Weight Bias Correction and Bit-wise Coreset
Sampling* (Kim, An, Jeon, Ko; NeurIPS 2025; arXiv 2510.20673).

Letters in shapes: B batch, N samples, C classes or channels, T observed epochs, O and I output and input channels.
"""

from . import coreset, correction, models, quantizers
from .convert import at_bits, convert, set_bits, summary
from .deploy.freeze import freeze
from .deploy.io import load, save
from .deploy.onnx import export_onnx
from .deploy.pack import pack
from .layers import QuantSpec
from .train.config import CoresetConfig, TrainConfig, recipe
from .train.coresets import Coresets
from .train.data import Dataset
from .train.evaluate import adapt_norm, evaluate, soft_targets
from .train.loop import train
from .train.sources import load_dataset

__version__ = "1.1.0"

__all__ = ["QuantSpec", "at_bits", "convert", "set_bits", "summary"]
__all__ += ["CoresetConfig", "Coresets", "Dataset", "TrainConfig", "load_dataset", "recipe", "train"]
__all__ += ["adapt_norm", "evaluate", "soft_targets"]
__all__ += ["coreset", "correction", "models", "quantizers"]
__all__ += ["export_onnx", "freeze", "load", "pack", "save"]
