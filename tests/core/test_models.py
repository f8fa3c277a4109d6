"""The networks against the published structure, counted and computed a second time by other means."""

import sys
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from emqlib import models

pytestmark = pytest.mark.processor

# Per network: number of convolutions, ReLUs, classes and parameters. 1 x 1 shortcuts are counted: one in each of the
# later stages. Parameters: He et al. 2016, table 6; kuangliu/pytorch-cifar; Any-Precision's code; torchvision.
SHAPES = {
    "resnet8": (1 + 6 + 2, 1 + 6, 10, 0.078e6),
    "resnet20": (1 + 18 + 2, 1 + 18, 10, 0.27e6),
    "resnet18": (1 + 16 + 3, 1 + 16, 10, 11.17e6),
    "preact_resnet20": (1 + 18 + 2, 18, 10, 6.76e6),
    "resnet50": (1 + 48 + 4, 1 + 16 * 3, 1000, 25.557e6),
}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def layers(net: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", SHAPES)
def test_layers_parameters_and_trace(name: str) -> None:
    convolutions, relus, classes, published = SHAPES[name]
    with torch.device("meta"):
        net = models.build(name, classes)
        assert parameters(net) == pytest.approx(published, rel=0.01)
        assert f"{parameters(net):,} parameters" in models.MODELS[name].__doc__
        assert len(layers(net, nn.Conv2d)) == convolutions
        assert all(conv.bias is None for conv in layers(net, nn.Conv2d))
        graph = torch.fx.symbolic_trace(net)
        names = [node.target for node in graph.graph.nodes if node.op == "call_module"]
        # a shared ReLU, as torchvision's ResNet-50 has, could not get a quantizer for each of its places
        assert name == "resnet50" or len(names) == len(set(names))
        called = [graph.get_submodule(name) for name in names]
        assert sum(isinstance(module, nn.ReLU) for module in called) == relus
        assert sum(isinstance(module, nn.Conv2d) for module in called) == convolutions
        assert net(torch.zeros(2, 3, 64, 64)).shape == (2, classes)


def test_initial_weights_follow_he() -> None:
    weight = models.resnet18().get_submodule("layer4.1.conv2").weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert weight.mean().item() == pytest.approx(0, abs=1e-4)


# The forward pass again, in float64, with functional calls on the state dict alone.
State = dict[str, Tensor]


def norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
    channels = (1, -1, 1, 1)
    scaled = (x - mean.view(channels)) / (var.view(channels) + 1e-5) ** 0.5
    return scaled * weight.view(channels) + bias.view(channels)


def post_activation_block(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    out = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
    out = norm(state, f"{name}.bn1", out).clamp(min=0)
    out = norm(state, f"{name}.bn2", F.conv2d(out, state[f"{name}.conv2.weight"], padding=1))
    if f"{name}.shortcut.0.weight" in state:
        x = norm(state, f"{name}.shortcut.1", F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=stride))
    return (out + x).clamp(min=0)


def pre_activation_block(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    first = norm(state, f"{name}.bn1", x).clamp(min=0)
    out = F.conv2d(first, state[f"{name}.conv1.weight"], stride=stride, padding=1)
    out = norm(state, f"{name}.bn2", out).clamp(min=0)
    out = F.conv2d(out, state[f"{name}.conv2.weight"], padding=1)
    if f"{name}.shortcut.0.weight" in state:
        x = norm(state, f"{name}.shortcut.1", F.conv2d(first, state[f"{name}.shortcut.0.weight"], stride=stride))
    return out + x


def head(state: State, x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def with_uneven_norms(net: nn.Module, rng: torch.Generator) -> nn.Module:
    """Batch norms away from the identity they start as, so that a forgotten one would show."""
    for layer in layers(net, nn.BatchNorm2d):
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.data = 0.5 + torch.rand(tensor.shape, generator=rng)
    return net.double().eval()


def stages(block: Callable[..., Tensor], state: State, x: Tensor, blocks: int) -> Tensor:
    for stage in (1, 2, 3):
        for number in range(blocks):
            x = block(state, f"layer{stage}.{number}", x, 2 if stage > 1 and number == 0 else 1)
    return x


@pytest.mark.parametrize(("name", "blocks"), [("resnet8", 1), ("resnet20", 3)])
def test_post_activation_forward(name: str, blocks: int, rng: torch.Generator) -> None:
    net = with_uneven_norms(models.build(name, 10, width=4), rng)
    images = torch.randn(2, 3, 16, 16, generator=rng, dtype=torch.float64)
    state = net.state_dict()
    x = norm(state, "bn1", F.conv2d(images, state["conv1.weight"], padding=1)).clamp(min=0)
    expected = head(state, stages(post_activation_block, state, x, blocks))
    torch.testing.assert_close(net(images), expected, rtol=1e-10, atol=1e-10)


def test_pre_activation_forward(rng: torch.Generator) -> None:
    net = with_uneven_norms(models.preact_resnet20(width_factor=1), rng)
    images = torch.randn(2, 3, 16, 16, generator=rng, dtype=torch.float64)
    state = net.state_dict()
    x = stages(pre_activation_block, state, F.conv2d(images, state["conv1.weight"], padding=1), 3)
    expected = head(state, norm(state, "bn", x))  # no ReLU here, as published
    torch.testing.assert_close(net(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["torchvision.resnet18", "torchvision.vit_b_16", "torchvision.mobilenet_v3_small"])
def test_networks_of_torchvision_by_name(name: str) -> None:
    with torch.device("meta"):
        net = models.build(name, 7)
        assert net(torch.zeros(2, 3, 224, 224)).shape == (2, 7)
        theirs = torchvision.models.get_model(name.split(".")[1], weights=None, num_classes=7)
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_networks_of_timm_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    net = models.build("timm.deit_tiny_patch16_224", 7)
    assert parameters(net) == 5_524_416 + 192 * 7 + 7 and type(net).__module__.startswith("timm.")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        models.build("timm.deit_tiny_patch16_224", 7)
