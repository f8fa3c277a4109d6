"""Plain networks, without a line of quantization in them: `convert` makes a multi-bit network of any of them.

Images are (N, 3, H, W) float, logits (N, num_classes). Every ResNet ends in the mean over what is left of height and
width, so images larger than the 32 x 32 of CIFAR work too; a ViT is built for one image size. Every ReLU is a module of
its own and torch.fx can trace every network: a converter can see what stands before each convolution.

Sources: He et al. 2016, "Deep Residual Learning for Image Recognition" (post-activation) and "Identity Mappings in
Deep Residual Networks" (pre-activation); Any-Precision: Yu et al. 2021, code at SHI-Labs/Any-Precision-DNNs; ViT:
Dosovitskiy et al. 2021, in the sizes of DeiT, Touvron et al. 2021 (arXiv 2012.12877).
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torchvision import models as torchvision_models

from .checks import instance, integer, invalid

if TYPE_CHECKING:
    from .convert import Decisions
    from .layers import QuantSpec

# The most that a size counts, 4096 for all others: where a file asks for more, it is no network of ours.
_MOST = {"num_classes": 10**6, "depth": 100, "width_factor": 256}


@dataclass
class Record:
    """What this library knows about a network, in the network's attribute `emq`."""

    network: dict[str, Any] | None = None  # the name and the arguments of the builder in this module that made it
    spec: "QuantSpec | None" = None  # how `convert` quantized it
    decided: "Decisions | None" = None  # what `convert` decided about its layers
    data: dict[str, Any] | None = None  # the data set that it was trained on last
    packed: dict[str, int] | None = None  # after `pack`, the bit-width of each layer


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Post-activation: ReLU(conv-BN-ReLU-conv-BN + shortcut).

    The shortcut is a 1 x 1 convolution with batch norm where the shape changes (He's option B), else the identity.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = _conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = _conv3x3(outputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()
        changes = stride != 1 or inputs != outputs
        self.shortcut = _projection(inputs, outputs, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W'), where H' = ceil(H / stride)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class PreActBlock(nn.Module):
    """Pre-activation, as Any-Precision publishes it: BN-ReLU-conv-BN-ReLU-conv + shortcut.

    The shortcut is a 1 x 1 convolution with batch norm of the *activated* input where the stride is 2, else the input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(inputs), nn.ReLU(), _conv3x3(inputs, outputs, stride)
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(outputs), nn.ReLU(), _conv3x3(outputs, outputs)
        self.shortcut = _projection(inputs, outputs, stride) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W'), where H' = ceil(H / stride)."""
        activated = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(activated)))
        return self.conv2(out) + (x if self.shortcut is None else self.shortcut(activated))


def _stages(block: Callable[[int, int, int], nn.Module], widths: Sequence[int], depth: int) -> dict[str, nn.Module]:
    """`layer1`, `layer2`, ...: `depth` blocks each; all but the first halve height and width in their first block."""
    stages: dict[str, nn.Module] = {}
    inputs = widths[0]
    for number, outputs in enumerate(widths, start=1):
        first = block(inputs, outputs, 1 if number == 1 else 2)
        stages[f"layer{number}"] = nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(depth - 1)))
        inputs = outputs
    return stages


def _head(features: int, num_classes: int) -> dict[str, nn.Module]:
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(features, num_classes)}


def _resnet(stages: int, depth: int, width: int, num_classes: int) -> nn.Module:
    """Post-activation ResNet for small images: 3 x 3 stem, `stages` of BasicBlock, mean, linear head; He's weights."""
    widths = [width * 2**stage for stage in range(stages)]
    stem = {"conv1": _conv3x3(3, width), "bn1": nn.BatchNorm2d(width), "relu1": nn.ReLU()}
    head = _head(widths[-1], num_classes)  # before the stages: seeded networks start from the same numbers as ever
    net = nn.Sequential(OrderedDict({**stem, **_stages(BasicBlock, widths, depth), **head}))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return net


MODELS: dict[str, Callable[..., nn.Module]] = {}


