"""Bit-wise coresets while training: recorded scores, and which child sees which samples in which epoch."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, coreset
from ..coreset import EPS
from .config import CoresetConfig
from .distributed import Ranks

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


_DRAWN = ("scores", "ranks", "subsets", "weights")  # by bit-width, kept in checkpoints
_TINY = 0.1  # of the weight of the highest rank, that of the lowest: no sample is out of reach of a draw


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose, such as ("shuffle", epoch): one stream's draws never shift another's."""
    text = json.dumps([seed, *purpose])
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]))


@dataclass(frozen=True)
class Selection:
    """One epoch's data: by bit-width sorted sample indices (K,) and, where losses are weighted, weights (N,).

    scheme: how the children share steps. scored: whether this is an epoch of the scoring phase.
    """

    scheme: str
    subsets: dict[int, Tensor]
    weights: dict[int, Tensor]
    scored: bool = False


def _share(mask: Tensor) -> float:
    return round(float(mask.float().mean()), 4)


class Sampler:
    """The coresets of one run, epoch by epoch: scoring phase, draws, and the full data at the end.

    All it draws comes from (seed, purpose); `state` holds what a resumed run needs to draw the same. Of several ranks
    the first alone records scores, of all ranks' samples, and shares them: so all draw the same coresets.
    rows: one a draw and bit-width, for `training.train`'s history.
    """

    def __init__(
        self,
        config: CoresetConfig | None,
        scheme: str,
        seed: int,
        bits: tuple[int, ...],
        labels: Tensor,
        epochs: int,
        place: Ranks | None = None,
    ) -> None:
        self.config = config or CoresetConfig(pruning_rate=0)
        self.scheme, self.seed, self.bits, self.epochs = scheme, seed, bits, epochs
        self.labels, self.n = labels.cpu(), len(labels)
        self.shared = scheme == "joint" or self.config.across_bits == "identical"
        self.recorders: dict[int, Recorder] = {}
        self.scores: dict[int, Tensor] = {}
        self.ranks: dict[int, Tensor] = {}
        self.subsets: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}
        self.draw = -1
        self.rows: list[dict[str, Any]] = []
        self.place = place or Ranks()
        self._recording, self._recorded, self._shape = False, False, (0, 0)
        self._features: Tensor | None = None

    def size(self, epoch: int) -> int:
        """How many samples each child sees in `epoch`."""
        if self._is_full(epoch):
            return self.n
        if epoch < self.config.warmup:
            return round(self.config.candidates * self.n)
        return coreset.kept(self.n, self.config.pruning_rate)

    def scheme_of(self, epoch: int) -> str:
        """Which scheme `epoch` trains by: a scoring phase may have its own."""
        scoring = self.scheme == "bitwise" and epoch < self.config.warmup
        return self.config.scoring if scoring else self.scheme

    def _is_full(self, epoch: int) -> bool:
        return self.config.pruning_rate == 0 or epoch >= self.epochs - self.config.full_epochs

    def selection(self, epoch: int) -> Selection:
        """What each child trains on in `epoch` (from 0). Call it for each in order; once more gives the same."""
        if self._is_full(epoch):
            return Selection(self.scheme, dict.fromkeys(self.bits, torch.arange(self.n)), {})
        if epoch < self.config.warmup:
            scheme = self.scheme_of(epoch)
            return Selection(scheme, {b: self._candidates(b) for b in self.bits}, {}, scored=True)
        draw = self.config.draw_of(epoch)
        if draw != self.draw:
            self._select(draw, epoch)
        return Selection(self.scheme, self.subsets, self.weights)

    def _candidates(self, b: int) -> Tensor:
        """The part of the training set that `b` scores: parts of different bit-widths overlap as little as they can."""
        count = round(self.config.candidates * self.n)
        if count == self.n:
            return torch.arange(self.n)
        shared = self.shared or self.config.scoring == "joint"
        order = torch.randperm(self.n, generator=generator(self.seed, "candidates"))
        start = 0 if shared else self.bits.index(b) * self.n // len(self.bits)
        return order.roll(-start)[:count].sort().values

    def _select(self, draw: int, epoch: int) -> None:
        config, before = self.config, self.subsets
        if self._recorded:
            self._rank()
        self.draw, self.subsets, self.weights = draw, {}, {}
        clipped, held = {}, torch.zeros(self.n, dtype=torch.bool)
        for b in self.bits[:1] if self.shared else self.bits[::-1]:
            stream = generator(self.seed, "coreset", draw, "all" if self.shared else b)
            self.subsets[b] = self._pick(b, stream, held)
            held[self.subsets[b]] = True
            if config.unbiased:
                self.weights[b], clipped[b] = self._loss_weights(b)
        if self.shared:
            first = self.bits[0]
            for parts in (self.subsets, self.weights, clipped):
                parts |= dict.fromkeys(self.bits, parts[first]) if parts else {}
        self.rows += self._describe(epoch, before, clipped)
        if not config.rescore:
            self.recorders, self._recorded = {}, False

    def _rank(self) -> None:
        """The scores and ranks of all candidates by bit-width, from what was recorded."""
        self.scores = self.place.share({b: record.scores().cpu() for b, record in self.recorders.items()})
        for b, scores in self.scores.items():
            own = self._candidates(b)
            # of equal scores none is kept for its place in the data set, whose order may be that of the classes
            order = own[torch.randperm(len(own), generator=generator(self.seed, "ties", b))]
            self.ranks[b] = torch.full((self.n,), -1.0)
            self.ranks[b][order] = coreset.ranks(scores[order])
        if self.shared:
            mean = torch.stack(list(self.ranks.values())).mean(0)
            self.scores = self.ranks = dict.fromkeys(self.bits, mean)  # raw scores have no one scale

    def _pick(self, b: int, stream: torch.Generator, held: Tensor) -> Tensor:
        """The coreset of `b`; under across_bits="disjoint" of samples that no other one holds, while there are any."""
        own = torch.arange(self.n) if self.config.unscored else self._candidates(b)
        keep = coreset.kept(self.n, self.config.pruning_rate)
        if self.config.across_bits != "disjoint":
            return own[self._choose(b, own, keep, stream)]
        free, taken = own[~held[own]], own[held[own]]
        parts = [(part, min(count, len(part))) for part, count in ((free, keep), (taken, keep - len(free)))]
        picked = [part[self._choose(b, part, count, stream)] for part, count in parts if count > 0]
        return torch.cat(picked).sort().values

    def _choose(self, b: int, part: Tensor, keep: int, stream: torch.Generator) -> Tensor:
        if self.config.score == "random":
            return coreset.choose(torch.ones(len(part)), keep, "sample", stream)
        scores = self._chances(b) if self.config.how == "sample" else self.ranks[b]
        return coreset.choose(scores[part], keep, self.config.how, stream)

    def _chances(self, b: int) -> Tensor:
        """The weight (N,) of each sample in a draw: its rank over N to the `power`, and never nothing.

        What has no rank has the mean weight of what has one.
        """
        scored = self.ranks[b] >= 0
        u = (self.ranks[b].clamp_min(0) + 1) / (self.ranks[b].max() + 1)
        weights = _TINY + (1 - _TINY) * u**self.config.power
        return torch.where(scored, weights, weights[scored].mean())

    def _loss_weights(self, b: int) -> tuple[Tensor, float]:
        """K / (N pi) for each sample (N,), clipped, and which fraction of the coreset was: their mean is one.

        The expectation of the weighted mean loss over the draw is the mean over all data (Horvitz and Thompson 1952).
        """
        chances = torch.ones(self.n) if self.config.score == "random" else self._chances(b)
        keep = len(self.subsets[b])
        weights = (keep / (self.n * coreset.inclusion(chances, keep))).float()
        over = weights[self.subsets[b]] > self.config.max_weight
        return weights.clamp_max(self.config.max_weight), _share(over)

    def _describe(self, epoch: int, before: dict[int, Tensor], clipped: dict[int, float]) -> list[dict[str, Any]]:
        """One row a bit-width of a draw: size, sharing with the others, change since the last draw, classes."""
        held = {b: torch.zeros(self.n, dtype=torch.bool).index_fill_(0, s, True) for b, s in self.subsets.items()}
        union = _share(torch.stack(list(held.values())).any(0))
        rows = []
        for b, subset in self.subsets.items():
            row = {"epoch": epoch + 1, "bits": b, "size": len(subset), "union": union}
            row |= {"overlap": {str(o): _share(held[o][subset]) for o in self.bits if o != b}}
            row |= {"drift": _share(~held[b][before[b]]) if before else None}
            row |= {"rank_correlation": {str(o): self._correlation(b, o) for o in self.bits if o != b and self.ranks}}
            row |= {"clipped": clipped.get(b, 0.0), "classes": self.labels[subset].bincount().tolist()}
            rows.append(row)
        return rows

    def _correlation(self, b: int, other: int) -> float | None:
        """Spearman's rank correlation over the samples that both scored."""
        both = (self.ranks[b] >= 0) & (self.ranks[other] >= 0)
        if int(both.sum()) < 3:
            return None
        pair = torch.stack([coreset.ranks(self.ranks[x][both]) for x in (b, other)])
        return round(float(torch.corrcoef(pair)[0, 1]), 4)

    @contextmanager
    def recording(self, model: nn.Module, selection: Selection) -> Iterator[None]:
        """Score what `model` is trained on within this block, where the epoch is one that is scored."""
        hook, wanted = None, selection.scored or (self.config.rescore and self._recorded)
        if wanted and self.config.score in ("grand", "moderate"):
            last = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
            if last is None:
                raise checks.invalid("score", self.config.score, "another, where a network has no linear layer")
            hook = last.register_forward_pre_hook(self._keep_features)
        self._recording = wanted
        try:
            yield
        finally:
            self._recording, self._features = False, None
            if hook is not None:
                hook.remove()

    def _keep_features(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0].detach().float()

    def observe(self, b: int, epoch: int, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Score a batch of sample indices (B,) that child `b` has just seen, by its logits (B, C) and labels (B,)."""
        if not self._recording:
            return
        p = logits.detach().float().softmax(1)
        indices, p, labels, features = self.place.gather(indices, p, labels, self._features)
        self._recorded = True
        if not self.place.main:
            return
        if b not in self.recorders:
            width = 0 if features is None else features.shape[1]
            self.recorders[b] = self._recorder(p.shape[1], width, p.device)
        device = next(self.recorders[b].buffers()).device
        moved = (None if x is None else x.to(device) for x in (indices, p, labels, features))
        self.recorders[b].observe(epoch, *moved)

    def _recorder(self, num_classes: int, width: int, device: torch.device) -> Recorder:
        self._shape = (num_classes, width)
        config = self.config
        return recorder(config.score, self.n, num_classes, width, config.window, config.decay, device)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain containers of tensors and numbers."""
        recorders = {b: r.state_dict() for b, r in self.recorders.items()}
        drawn = {name: getattr(self, name) for name in _DRAWN} | {"draw": self.draw}
        return drawn | {"recorders": recorders, "shape": self._shape, "rows": json.dumps(self.rows)}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from `state`."""
        for name in _DRAWN:
            setattr(self, name, {b: tensor.cpu() for b, tensor in state[name].items()})
        self.draw, self.rows = state["draw"], json.loads(state["rows"])
        self._recorded = bool(state["recorders"])
        for b, buffers in state["recorders"].items() if self.place.main else ():
            self.recorders[b] = self._recorder(*state["shape"], device)
            self.recorders[b].load_state_dict(buffers)
