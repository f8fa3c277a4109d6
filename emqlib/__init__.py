"""emqlib: one network, trained once, run at any bit-width.

A companion to *Efficient Multi-bit Quantization Network Training via Weight Bias Correction and Bit-wise Coreset
Sampling* (Kim, An, Jeon, Ko; NeurIPS 2025; arXiv 2510.20673).

Letters in shapes: B batch, N samples, C classes or channels, T observed epochs, O and I output and input channels.
"""

from . import coreset, correction, models, quantizers
from .checkpoints import OutOfTime
from .config import TrainConfig
from .data import Dataset, load_dataset
from .evaluation import adapt_norm, evaluate
from .export import export_onnx
from .layers import QuantSpec
from .multibit import at_bits, convert, set_bits, summary
from .packing import pack
from .sampling import CoresetConfig
from .saving import load, save
from .training import train

__version__ = "1.0.0"

__all__ = [
    "CoresetConfig",
    "Dataset",
    "OutOfTime",
    "QuantSpec",
    "TrainConfig",
    "adapt_norm",
    "at_bits",
    "convert",
    "coreset",
    "correction",
    "evaluate",
    "export_onnx",
    "load",
    "load_dataset",
    "models",
    "pack",
    "quantizers",
    "save",
    "set_bits",
    "summary",
    "train",
]
