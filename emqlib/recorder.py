"""Importance scores while training: what the forward passes of a training epoch give away, kept in bounded memory."""

import os
import tempfile

import torch
from torch import Tensor, nn

from . import checks, coreset
from .coreset import EPS

MAPPED_BYTES = 1 << 30  # tables larger than this live in a memory-mapped file


class Recorder(nn.Module):
    """The scores of N samples at one bit-width, from training's own forward passes; its buffers are all its memory.

    A sample is observed at most once an epoch; samples that are not observed keep their score.
    """

    def observe(self, epoch: int, indices: Tensor, p: Tensor, labels: Tensor, features: Tensor | None) -> None:
        """Take in a batch: sample indices (B,), softmax p (B, C), labels (B,), the last layer's input (B, D)."""
        raise NotImplementedError

    def scores(self) -> Tensor:
        """The importance (N,) so far, higher is kept; ValueError where nothing could be scored yet."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


class TDDSRecorder(Recorder):
    """`coreset.tdds` as a stream: the same number as from the array (T, N, C), to the rounding of `dtype`.

    Memory: N (2 C + 4 (window - 1) + 8) bytes with half-precision probabilities, 1.8 MB for CIFAR-10 at window 3 and
    2.6 GB for ImageNet at window 10, whose table of probabilities lies in a memory-mapped temporary file.
    A sample that was not observed in the epoch before starts a new window: a difference over two epochs is another
    quantity.
    """

    def __init__(self, n: int, num_classes: int, window: int, decay: float, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.window, self.decay = coreset.check_window(window, decay)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer("previous", _table(n, num_classes, dtype))
        self.register_buffer("ring", torch.zeros(n, window - 1, dtype=exact))
        self.register_buffer("score", torch.zeros(n, dtype=exact))
        self.register_buffer("last", torch.full((n,), -2, dtype=torch.int16))
        self.register_buffer("deltas", torch.zeros(n, dtype=torch.int16))  # since the last gap

    def observe(self, epoch: int, indices: Tensor, p: Tensor, labels: Tensor, features: Tensor | None) -> None:
        """See `Recorder.observe`: indices and labels (B,), p (B, C), features (B, D)."""
        i, p = indices, p.to(self.score)
        before = self.previous[i].to(self.score)
        delta = (p * ((p + EPS).log() - (before + EPS).log())).abs().sum(1)
        deltas = torch.where(self.last[i] == epoch - 1, self.deltas[i] + 1, 0)
        slot = (deltas.long() - 1).clamp_min(0) % (self.window - 1)  # without a delta: overwritten by the first
        ring = self.ring[i].scatter_(1, slot[:, None], delta[:, None])
        score = (1 - self.decay) * self.score[i] + self.decay * coreset.spread(ring, dim=1)
        self.score[i] = torch.where(deltas >= self.window - 1, score, self.score[i])
        self.ring[i], self.deltas[i], self.last[i] = ring, deltas, epoch
        self.previous[i] = p.to(self.previous)

    def scores(self) -> Tensor:
        """See `Recorder.scores`: (N,)."""
        if not bool((self.score > 0).any()):
            raise checks.invalid("window", self.window, "at most as many epochs as were observed in a row")
        return self.score.clone()


def _bytes(n: int, num_classes: int, dtype: torch.dtype = torch.float16) -> int:
    return n * num_classes * dtype.itemsize


def _table(n: int, num_classes: int, dtype: torch.dtype) -> Tensor:
    if _bytes(n, num_classes, dtype) <= MAPPED_BYTES:
        return torch.zeros(n, num_classes, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="emqlib-") as file:  # its pages live as long as the mapping
        _reserve(file.fileno(), _bytes(n, num_classes, dtype), file.name)
        return torch.from_file(file.name, shared=True, size=n * num_classes, dtype=dtype).view(n, num_classes)


def _reserve(handle: int, size: int, name: str) -> None:
    """Take so many bytes of the disk now: writing to mapped pages that the disk has no room for kills the process."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        os.truncate(handle, size)
        return
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        text = f"{error.strerror}: a table of scores of {size / 1e9:.1f} GB; TMPDIR names the folder"
        raise OSError(error.errno, text, name) from None


