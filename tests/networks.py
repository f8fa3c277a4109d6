"""Networks of a user's own, and what several files of tests ask of them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from emqlib import models
from emqlib.layers import QuantConv2d, QuantLinear, QuantSpec
from emqlib.norms import MultiBitBatchNorm

SWITCHED = (QuantConv2d, QuantLinear, MultiBitBatchNorm)
# Together these have each quantizer, norm and correction.
SPECS = [{}, {"norm": "switchable", "correction": "none"}, {"norm": "shared_affine", "output_correction": True}]
SPECS += [{"weight": "minmax", "activation": "lsq"}, {"weight": "lsq", "activation": "pact", "correction": "mean"}]


def spec(**kwargs: object) -> QuantSpec:
    return QuantSpec(**{"bits": (2, 4, 8)} | kwargs)


class Functional(nn.Module):
    """Functional ReLU and pooling, a residual sum, a view with a size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 6, 1),
        )
        self.norm = nn.BatchNorm2d(6)
        self.hidden, self.head = nn.Linear(6 * 16, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.avg_pool2d(torch.relu(x + F.relu(self.conv1(x))), x.shape[2] // 4)
        x = self.conv2(x).relu()
        return self.head(torch.sigmoid(self.hidden(x.view(x.size(0), -1))))


class Norms1d(nn.Sequential):
    """Batch norms of one dimension, the last without ReLU."""

    def __init__(self) -> None:
        hidden = [nn.Sequential(nn.Linear(i, 12), nn.BatchNorm1d(12), nn.ReLU()) for i in (16, 12, 12)]
        super().__init__(nn.Flatten(), *hidden, nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 10))


class Untraceable(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 10)  # registered first, called last
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.mean() > 0:
            x = x.relu()
        return self.head(self.conv(x).mean((2, 3)))


class Twice(nn.Module):
    """One convolution and one batch norm under two names each, called at two places; one input has a sign."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
        )
        self.again, self.norm_again, self.head = self.conv, self.norm, nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(x).relu()))
        return self.head(self.norm_again(self.again(x)).mean((2, 3)))


class Remembers(nn.Module):
    """Keeps what it last saw and counts its calls, as networks do whose features are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)
        self.features: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.features = self.conv(self.stem(x).relu())
        return self.head(self.features.mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": lambda: models.resnet8(width=4),
    "resnet18": lambda: models.resnet18(width=2),
    "preact_resnet20": lambda: models.preact_resnet20(width_factor=1),
    "torchvision.resnet18": lambda: torchvision.models.resnet18(weights=None, num_classes=10),
    "torchvision.mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(weights=None, num_classes=10),
    "functional": Functional,
    "norms1d": Norms1d,
    "untraceable": Untraceable,
    "twice": Twice,
    "remembers": Remembers,
}


def images_for(name: str, rng: torch.Generator, count: int = 4) -> Tensor:
    shape = (16,) if name == "norms1d" else (3, 16, 16)
    return torch.randn(count, *shape, generator=rng)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def uneven(net: nn.Module, rng: torch.Generator) -> nn.Module:
    """Batch norms that have seen data, with activations up to about 10; in evaluation mode."""
    for norm in net.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.weight.data = 1 + 2 * torch.rand(norm.weight.shape, generator=rng)
            norm.bias.data = torch.randn(norm.bias.shape, generator=rng)
            norm.momentum = 0.5
    with torch.no_grad():
        for _ in range(6):
            net.train()(torch.randn(8, 3, 16, 16, generator=rng))
    return net.eval()


def quantized(model: nn.Module) -> dict[str, QuantConv2d | QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (QuantConv2d, QuantLinear))}


def bits_of(model: nn.Module) -> dict[str, int]:
    return {name: m.bits for name, m in model.named_modules() if isinstance(m, SWITCHED)}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
