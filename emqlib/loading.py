"""Batches of a data set by sample index, augmented and normalised on the device: from memory, or from files."""

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .checks import invalid
from .data import Dataset, augment, normalize
from .files import digest
from .images import ImageFiles, decode
from .ranks import Ranks

Batch = tuple[Tensor, Tensor, Tensor]  # images (B, 3, H, W) float, labels (B,), sample indices (B,)
DAMAGED = 0.001  # the fraction of damaged files above which a data set is not worth training on


class MemoryLoader:
    """Batches of a split that lies in memory."""

    def __init__(self, data: Dataset, split: str, place: Ranks) -> None:
        self.data, self.split, self.place = data, getattr(data, split), place
        self.damaged: dict[int, str] = {}

    def all_damaged(self) -> None:
        """Nothing that lies in memory is damaged."""

    def epoch(
        self, chunks: Sequence[Tensor], generator: torch.Generator | None = None, first: int = 0
    ) -> Iterator[Batch]:
        """This rank's part of each of `chunks` of sample indices (B,), on the data's device; augmented by a generator.

        first: the number, from 0, of the chunk to begin with; the generator stands where the one before it left it.
        Every rank augments the whole batch, so that an image looks the same however many ranks there are.
        """
        for chunk in chunks[first:]:
            indices = chunk.to(self.split.labels.device)
            images = self.split.images[indices]
            images = images if generator is None else augment(images, self.data, generator)
            images, indices = self.place.part(images), self.place.part(indices)
            yield normalize(images, self.data), self.split.labels[indices], indices


class FileLoader:
    """Batches of streamed files, decoded by worker processes that live as long as this object.

    A damaged file is warned of by name, skipped and counted in `damaged`. What an image becomes depends on the
    generator, the number of the chunk and the sample alone, not on how many workers there are or which of them it is.
    """

    def __init__(self, data: Dataset, split: str, device: torch.device, place: Ranks, live: bool) -> None:
        self.data, self.split, self.device, self.place = data, getattr(data, split), device, place
        self.damaged: dict[int, str] = {}
        self.keys = _Keys(place)
        workers = self.split.workers
        self.batches = DataLoader(
            _Files(self.split, data.flip),
            batch_sampler=self.keys,
            num_workers=workers,
            persistent_workers=live and workers > 0,
            pin_memory=device.type == "cuda",
            collate_fn=_collate,
            generator=torch.Generator(),  # workers' seeds, which nothing uses: not from the global generator
        )

    def epoch(
        self, chunks: Sequence[Tensor], generator: torch.Generator | None = None, first: int = 0
    ) -> Iterator[Batch]:
        """This rank's part of each of `chunks`, without those of its samples whose files are damaged.

        chunks: sample indices (B,); first: the number, from 0, of the one to begin with. With a generator images are
        cropped, resized and mirrored at random, else resized and cut out of the centre. ValueError: too many damaged
        files, or a chunk of nothing else.
        """
        self.keys.seed = None if generator is None else generator.initial_seed()
        self.keys.chunks, self.keys.first = chunks, first
        for indices, images, damaged in self.batches:
            self._count(damaged)
            if len(indices) == 0:
                raise ValueError(f"{self.split.path(damaged[0][0])}: damaged, and so is every image of its batch")
            moved = (x.to(self.device, non_blocking=True) for x in (images, self.split.labels[indices], indices))
            images, labels, indices = moved
            yield normalize(images, self.data), labels, indices

    def _count(self, damaged: list[tuple[int, str]]) -> None:
        for index, message in damaged:
            if index in self.damaged:
                continue
            self.damaged[index] = message
            warnings.warn(f"{message}; skipped, {len(self.damaged)} so far", stacklevel=2)
        self._check()

    def all_damaged(self) -> int:
        """How many files any rank has found damaged so far; all ranks ask together. ValueError: too many."""
        for theirs in self.place.collect(self.damaged):
            self.damaged = self.damaged | theirs
        self._check()
        return len(self.damaged)

    def _check(self) -> None:
        if len(self.damaged) > DAMAGED * len(self.split):
            some = "\n".join(list(self.damaged.values())[:5])
            expected = f"at most {DAMAGED:.1%} of the {len(self.split)} files damaged"
            raise invalid("data", f"{len(self.damaged)} damaged files", f"{expected}; the first are\n{some}")


def loader(
    data: Dataset, split: str, device: torch.device, place: Ranks | None = None, live: bool = True
) -> MemoryLoader | FileLoader:
    """The loader of "train" or "test"; place: whose part of each batch; live: workers are kept between epochs."""
    if isinstance(getattr(data, split), ImageFiles):
        return FileLoader(data, split, device, place or Ranks(), live)
    return MemoryLoader(data, split, place or Ranks())


_Key = tuple[int | None, int, int]  # seed of the epoch, None for no augmentation; number of the chunk; sample


class _Keys:
    """What a DataLoader asks for the batches of an epoch: this rank's part of the chunks that it finds here."""

    def __init__(self, place: Ranks) -> None:
        self.place = place
        self.seed: int | None = None
        self.chunks: Sequence[Tensor] = ()
        self.first = 0

    def __iter__(self) -> Iterator[list[_Key]]:
        for n, chunk in enumerate(self.chunks[self.first :], start=self.first):
            yield [(self.seed, n, i) for i in self.place.part(chunk).tolist()]

    def __len__(self) -> int:
        return len(self.chunks) - self.first


class _Files(torch.utils.data.Dataset):
    """By key: the sample, and its image (3, S, S) uint8, or what is wrong with its file."""

    def __init__(self, split: ImageFiles, flip: bool) -> None:
        from torchvision.transforms import v2

        self.split, size = split, split.image_size
        mirrored = [v2.RandomHorizontalFlip()] if flip else []
        self.augmented = v2.Compose([v2.RandomResizedCrop(size, antialias=True), *mirrored])
        self.plain = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])

    def __getitem__(self, key: _Key) -> tuple[int, Tensor | str]:
        seed, chunk, index = key
        try:
            image = torch.from_numpy(decode(self.split.path(index), None).transpose(2, 0, 1).copy())
        except ValueError as error:
            return index, str(error)
        if seed is None:
            return index, self.plain(image)
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
            torch.default_generator.manual_seed(int(digest(f"{seed},{chunk},{index}")[:15], 16))
            return index, self.augmented(image)

    def __len__(self) -> int:
        return len(self.split)


def _collate(items: list[tuple[int, Tensor | str]]) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
    good = [(i, image) for i, image in items if isinstance(image, Tensor)]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return torch.tensor([i for i, _ in good], dtype=torch.long), images, [x for x in items if isinstance(x[1], str)]
