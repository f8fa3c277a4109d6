"""What training does on a GPU, tested where there is none."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import emqlib as emq
from emqlib import models
from emqlib.train import loop
from emqlib.train.data import loader
from emqlib.train.distributed import blocks, fastest_convolutions

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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's compiler, of a block's input
def test_blocks_are_compiled_by_themselves_and_alike_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    counter, plain = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: plain(f, backend=counter, **kwargs))
    data = emq.Dataset.from_tensors(torch.rand(32, 3, 8, 8), torch.arange(32) % 4)
    weights = []
    for how in ("blocks", False):
        torch.manual_seed(0)
        spec = emq.QuantSpec(bits=(2, 4), activation_range="unit", full_precision=())
        net = emq.convert(models.build("resnet20", 4, width=16), spec)  # narrower ones are not compiled
        emq.train(net, data, emq.TrainConfig(epochs=1, batch_size=16, lr=0.01, compile=how), progress=False)
        assert not any(part._compiled_call_impl for part in net.modules())
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert len(blocks(net)) == 9 and 0 < counter.frame_count <= 7
    assert (weights[0] - weights[1]).norm() <= 0.01 * weights[1].norm()