def _builder(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Enter a builder in MODELS; its networks tell in `emq.network` how to build them again.

    It raises a ValueError for an argument that is not a positive integer.
    """

    @functools.wraps(function)
    def recorded(*args: int, **kwargs: int) -> nn.Module:
        given = inspect.signature(function).bind(*args, **kwargs)
        given.apply_defaults()
        sizes = {name: integer(name, value, 1, _MOST.get(name, 4096)) for name, value in given.arguments.items()}
        net = function(**sizes)
        net.emq = Record(network={"name": function.__name__} | sizes)
        return net

    MODELS[function.__name__] = recorded
    return recorded


@_builder
def resnet8(num_classes: int = 10, width: int = 16) -> nn.Module:
    """He's CIFAR ResNet with n = 1, so 6n + 2 = 8 layers: (N, 3, 32, 32) -> (N, num_classes); 78,042 parameters.

    width: the channels of the first stage; the second and third have two and four times as many.
    """
    return _resnet(3, 1, width, num_classes)


@_builder
def resnet20(num_classes: int = 10, width: int = 16) -> nn.Module:
    """He's CIFAR ResNet with n = 3, so 20 layers: (N, 3, 32, 32) -> (N, num_classes); 272,474 parameters."""
    return _resnet(3, 3, width, num_classes)


@_builder
def resnet18(num_classes: int = 10, width: int = 64) -> nn.Module:
    """ResNet-18 for CIFAR: (N, 3, 32, 32) -> (N, num_classes); 11,173,962 parameters.

    He's ImageNet ResNet-18 with a 3 x 3 stem and no pooling after it, as kuangliu/pytorch-cifar and the coreset papers
    (TDDS) use it; each of its four stages has twice the channels of the one before.
    """
    return _resnet(4, 2, width, num_classes)


@_builder
def resnet50(num_classes: int = 1000) -> nn.Module:
    """torchvision's ResNet-50, untrained: (N, 3, 224, 224) -> (N, num_classes); 25,557,032 parameters."""
    return torchvision_models.resnet50(weights=None, num_classes=num_classes)


@_builder
def preact_resnet20(num_classes: int = 10, width_factor: int = 5) -> nn.Module:
    """Any-Precision's CIFAR network: (N, 3, 32, 32) -> (N, num_classes); 6,758,810 parameters.

    Pre-activation ResNet-20 with 16, 32 and 64 times `width_factor` channels. As published, batch norm without ReLU
    stands before the mean, and the weights start as PyTorch's own do.
    """
    widths = [width_factor * width for width in (16, 32, 64)]
    tail = {"bn": nn.BatchNorm2d(widths[-1]), **_head(widths[-1], num_classes)}
    return nn.Sequential(OrderedDict({"conv1": _conv3x3(3, widths[0]), **_stages(PreActBlock, widths, 3), **tail}))


def _vit(num_classes: int, image_size: int, patch_size: int, width: int, depth: int, heads: int) -> nn.Module:
    if image_size % patch_size:
        raise invalid("patch_size", patch_size, f"a divisor of image_size={image_size}")
    if width % heads:
        raise invalid("heads", heads, f"a divisor of width={width}")
    net = torchvision_models.VisionTransformer(
        image_size, patch_size, depth, heads, hidden_dim=width, mlp_dim=4 * width, num_classes=num_classes
    )
    nn.init.trunc_normal_(net.heads.head.weight, std=0.02)  # torchvision's zeros give the layers below no gradient
    return net


@_builder
def vit_tiny(
    num_classes: int = 10, image_size: int = 32, patch_size: int = 4, width: int = 192, depth: int = 12, heads: int = 3
) -> nn.Module:
    """ViT-Ti for small images: (N, 3, image_size, image_size) -> (N, num_classes); 5,362,762 parameters.

    torchvision's VisionTransformer, class token and learned positions, on patches of patch_size x patch_size pixels:
    `depth` layers of `heads` heads, `width` features a token, four times as many inside the MLP. Patches that do not
    tile the image, and heads that do not split the width, are a ValueError.
    """
    return _vit(num_classes, image_size, patch_size, width, depth, heads)


@_builder
def vit_small(
    num_classes: int = 10, image_size: int = 32, patch_size: int = 4, width: int = 384, depth: int = 12, heads: int = 6
) -> nn.Module:
    """ViT-S: as `vit_tiny`, of twice the width and heads; 21,342,346 parameters."""
    return _vit(num_classes, image_size, patch_size, width, depth, heads)


def check_name(parameter: str, name: Any) -> str:
    """`name`, if `build` knows such a network; else a ValueError that names the parameter."""
    expected = f"one of {', '.join(sorted(MODELS))}, torchvision.NAME or timm.NAME"
    library, dot, inner = instance(parameter, name, str, expected).partition(".")
    if name in MODELS:
        return name
    if not dot or library not in ("torchvision", "timm"):
        raise invalid(parameter, name, expected)
    known = _timm().list_models() if library == "timm" else torchvision_models.list_models(module=torchvision_models)
    if inner not in known:
        raise invalid(parameter, name, f"{expected}; {library} has no {inner!r}")
    return name


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("networks of timm need it: pip install timm") from error
    return timm


def build(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """The network of that name in `MODELS`, or "torchvision.NAME" or "timm.NAME" for one of theirs, untrained.

    Other arguments are its builder's, for example `width=8`. ValueError: an unknown name, an argument that the builder
    does not take, or a value that is not allowed. ImportError: a network of timm, which is not installed.

    Examples:
        >>> build("resnet8", num_classes=100, width=4).fc
        Linear(in_features=16, out_features=100, bias=True)
    """
    library, dot, inner = check_name("name", name).partition(".")
    if dot:
        classes = integer("num_classes", num_classes, 1, _MOST["num_classes"])
        try:
            if library == "timm":
                return _timm().create_model(inner, num_classes=classes, **kwargs)
            return torchvision_models.get_model(inner, weights=None, num_classes=classes, **kwargs)
        except TypeError as error:
            raise invalid("kwargs", kwargs, f"arguments that {name} takes ({error})") from error
    builder = MODELS[name]
    known = list(inspect.signature(builder).parameters)
    for key, value in kwargs.items():
        if key not in known:
            raise invalid(key, value, f"an argument that {name} takes: {', '.join(known)}")
    return builder(num_classes=num_classes, **kwargs)
