"""The profile `paper` of notebook 03, as eight processes would run it: no image is read, and no number is computed.

Labels are as many as ImageNet's, images are empty, and the network lies on the meta device, which knows shapes alone.
"""

from itertools import islice

import pytest
import torch
from torch import Tensor

import emqlib as emq
from emqlib.paper import experiments, runs
from emqlib.paper.profiles import parameters
from emqlib.paper.runs import Run
from emqlib.train.coresets import Coresets, recorder
from emqlib.train.data import Dataset, Streamed, loader
from emqlib.train.distributed import Place

N, CLASSES, BITS = 1_281_167, 1000, (2, 4, 8)
CPU, META = torch.device("cpu"), torch.device("meta")
PLACES = [Place(index, 8) for index in range(8)]
RUNS = experiments.imagenet(parameters(profile="paper", bits=BITS))
# in the order of the runs: steps of each of the first three epochs and of the others, sample passes in millions
EXPECTED = {
    "Any-Precision": (5005, 5005, 307.5),
    "full data": (15015, 15015, 307.5),
    "60 % pruned": (8010, 6006, 124.5),
    "80 % pruned": (4005, 3003, 62.3),
}


class Blank:
    """As many images as ImageNet has, all of them black."""

    targets = torch.arange(N) % CLASSES

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3, 1, 1, dtype=torch.uint8).expand(3, 224, 224), index % CLASSES


@pytest.fixture(scope="module")
def data() -> Dataset:
    split = Streamed.of(Blank(), 0)
    return Dataset("imagenet", split, split, tuple(map(str, range(CLASSES))), (0.5,), (0.5,), True, 0, "")


def coresets(run: Run, data: Dataset) -> Coresets:
    config = run.config
    same = {"epochs": config.epochs, "seed": config.seed, "scheme": config.scheme}
    return Coresets(data, run.spec.bits, config.coreset, **same)


@pytest.mark.parametrize(("run", "expected"), list(zip(RUNS, EXPECTED.values(), strict=True)), ids=EXPECTED)
def test_eight_processes_share_every_batch(run: Run, expected: tuple[int, int, float], data: Dataset) -> None:
    """Of 255 or 256 images, so each has 31 or 32 of them; batch norm needs two. Passes are those of GUIDE.md."""
    setting = (run.model, run.image_size, run.config.epochs, run.config.batch_size)
    assert setting == ("torchvision.resnet50", 224, 80, 256)
    made, (first, later, passes) = coresets(run, data), expected
    assert [made.count(epoch, 256) for epoch in (0, 1, 2, 3, 79)] == [first] * 3 + [later] * 2
    assert round(sum(len(BITS) * made.size(epoch) for epoch in range(80)) / 1e6, 1) == passes
    steps = made.steps(0, 256)
    assert len(steps) == first
    assert {bits for bits, _ in steps} == ({(8, 4, 2)} if run.config.scheme == "joint" else {(2,), (4,), (8,)})
    parts = torch.tensor([[len(place.part(indices)) for place in PLACES] for _, indices in steps])
    assert parts.sum(1).tolist() == [len(indices) for _, indices in steps]
    assert (parts.min(), parts.max()) == (31, 32)


def test_each_process_reads_its_own_images_and_gives_logits_of_every_class(data: Dataset) -> None:
    run = RUNS[-1]
    with META:
        model = runs.build(run, CLASSES).train()
    steps = coresets(run, data).steps(0, 256)
    chunks = [indices for _, indices in steps]
    epochs = [loader(data, "train", CPU, place).epoch(chunks, torch.Generator()) for place in PLACES]
    for (bits, indices), *parts in islice(zip(steps, *epochs, strict=True), 3):
        assert torch.equal(torch.cat([seen for _, _, seen in parts]), indices)
        images, labels, seen = parts[-1]
        assert images.shape == (len(indices) // 8, 3, 224, 224) and torch.equal(labels, seen % CLASSES)
        emq.set_bits(model, bits[0])
        logits = model(images.to(META))
        assert logits.device == META and logits.shape == (len(images), CLASSES)
    logits.sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_the_scores_of_three_bit_widths_take_eight_gigabytes() -> None:
    """TDDS keeps 1,000 half-precision probabilities of each image, in the first process alone; see GUIDE.md."""
    with META:
        table = recorder(RUNS[-1].config.coreset, N, CLASSES, 2048, META)
    size = sum(buffer.nbytes for buffer in table.buffers())
    assert size == N * (2 * CLASSES + 4 * 2 + 8) and round(len(BITS) * size / 1e9) == 8
