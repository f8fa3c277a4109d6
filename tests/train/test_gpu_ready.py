"""What training does on a GPU, tested where there is none."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import emqlib as emq
from emqlib.train import loop
from emqlib.train.data import loader
from emqlib.train.distributed import fastest_convolutions

CPU, CUDA, META = map(torch.device, ("cpu", "cuda", "meta"))


class _Uploads(TorchDispatchMode):
    """Counts copies from the CPU to the meta device, which stands for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, torch.Tensor)]
        self.count += bool(given) and given[0].device == CPU and getattr(result, "device", CPU) == META
        return result


def test_batches_of_an_epoch_are_uploaded_at_once() -> None:
    images, labels = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8), torch.arange(64) % 10
    data = emq.Dataset.from_tensors(images, labels, flip=True, crop_padding=2)
    there, counts = replace(data, train=data.train.to(META)), []
    for size in (4, 16):
        with _Uploads() as uploads:
            batches = list(loader(there, "train", META).epoch(torch.arange(64).split(size), torch.Generator()))
        assert len(batches) == 64 // size and batches[0][0].shape == (size, 3, 8, 8)
        counts.append(uploads.count)
    assert counts[0] <= 4 and counts[1] <= 2  # indices and draws; mean and standard deviation the first time


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_is_fused_on_cuda_alone(name: str) -> None:
    config = emq.TrainConfig(optimizer=name)
    with FakeTensorMode():
        there = loop.optimizer(nn.Linear(4, 2, device=CUDA), config)
    assert there.defaults["fused"] is True
    assert loop.optimizer(nn.Linear(4, 2), config).defaults["fused"] is None


def test_convolutions_are_tried_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    with fastest_convolutions(CPU):
        assert not cudnn.benchmark
    with pytest.raises(RuntimeError, match="within"), fastest_convolutions(CUDA):
        assert cudnn.benchmark
        raise RuntimeError("within")
    assert not cudnn.benchmark
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with fastest_convolutions(CUDA):
        assert not cudnn.benchmark