class MeanRecorder(Recorder):
    """The mean of entropy, EL2N or GraNd over the observed epochs. Memory: 8 N bytes."""

    def __init__(self, n: int, score: str) -> None:
        super().__init__()
        self.name = score
        self.register_buffer("total", torch.zeros(n))
        self.register_buffer("count", torch.zeros(n, dtype=torch.int32))

    def observe(self, epoch: int, indices: Tensor, p: Tensor, labels: Tensor, features: Tensor | None) -> None:
        """See `Recorder.observe`: indices and labels (B,), p (B, C), features (B, D)."""
        if self.name == "entropy":
            found = coreset.entropy_of(p)
        else:
            found = coreset.el2n_of(p, labels) if self.name == "el2n" else coreset.grand_of(p, labels, features.float())
        self.total[indices] += found
        self.count[indices] += 1

    def scores(self) -> Tensor:
        """See `Recorder.scores`: (N,)."""
        return self.total / self.count.clamp_min(1)


class ForgettingRecorder(Recorder):
    """`coreset.forgetting` as a stream. Memory: 10 N bytes."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("right", torch.zeros(n, dtype=torch.bool))
        self.register_buffer("learned", torch.zeros(n, dtype=torch.bool))
        self.register_buffer("forgotten", torch.zeros(n, dtype=torch.int32))
        self.register_buffer("observed", torch.zeros(n, dtype=torch.int32))

    def observe(self, epoch: int, indices: Tensor, p: Tensor, labels: Tensor, features: Tensor | None) -> None:
        """See `Recorder.observe`: indices and labels (B,), p (B, C), features (B, D)."""
        right = p.argmax(1) == labels
        self.forgotten[indices] += (self.right[indices] & ~right).int()
        self.right[indices] = right
        self.learned[indices] |= right
        self.observed[indices] += 1

    def scores(self) -> Tensor:
        """See `Recorder.scores`: (N,)."""
        return torch.where(self.learned, self.forgotten, self.observed).float()


class ModerateRecorder(Recorder):
    """`coreset.moderate` of the latest features, as centrality. Memory: N (2 D + 8) bytes."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(n, width, dtype=torch.float16))
        self.register_buffer("labels", torch.full((n,), -1, dtype=torch.int64))

    def observe(self, epoch: int, indices: Tensor, p: Tensor, labels: Tensor, features: Tensor | None) -> None:
        """See `Recorder.observe`: indices and labels (B,), p (B, C), features (B, D)."""
        self.features[indices] = features.to(self.features)
        self.labels[indices] = labels

    def scores(self) -> Tensor:
        """See `Recorder.scores`: (N,)."""
        seen = self.labels >= 0
        distance = torch.full((len(seen),), torch.inf, device=seen.device)
        distance[seen] = coreset.moderate(self.features[seen], self.labels[seen])
        scores = torch.zeros_like(distance)
        scores[seen] = coreset.centrality(distance[seen])
        return scores


def recorder(
    score: str, n: int, num_classes: int, width: int, window: int, decay: float, device: torch.device
) -> Recorder:
    """The recorder of `score` for N samples, C classes and a last layer of `width` inputs, on `device` if it fits.

    score: one of `sampling.SCORES` but "random". window, decay: of TDDS, see `coreset.tdds`.
    """
    if score == "tdds":
        made = TDDSRecorder(n, num_classes, window, decay)
        return made if _bytes(n, num_classes) > MAPPED_BYTES else made.to(device)
    if score == "forgetting":
        return ForgettingRecorder(n).to(device)
    return (ModerateRecorder(n, width) if score == "moderate" else MeanRecorder(n, score)).to(device)
