"""Bit-wise coresets: which child model sees which samples in which epoch, and the scores that this comes from."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, default_collate

from .. import checks, coreset
from ..coreset import EPS
from ..files import digest
from .config import CoresetConfig
from .data import Dataset, Streamed, integers
from .distributed import here

LARGE = 1 << 30  # bytes: a larger table stays in the memory of the CPU
LEAST = 0.1  # weights in a draw go from this, of the lowest rank, to 1, of the highest
WAITING = 1 << 16  # batches times numbers a sample, of which processes put scores together before an epoch's end


class Recorder(nn.Module):
    """The scores of N samples at one bit-width, from training's own forward passes. Its buffers are all its memory.

    Only the first observation of a sample in an epoch counts: a second one comes from an epoch that was interrupted and
    begun again. A sample that is not observed keeps its score, and one that never was observed has the lowest.
    """

    def __init__(self, n: int, **tables: Tensor) -> None:
        super().__init__()
        for name, table in tables.items():
            self.register_buffer(name, table)
        self.register_buffer("last", torch.full((n,), -2, dtype=torch.int16))  # the epoch in which each was observed

    def observe(self, epoch: int, indices: Tensor, p: Tensor, labels: Tensor, features: Tensor | None) -> None:
        """Take in a batch: sample indices (B,), softmax p (B, C), labels (B,), the last layer's input (B, D)."""
        again = self.last[indices] == epoch
        before = {name: table[indices] for name, table in self.named_buffers()}
        self._observe(epoch, indices, p, labels, features)
        for name, old in before.items():  # no sample is left out by its index, for which a GPU would have to wait
            table = self.get_buffer(name)
            table[indices] = torch.where(again.view(-1, *[1] * (table.dim() - 1)), old, table[indices])
        self.last[indices] = epoch

    def _observe(self, epoch: int, indices: Tensor, p: Tensor, labels: Tensor, features: Tensor | None) -> None:
        raise NotImplementedError

    def scores(self) -> Tensor:
        """The importance (N,) so far, higher is kept; ValueError where nothing could be scored yet."""
        raise NotImplementedError


class _TDDS(Recorder):
    """`coreset.tdds` as a stream. It gives the same numbers as the array (T, N, C), up to half precision's rounding.

    Memory: N (2 C + 4 (window - 1) + 8) bytes with half-precision probabilities. That is 1.8 MB for CIFAR-10 at
    window 3, and 2.6 GB for ImageNet at window 10. A sample that was not observed in the epoch before starts a new
    window.
    """

    def __init__(self, n: int, num_classes: int, window: int, decay: float) -> None:
        super().__init__(
            n,
            previous=torch.zeros(n, num_classes, dtype=torch.float16),
            ring=torch.zeros(n, window - 1),
            score=torch.zeros(n),
            deltas=torch.zeros(n, dtype=torch.int16),  # since the last gap
        )
        self.window, self.decay = window, decay

    def _observe(self, epoch: int, indices: Tensor, p: Tensor, labels: Tensor, features: Tensor | None) -> None:
        i, p = indices, p.to(self.score)
        before = self.previous[i].to(self.score)
        delta = (p * ((p + EPS).log() - (before + EPS).log())).abs().sum(1)
        deltas = torch.where(self.last[i] == epoch - 1, self.deltas[i] + 1, 0)
        slot = (deltas.long() - 1).clamp_min(0) % (self.window - 1)  # without a delta: overwritten by the first
        ring = self.ring[i].scatter_(1, slot[:, None], delta[:, None])
        score = (1 - self.decay) * self.score[i] + self.decay * coreset.spread(ring, dim=1)
        self.score[i] = torch.where(deltas >= self.window - 1, score, self.score[i])
        self.ring[i], self.deltas[i] = ring, deltas
        self.previous[i] = p.to(self.previous)

    def scores(self) -> Tensor:
        if not bool((self.score > 0).any()):
            raise checks.invalid("window", self.window, "at most as many epochs as were observed in a row")
        return self.score.clone()


