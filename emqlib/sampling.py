"""Bit-wise coresets during training: which child sees which samples in which epoch, and the scores behind that."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, coreset
from .ranks import Ranks
from .recorder import Recorder, recorder

SCORES = ("random", "entropy", "forgetting", "el2n", "grand", "moderate", "tdds")
_DRAWN = ("scores", "ranks", "subsets", "weights")  # by bit-width, kept in checkpoints
_TINY = 0.1  # of the weight of the highest rank, that of the lowest: no sample is out of reach of a draw


@dataclass(frozen=True, kw_only=True)
class CoresetConfig:
    """Which part of the training set each child trains on. ValueError names the field, its value and what is allowed.

    score: how samples are ranked, by the recorder of each bit-width; "random" needs none. pruning_rate: fraction of
    the training set a child does NOT see, in [0, 1). resample_every: epochs between two draws, 0 to keep the first
    (1 with "random" is RS2, arXiv 2305.18424).
    scoring_epochs: the first epochs, in which each child trains on all its candidates and is scored; 0: as few as the
    score needs. scoring: the scheme of those epochs, "bitwise" or "joint". candidates: the fraction of the training set
    that a bit-width scores and selects from, a part of its own where less than 1: the price of the scoring epochs.
    window, decay: of TDDS. rescore: go on scoring what the coresets show, for the draws to come.
    how: "top"; "sample", by weights (rank / N)^power; "ccs", over strata of score below the `cut` highest fraction.
    unscored: whether how="sample" draws from what is no candidate too, at the mean weight of the candidates.
    balanced: the same fraction of each class. across_bits: "independent" coresets by each bit-width's own scores, one
    "identical" to all by their mean rank, or "disjoint" ones as far as the data goes; a joint scheme shares one.
    unbiased: weight losses by 1 / inclusion probability, of mean one and at most max_weight, how="sample" alone.
    full_epochs: the last epochs, on the full data again.
    """

    score: str = "random"
    pruning_rate: float = 0.8
    resample_every: int = 1
    scoring_epochs: int = 0
    scoring: str = "bitwise"
    candidates: float = 1.0
    window: int = 3
    decay: float = 0.9
    rescore: bool = False
    how: str = "top"
    power: float = 1.0
    unscored: bool = False
    cut: float = 0.0
    balanced: bool = False
    across_bits: str = "independent"
    unbiased: bool = False
    max_weight: float = 5.0
    full_epochs: int = 0

    def __post_init__(self) -> None:
        checks.choice("score", self.score, SCORES)
        checks.choice("scoring", self.scoring, ("bitwise", "joint"))
        checks.choice("how", self.how, coreset.HOW)
        checks.choice("across_bits", self.across_bits, ("independent", "identical", "disjoint"))
        for name in ("rescore", "balanced", "unbiased", "unscored"):
            checks.flag(name, getattr(self, name))
        self._take("pruning_rate", checks.pruning_rate(self.pruning_rate))
        for name in ("resample_every", "scoring_epochs", "full_epochs"):
            self._take(name, checks.integer(name, getattr(self, name), 0))
        self._check_numbers()
        if self.scoring_epochs and self.scoring_epochs < self._least_epochs:
            expected = f'at least {self._least_epochs} for score="{self.score}", or 0'
            raise checks.invalid("scoring_epochs", self.scoring_epochs, expected)
        if self.unscored and (self.how != "sample" or self.rescore):
            raise checks.invalid("unscored", True, 'how="sample" without rescore')
        reached = self.how == "sample" and (self.candidates == 1 or self.unscored) and self.across_bits != "disjoint"
        if self.unbiased and not reached:
            expected = 'how="sample", all as candidates or unscored=True, and coresets not "disjoint"'
            raise checks.invalid("unbiased", True, expected)
        if self.score == "random" and (self.scoring_epochs or self.rescore or self.candidates < 1):
            raise checks.invalid("score", "random", "a score, where scoring_epochs, rescore or candidates are given")

    def _take(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # plain int and float: NumPy's do not go into JSON

    def _check_numbers(self) -> None:
        window, decay = coreset.check_window(self.window, self.decay)
        self._take("window", window)
        self._take("decay", decay)
        self._take("power", checks.real("power", self.power, "a number >= 0", low=0))
        self._take("max_weight", checks.real("max_weight", self.max_weight, "a number >= 1", low=1))
        for name, low, high in (("candidates", 1 - self.pruning_rate, 1.0), ("cut", 0.0, self.pruning_rate)):
            expected = f"a fraction in [{low:.3g}, {high:.3g}]"
            self._take(name, checks.real(name, getattr(self, name), expected, low=low - 1e-9, high=high + 1e-9))

    @property
    def _least_epochs(self) -> int:
        return {"random": 0, "tdds": self.window, "forgetting": 2}.get(self.score, 1)

    @property
    def warmup(self) -> int:
        """Epochs of the scoring phase: scoring_epochs, or as few as the score needs."""
        return (self.scoring_epochs or self._least_epochs) if self.pruning_rate else 0

    def draw_of(self, epoch: int) -> int:
        """The number of the draw that `epoch` (from 0, after the scoring phase) trains on."""
        return (epoch - self.warmup) // self.resample_every if self.resample_every else 0


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
        config, labels = self.config, self.labels[part] if self.config.balanced else None
        if config.score == "random":
            return coreset.choose(torch.ones(len(part)), keep, "sample", stream, labels)
        scores = self._chances(b) if config.how == "sample" else (self.scores if config.how == "ccs" else self.ranks)[b]
        return coreset.choose(scores[part], keep, config.how, stream, labels, config.cut)

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
        labels = self.labels if self.config.balanced else None
        chances = torch.ones(self.n) if self.config.score == "random" else self._chances(b)
        keep = len(self.subsets[b])
        weights = (keep / (self.n * coreset.inclusion(chances, keep, labels))).float()
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