class _Mean(Recorder):
    """The mean over the observed epochs of a score of single batches, see `coreset.SNAPSHOTS`. Memory: 10 N bytes."""

    def __init__(self, n: int, score: Callable[..., Tensor]) -> None:
        super().__init__(n, total=torch.zeros(n), count=torch.zeros(n, dtype=torch.int32))
        self.score = score

    def _observe(self, epoch: int, indices: Tensor, p: Tensor, labels: Tensor, features: Tensor | None) -> None:
        self.total[indices] += self.score(p, labels, features).to(self.total)
        self.count[indices] += 1

    def scores(self) -> Tensor:
        return torch.where(self.count > 0, self.total / self.count.clamp_min(1), -torch.inf)


class _Forgetting(Recorder):
    """`coreset.forgetting` as a stream. Memory: 12 N bytes."""

    def __init__(self, n: int) -> None:
        types = {"right": torch.bool, "learned": torch.bool, "forgotten": torch.int32, "observed": torch.int32}
        super().__init__(n, **{name: torch.zeros(n, dtype=dtype) for name, dtype in types.items()})

    def _observe(self, epoch: int, indices: Tensor, p: Tensor, labels: Tensor, features: Tensor | None) -> None:
        right = p.argmax(1) == labels
        self.forgotten[indices] += (self.right[indices] & ~right).int()
        self.right[indices] = right
        self.learned[indices] |= right
        self.observed[indices] += 1

    def scores(self) -> Tensor:
        # a sample that was never right counts as often as it was observed
        return torch.where(self.learned, self.forgotten, self.observed).float()


class _Moderate(Recorder):
    """`coreset.moderate` of the latest features, as centrality. Memory: N (4 D + 10) bytes."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__(n, features=torch.zeros(n, width), labels=torch.full((n,), -1))

    def _observe(self, epoch: int, indices: Tensor, p: Tensor, labels: Tensor, features: Tensor | None) -> None:
        self.features[indices] = features.to(self.features)
        self.labels[indices] = labels

    def scores(self) -> Tensor:
        seen = self.labels >= 0
        scores = torch.full((len(seen),), -torch.inf, device=seen.device)
        scores[seen] = coreset.centrality(coreset.moderate(self.features[seen], self.labels[seen]))
        return scores


def recorder(config: CoresetConfig, n: int, num_classes: int, width: int, device: torch.device) -> Recorder:
    """The recorder of a score but "random" for N samples and C classes, on `device` if it fits there.

    width: inputs of the last layer, which "moderate" keeps.
    """
    if config.score == "tdds":
        made = _TDDS(n, num_classes, config.window, config.decay)
        return made if made.previous.nbytes > LARGE else made.to(device)
    if config.score == "forgetting":
        return _Forgetting(n).to(device)
    if config.score == "moderate":
        return _Moderate(n, width).to(device)
    own = isinstance(config.score, checks.Own)
    return _Mean(n, config.score.function if own else coreset.SNAPSHOTS[config.score]).to(device)


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose, such as ("shuffle", epoch): draws for one never shift those for another."""
    text = json.dumps([seed, *purpose])
    return torch.Generator().manual_seed(int(digest(text)[:14], 16))


def _share(mask: Tensor) -> float:
    return round(float(mask.float().mean()), 4)


class Coresets:
    """Which samples each child model trains on, epoch by epoch: first those to be scored, then coresets by importance.

    `train` is written on this, and so can be a training loop of your own, in which each step trains one child model:

        for epoch in range(epochs):
            for bits, indices in coresets.batches(epoch, batch_size=128):
                ...  # `set_bits`, and a step on these samples
                coresets.observe(bits, indices, logits, labels[indices])

    Everything random comes from the seed. Processes that train together by torch.distributed make the same calls: all
    draw the same, each gets its part of every batch, and the main one records the scores of all.

    Args:
        labels: the labels (N,) of the training set, as a tensor, an array or a list; or the data set that has them:
            `Dataset`, or a map-style one, whose `targets` or `labels` are read, or else its items one by one.
        bits: the bit-widths to train.
        config: how coresets are chosen; None trains on the full data.
        epochs: how many there will be, more than the scoring phase has.
        scheme: "joint" or "dedicated", as in `TrainConfig`, for `steps`.

    Raises:
        ValueError: names the argument that is wrong.

    Attributes:
        rows: one row for each draw and bit-width, see `train`.
        epoch: the latest one that was asked for, or -1.
        next_epoch: the one that a `loader` goes on with.
    """

    def __init__(
        self,
        labels: Any,
        bits: Iterable[int],
        config: CoresetConfig | None = None,
        *,
        epochs: int,
        seed: int = 0,
        scheme: str = "bitwise",
    ) -> None:
        expected = 'a CoresetConfig, for example CoresetConfig(score="tdds")'
        config = CoresetConfig(pruning_rate=0) if config is None else config
        self.config = checks.instance("config", config, CoresetConfig, expected)
        self.bits, self.labels = checks.bit_widths("bits", bits), labels_of(labels)
        self.scheme = checks.choice("scheme", scheme, ("bitwise", "joint", "dedicated"))
        self.seed, self.n = checks.integer("seed", seed, 0), len(self.labels)
        self.epochs = self.config.check_epochs(checks.integer("epochs", epochs, 1))
        self.epoch, self.next_epoch, self.draw = -1, 0, -1
        self.shared = scheme == "joint" or self.config.across_bits == "identical"
        self.recorders: dict[int, Recorder] = {}
        self.ranks: dict[int, Tensor] = {}  # (N,) by bit-width
        self.loss_weights: dict[int, Tensor] = {}  # none where losses are not weighted
        self.drawn: dict[int, Tensor] = {}  # (K,) by bit-width
        self.rows: list[dict[str, Any]] = []
        self._shape = (0, 0)  # classes and features of what is recorded
        self._last: tuple[nn.Linear, Tensor] | None = None  # the linear layer that was called last, and its input
        # what is not recorded yet (epoch, bits and a batch), and how many samples this process has yet to observe
        self._waiting: list[tuple[Any, ...]] = []
        self._due = 0

    def batches(self, epoch: int, batch_size: int) -> list[tuple[int, Tensor]]:
        """The steps of `epoch` (from 0), each (bits, sample indices (B,)); bit-widths take turns, the highest first.

        Ask for the epochs in order, for each when the one before has ended; asking again is safe. Batches are of
        near-equal size. Of several processes each gets its part of them. ValueError: no such epoch; nothing was
        observed in the scoring phase; scoring="joint", whose steps train several child models.
        """
        steps, place = self.steps(epoch, batch_size), here()
        if len(steps[0][0]) > 1:
            name = "scheme" if self.scheme == "joint" else "scoring"
            raise checks.invalid(name, "joint", '"bitwise", where each step trains one child model')
        if min(len(indices) for _, indices in steps) < place.count:
            expected = f"a sample in each batch for each of {place.count} processes"
            raise checks.invalid("batch_size", batch_size, expected)
        return [(bits[0], place.part(indices)) for bits, indices in steps]

    def steps(self, epoch: int, batch_size: int) -> list[tuple[tuple[int, ...], Tensor]]:
        """As `batches`, with all bit-widths of a step, the highest first, and its samples (B,) of all processes."""
        checks.integer("batch_size", batch_size, 1)
        subsets, bits, place = self.subsets(epoch), self.bits[::-1], here()
        if self.scheme_of(epoch) == "joint":
            steps = [(bits, chunk) for chunk in self._chunks(subsets[bits[0]], batch_size, epoch)]
        else:
            queues = [self._chunks(subsets[b], batch_size, epoch, b) for b in bits]
            steps = [((b,), chunk) for turn in zip(*queues, strict=True) for b, chunk in zip(bits, turn, strict=True)]
        self._due = sum(len(group) * len(place.part(indices)) for group, indices in steps)
        return steps

    def _chunks(self, indices: Tensor, batch_size: int, *purpose: int) -> tuple[Tensor, ...]:
        """`indices`, shuffled, in parts of near-equal size: batch norm cannot take a last part of one image."""
        order = torch.randperm(len(indices), generator=generator(self.seed, "shuffle", *purpose))
        return indices[order].tensor_split(-(-len(indices) // batch_size))

    def count(self, epoch: int, batch_size: int) -> int:
        """How many steps `epoch` has; unlike `batches`, this may be asked for any epoch at any time."""
        children = 1 if self.scheme_of(epoch) == "joint" else len(self.bits)
        return children * -(-self.size(epoch) // batch_size)

    def size(self, epoch: int) -> int:
        """How many samples each child model sees in `epoch`."""
        return self._candidate_count if epoch < self.config.warmup else coreset.kept(self.n, self.config.pruning_rate)

    @property
    def _candidate_count(self) -> int:
        """How many samples a bit-width scores: both numbers are rounded, and a coreset has to fit."""
        return max(coreset.kept(self.n, self.config.pruning_rate), round(self.config.candidates * self.n))

    def scheme_of(self, epoch: int) -> str:
        """Which scheme `epoch` trains by: a scoring phase may have its own."""
        scoring = self.scheme == "bitwise" and epoch < self.config.warmup
        return self.config.scoring if scoring else self.scheme

    @property
    def scoring(self) -> bool:
        """Whether the latest epoch belongs to the scoring phase."""
        return 0 <= self.epoch < self.config.warmup

    def subsets(self, epoch: int) -> dict[int, Tensor]:
        """What each child model trains on in `epoch`, by bit-width: sorted sample indices (K,). See `batches`."""
        epoch = checks.integer("epoch", epoch, 0, self.epochs - 1)
        if self._waiting and epoch != self.epoch:
            self._record()
        if self.config.pruning_rate == 0:
            found = dict.fromkeys(self.bits, torch.arange(self.n))
        elif epoch < self.config.warmup:
            found = {b: self._candidates(b) for b in self.bits}
        else:
            every = self.config.resample_every
            draw = (epoch - self.config.warmup) // every if every else 0
            if draw != self.draw:
                self._select(draw, epoch)
            found = self.drawn
        self.epoch = epoch
        return found

    def weights(self, bits: int, indices: Tensor) -> Tensor:
        """The weights (B,) of the losses of samples `indices` (B,): ones, unless the config has unbiased=True."""
        if not self.loss_weights:
            return torch.ones(len(indices), device=indices.device)
        if bits not in self.bits:
            raise checks.invalid("bits", bits, f"one of {self.bits}")
        self.loss_weights[bits] = self.loss_weights[bits].to(indices.device)
        return self.loss_weights[bits][indices]

    def loader(self, dataset: Any, batch_size: int, **options: Any) -> DataLoader:
        """A DataLoader that gives (bits, sample indices (B,), batch); each whole pass over it is the next epoch.

        A batch carries its bit-width and indices from the sampler on, however many workers fetch ahead.
        `loader.batch_sampler.set_epoch` goes to another epoch. Of several processes each gets its part of every batch,
        so nothing else may share the loader out: Lightning wants use_distributed_sampler=False.
        dataset: a map-style one, of the N samples. options: of `DataLoader`, such as num_workers or collate_fn.
        """
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) != self.n:
            raise checks.invalid("dataset", dataset, f"a map-style data set of {self.n} samples")
        keyed = _Keyed(dataset, options.pop("collate_fn", None) or default_collate)
        return DataLoader(keyed, batch_sampler=BatchSampler(self, batch_size), collate_fn=tuple, **options)  # as it is

    def _candidates(self, b: int) -> Tensor:
        """The samples that `b` scores; those of different bit-widths overlap as little as they can."""
        count = self._candidate_count
        if count == self.n:
            return torch.arange(self.n)
        shared = self.shared or self.config.scoring == "joint"
        order = torch.randperm(self.n, generator=generator(self.seed, "candidates"))
        start = 0 if shared else self.bits.index(b) * self.n // len(self.bits)
        return order.roll(-start)[:count].sort().values

    def _select(self, draw: int, epoch: int) -> None:
        if self.draw < 0 and self.config.score != "random":
            self._rank(epoch)
        before, self.draw, self.drawn, self.loss_weights = self.drawn, draw, {}, {}
        clipped: dict[int, float] = {}
        held = torch.zeros(self.n, dtype=torch.bool)
        for group in [self.bits] if self.shared else [(b,) for b in self.bits[::-1]]:
            stream = generator(self.seed, "coreset", draw, "all" if self.shared else group[0])
            subset = self._pick(group[0], stream, held)
            held[subset] = True
            self.drawn |= dict.fromkeys(group, subset)
            if self.config.unbiased:
                weights, share = self._loss_weights(group[0], subset)
                self.loss_weights |= dict.fromkeys(group, weights)
                clipped |= dict.fromkeys(group, share)
        self.rows += self._describe(epoch, before, clipped)

    def _rank(self, epoch: int) -> None:
        """The scores and ranks of all candidates by bit-width, from what was recorded before `epoch`."""
        found = here().share({b: record.scores().cpu() for b, record in self.recorders.items()})
        missing = [b for b in self.bits if b not in found]
        if missing:
            expected = f"scores of {missing} bits before it, which `observe` records in the first {self.config.warmup}"
            raise checks.invalid("epoch", epoch, expected)
        for b, scores in found.items():
            own = self._candidates(b)
            if broken := int(scores[own].isnan().sum()):
                told = f"{broken} of {len(own)} scores of {b} bits are not numbers"
                raise checks.invalid("score", self.config.score, f"one that gives numbers: {told}")
            # samples often lie class by class: equal scores are ranked in a random order, not in that of the data
            order = own[torch.randperm(len(own), generator=generator(self.seed, "ties", b))]
            self.ranks[b] = torch.full((self.n,), -1.0)
            self.ranks[b][order] = coreset.ranks(scores[order])
        if self.shared:
            mean = torch.stack(list(self.ranks.values())).mean(0)  # raw scores have no common scale
            self.ranks = dict.fromkeys(self.bits, mean)
        self.recorders = {}

    def _pick(self, b: int, stream: torch.Generator, held: Tensor) -> Tensor:
        """The coreset of `b`. A disjoint one takes samples that no other coreset holds, while there are any."""
        own = torch.arange(self.n) if self.config.unscored else self._candidates(b)
        keep = coreset.kept(self.n, self.config.pruning_rate)
        if self.config.across_bits != "disjoint":
            return own[self._choose(b, own, keep, stream)]
        free, taken = own[~held[own]], own[held[own]]
        parts = [(part, min(count, len(part))) for part, count in ((free, keep), (taken, keep - len(free)))]
        picked = [part[self._choose(b, part, count, stream)] for part, count in parts if count > 0]
        return torch.cat(picked).sort().values

    def _choose(self, b: int, part: Tensor, keep: int, stream: torch.Generator) -> Tensor:
        if self.config.how == "sample" or self.config.score == "random":
            return coreset.choose(self._chances(b)[part], keep, "sample", stream)
        return coreset.choose(self.ranks[b][part], keep, "top", stream)

    def _chances(self, b: int) -> Tensor:
        """The positive weight (N,) of each sample in a draw: rank over N to the `power`, or the mean without a rank."""
        if self.config.score == "random":
            return torch.ones(self.n)
        scored = self.ranks[b] >= 0
        u = (self.ranks[b].clamp_min(0) + 1) / (self.ranks[b].max() + 1)
        weights = LEAST + (1 - LEAST) * u**self.config.power
        return torch.where(scored, weights, weights[scored].mean())

    def _loss_weights(self, b: int, subset: Tensor) -> tuple[Tensor, float]:
        """K / (N pi) for each sample (N,), clipped, and the fraction of the coreset that was clipped.

        The expected weighted mean loss over the draw is the mean over all data (Horvitz and Thompson 1952).
        """
        weights = (len(subset) / (self.n * coreset.inclusion(self._chances(b), len(subset)))).float()
        over = weights[subset] > self.config.max_weight
        return weights.clamp_max(self.config.max_weight), _share(over)

    def _describe(self, epoch: int, before: dict[int, Tensor], clipped: dict[int, float]) -> list[dict[str, Any]]:
        """One row for each bit-width of a draw: size, sharing with the others, change since the last draw, classes."""
        held = {b: torch.zeros(self.n, dtype=torch.bool).index_fill_(0, s, True) for b, s in self.drawn.items()}
        union = _share(torch.stack(list(held.values())).any(0))
        rows = []
        for b, subset in self.drawn.items():
            row = {"epoch": epoch + 1, "bits": b, "size": len(subset), "union": union}
            row |= {"overlap": {str(o): _share(held[o][subset]) for o in self.bits if o != b}}
            row |= {"drift": _share(~held[b][before[b]]) if before else None}
            row |= {"rank_correlation": {str(o): self._correlation(b, o) for o in self.bits if o != b and self.ranks}}
            classes = self.labels[subset].bincount(minlength=int(self.labels.max()) + 1)
            row |= {"clipped": clipped.get(b, 0.0), "classes": classes.tolist()}
            rows.append(row)
        return rows

    def _correlation(self, b: int, other: int) -> float | None:
        """Spearman's rank correlation over the samples that both scored."""
        both = (self.ranks[b] >= 0) & (self.ranks[other] >= 0)
        if int(both.sum()) < 3:
            return None
        every = bool(both.all())  # then what would be ranked is ranks already, and sorting takes most of a draw's time
        pair = torch.stack([self.ranks[x] if every else coreset.ranks(self.ranks[x][both]) for x in (b, other)])
        return round(float(torch.corrcoef(pair)[0, 1]), 4)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within the block `observe` finds features itself, while they are scored: the last linear layer's input.

        The last one is the one that is called last. Passes without gradients in evaluation mode, such as those of
        `soft_targets`, are left out. Compile a network within the block, or it does not notice that it is watched.
        """
        needed = self.config.score in coreset.OF_FEATURES
        ahead = self.epoch < self.config.warmup and (needed or isinstance(self.config.score, checks.Own))
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)] if ahead else []
        if needed and ahead and not linear:
            raise checks.invalid("score", self.config.score, "another, where a network has no linear layer")
        hooks = [m.register_forward_pre_hook(self._keep_last) for m in linear]
        try:
            yield
            if self._waiting:  # of several processes, in one whose damaged samples were never observed
                self._record()
        finally:
            self._last = None
            for hook in hooks:
                hook.remove()

    def _keep_last(self, layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        if self.scoring and (layer.training or torch.is_grad_enabled()):
            self._last = layer, inputs[0].detach()

    def observe(
        self, bits: int, indices: Tensor, logits: Tensor, labels: Tensor, features: Tensor | None = None
    ) -> None:
        """Record the scores of a batch that child model `bits` has just seen. Outside the scoring phase: do nothing.

        The samples `indices` (B,) have these logits (B, C), labels (B,) and, for the scores that need them, features
        (B, D): the last layer's input, see also `watching`. Of several processes the main one has the scores when all
        batches of the epoch were observed, or the next epoch begins.
        """
        if not self.scoring:
            return
        if features is None and self._last is not None:
            layer, features = self._last
            quantizer = getattr(layer, "input_quantizer", None)
            if quantizer is not None and not quantizer.signed:  # in place of a ReLU that `convert` has taken out
                features = features.relu()
            if self.config.score in coreset.OF_FEATURES and layer.out_features != logits.shape[-1]:
                expected = "another, where the last linear layer that is called does not give the logits"
                raise checks.invalid("score", self.config.score, expected)
        self._check(bits, indices, logits, labels, features)
        features = None if features is None else features.detach().float()
        p = logits.detach().float().softmax(1)
        self._waiting.append((self.epoch, bits, indices, p, labels, features))
        self._due -= len(indices)
        numbers = p.shape[1] + (0 if features is None else features.shape[1:].numel())
        if here().count == 1 or self._due <= 0 or len(self._waiting) * numbers > WAITING:
            self._record()

    def _record(self) -> None:
        """The main process takes in what all have observed, batch by batch, as if no batch had been shared out."""
        waiting, self._waiting = self._waiting, []
        for (epoch, bits, *batch), *others in zip(*here().gather(waiting), strict=True):
            if others:
                columns = zip(batch, *(part for _, _, *part in others), strict=True)
                batch = [None if x[0] is None else torch.cat(x) for x in columns]
            if bits not in self.recorders:
                _, p, _, features = batch
                self._shape = (p.shape[1], 0 if features is None else features.shape[1])
                self.recorders[bits] = recorder(self.config, self.n, *self._shape, waiting[0][3].device)
            device = next(self.recorders[bits].buffers()).device
            self.recorders[bits].observe(epoch, *(None if x is None else x.to(device) for x in batch))

    def _check(self, bits: int, indices: Tensor, logits: Tensor, labels: Tensor, features: Tensor | None) -> None:
        """The arguments of `observe`, by their shapes: looking at values would make a GPU wait."""
        if bits not in self.bits:
            raise checks.invalid("bits", bits, f"one of {self.bits}")
        size = len(checks.tensor("indices", indices, "an int64 tensor (B,)", 1))
        for name, given in (("indices", indices), ("labels", labels)):
            if not isinstance(given, Tensor) or given.shape != (size,) or given.dtype != torch.int64:
                raise checks.invalid(name, given, f"an int64 tensor ({size},)")
        needed = [("features", features)] if self.config.score in coreset.OF_FEATURES else []
        for name, given in [("logits", logits), *needed]:
            if not isinstance(given, Tensor) or given.dim() != 2 or len(given) != size or not given.is_floating_point():
                raise checks.invalid(name, given, f"a floating tensor ({size}, ...) for score={self.config.score!r}")

    def state_dict(self) -> dict[str, Any]:
        """What goes on from the end of an epoch needs: plain containers of tensors and numbers."""
        recorders = {b: r.state_dict() for b, r in self.recorders.items()}
        drawn = {"ranks": self.ranks, "subsets": self.drawn, "weights": self.loss_weights, "recorders": recorders}
        drawn |= {"draw": self.draw, "epoch": self.epoch, "shape": self._shape, "rows": json.dumps(self.rows)}
        return drawn | {"of": self._identity()}

    def _identity(self) -> str:
        """What a state must have in common with the coresets that go on from it."""
        same = {"n": self.n, "bits": self.bits, "seed": self.seed, "scheme": self.scheme}
        return json.dumps(same | asdict(self.config))

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on from `state`, which `state_dict` gave, and record scores on `device`; ValueError: it is of others."""
        with checks.expecting("state", type(state).__name__, "a state of the same coresets"):
            kept = [state[name] for name in ("ranks", "subsets", "weights")]
            ranks, drawn, weights = ({b: x.cpu() for b, x in tables.items()} for tables in kept)
            if state["of"] != self._identity():
                raise ValueError("of others")
            recorders = {b: recorder(self.config, self.n, *state["shape"], device) for b in state["recorders"]}
            for b, made in recorders.items():
                made.load_state_dict(state["recorders"][b])
            draw, rows, epoch = state["draw"], json.loads(state["rows"]), state.get("epoch", -1)
        self.ranks, self.drawn, self.loss_weights, self.recorders = ranks, drawn, weights, recorders
        self.draw, self.rows, self._shape = draw, rows, state["shape"]
        self.epoch, self.next_epoch = epoch, epoch + 1


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """The batches of `Coresets` as lists of keys (sample index, bit-width), for `DataLoader(batch_sampler=...)`.

    After the last batch of an epoch comes the next epoch; an iteration that is broken off begins its epoch again,
    unless worker processes had fetched the epoch's last batch already.
    """

    def __init__(self, coresets: Coresets, batch_size: int) -> None:
        self.coresets, self.batch_size = coresets, checks.integer("batch_size", batch_size, 1)
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) of the next iteration; never an earlier one, as Accelerate does when it goes on."""
        self.coresets.next_epoch = max(epoch, self.coresets.next_epoch)

    def __len__(self) -> int:
        return self.coresets.count(self.coresets.next_epoch, self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.coresets.next_epoch
        batches = self.coresets.batches(epoch, self.batch_size)
        for number, (bits, indices) in enumerate(batches, start=1):
            if number == len(batches):  # not after it: HuggingFace's Trainer counts, and never asks for one more
                self.coresets.next_epoch = epoch + 1
            yield [(i, bits) for i in indices.tolist()]


class _Keyed(torch.utils.data.Dataset):
    """The batches of a data set by keys (sample index, bit-width): (bits, sample indices (B,), collated samples)."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[int, Tensor, Any]:
        indices, bits = zip(*keys, strict=True)
        return bits[0], torch.tensor(indices), self.collate([self.dataset[i] for i in indices])


def labels_of(data: Any) -> Tensor:
    """The labels (N,) int64 of a data set, or those given, on the CPU; ValueError: there are none. See `Coresets`."""
    given = data.train.labels if isinstance(data, Dataset) else data
    try:
        listed = isinstance(given, (Tensor, np.ndarray, list, tuple)) and len(given) > 0
        labels = integers(given, len(given)) if listed else None
        return Streamed.of(given, 0, "labels").labels if labels is None else labels.cpu()
    except (TypeError, ValueError) as error:
        expected = f"integers >= 0, one a sample, or a data set that has them ({error})"
        raise checks.invalid("labels", data, expected) from error
