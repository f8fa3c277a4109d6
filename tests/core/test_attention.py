"""Attention with open projections: PyTorch's own is the reference, and every product is watched for plain weights."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models as torchvision_models

import emqlib as emq
from emqlib import models
from emqlib.attention import MultiheadAttention
from emqlib.layers import QuantLinear

pytestmark = pytest.mark.processor

KINDS = {
    "batch first": {"batch_first": True},
    "batch second": {},
    "no bias": {"batch_first": True, "bias": False},
    "other key and value widths": {"batch_first": True, "kdim": 5, "vdim": 7},
}


def pair(**kwargs: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, **kwargs)
    for p in theirs.parameters():  # biases start at zero, which would hide one that is lost
        nn.init.normal_(p)
    return theirs, MultiheadAttention(theirs)


def inputs(theirs: nn.MultiheadAttention, rng: torch.Generator) -> list[Tensor]:
    """Query of 4 tokens, key and value of 6, three in the batch."""
    shapes = [(3, 4, 8), (3, 6, theirs.kdim), (3, 6, theirs.vdim)]
    x = [torch.randn(shape, generator=rng) for shape in shapes]
    return x if theirs.batch_first else [t.transpose(0, 1) for t in x]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["none", "boolean", "added", "one a head", "padding", "both"])
def test_same_outputs_and_weights_as_pytorchs(kind: str, mask: str, rng: torch.Generator) -> None:
    theirs, ours = pair(**KINDS[kind])
    hidden = torch.rand(4, 6, generator=rng) < 0.3
    hidden[:, 0] = False  # a token that sees nothing gives NaN in both
    padding = torch.tensor([[False] * 6, [False] * 5 + [True], [False] * 3 + [True] * 3])
    masks = {
        "none": {},
        "boolean": {"attn_mask": hidden},
        "added": {"attn_mask": torch.randn(4, 6, generator=rng)},
        "one a head": {"attn_mask": torch.randn(6, 4, 6, generator=rng)},
        "padding": {"key_padding_mask": padding},
        "both": {"key_padding_mask": padding, "attn_mask": hidden},
    }[mask]
    x = inputs(theirs, rng)
    for options in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        expected, expected_weights = theirs(*x, **masks, **options)
        out, weights = ours(*x, **masks, **options)
        torch.testing.assert_close(out, expected)
        assert (weights is None) == (expected_weights is None)
        if weights is not None:
            torch.testing.assert_close(weights, expected_weights)


def test_without_a_batch(rng: torch.Generator) -> None:
    for kind in ("batch first", "batch second"):
        theirs, ours = pair(**KINDS[kind])
        x = torch.randn(4, 8, generator=rng)
        padding = torch.tensor([False, False, True, False])
        for expected, found in zip(
            theirs(x, x, x, key_padding_mask=padding), ours(x, x, x, key_padding_mask=padding), strict=True
        ):
            torch.testing.assert_close(found, expected)


def test_dropout_in_training_alone(rng: torch.Generator) -> None:
    theirs, ours = pair(batch_first=True, dropout=0.5)
    x = inputs(theirs, rng)
    assert ours.training and not torch.equal(ours(*x)[0], ours(*x)[0])
    assert not torch.equal(ours(*x, need_weights=False)[0], ours(*x, need_weights=False)[0])
    theirs.eval()
    torch.testing.assert_close(ours.eval()(*x)[0], theirs(*x)[0])
    assert not MultiheadAttention(theirs).training


def test_parameters_are_copies_that_keep_what_is_frozen() -> None:
    theirs, _ = pair(batch_first=True)
    theirs.out_proj.weight.requires_grad_(False)
    ours = MultiheadAttention(theirs)
    assert not ours.out_proj.weight.requires_grad and ours.q_proj.weight.requires_grad
    with torch.no_grad():
        ours.v_proj.weight.zero_()
    assert theirs.in_proj_weight[16:].abs().min() > 0
    assert torch.equal(ours.k_proj.bias, theirs.in_proj_bias[8:16])


def test_a_hint_without_its_mask_is_refused(rng: torch.Generator) -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(2, 4, 8, generator=rng)
    with pytest.raises(ValueError, match=r"^is_causal=True: expected attn_mask"):
        ours(x, x, x, is_causal=True)
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    for options in ({}, {"need_weights": False}):
        expected = theirs(x, x, x, attn_mask=hidden, is_causal=True, **options)[0]
        torch.testing.assert_close(ours(x, x, x, attn_mask=hidden, is_causal=True, **options)[0], expected)


class Products(TorchDispatchMode):
    """Every product of matrices that runs: how many, and which of a network's own weights went into one."""

    KINDS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution", "_convolution")
    FUSED = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")  # many products in one: fast paths

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        weights = {name: p for name, p in net.named_parameters() if p.dim() > 1}
        self.names = {p.untyped_storage().data_ptr(): name for name, p in weights.items()}
        self.plain: Counter[str] = Counter()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.KINDS + self.FUSED:
            self.made += 1
            tensors = [a for a in args if isinstance(a, Tensor)]
            self.plain.update(
                self.names[t.untyped_storage().data_ptr()]
                for t in tensors
                if t.untyped_storage().data_ptr() in self.names
            )
        return func(*args, **(kwargs or {}))


def encoder(depth: int = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer, depth), nn.Linear(8, 3))


def torchvision_vit() -> nn.Module:
    net = torchvision_models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=5)
    nn.init.normal_(net.heads.head.weight)  # it starts at zero
    return net


def decoder() -> nn.Module:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
            self.layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(self.layer(x, x.flip(1)))

    return Decoder()


DEIT = "deit_tiny_patch16_224"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    # builder, shape of an input, matrices that multiply: four a self-attention, two an MLP, the first and the last
    "vit_tiny": (lambda: models.vit_tiny(5, width=24, depth=2), (2, 3, 32, 32), 2 * 6 + 2),
    "vit_small": (lambda: models.vit_small(5, width=24, depth=1), (2, 3, 32, 32), 6 + 2),
    "torchvision": (torchvision_vit, (2, 3, 32, 32), 2 * 6 + 2),
    # query, key and value are one Linear there
    "timm": (lambda: timm.create_model(DEIT, depth=2, num_classes=5, img_size=32), (2, 3, 32, 32), 2 * 4 + 2),
    "nn.TransformerEncoder": (encoder, (2, 5, 6), 2 * 6 + 2),
    "nn.TransformerDecoderLayer": (decoder, (2, 5, 6), 2 * 4 + 2 + 2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_no_weight_escapes(network: str, training: bool, rng: torch.Generator) -> None:
    build, shape, count = NETWORKS[network]
    torch.manual_seed(0)
    net, x = build().train(training), torch.randn(shape, generator=rng)
    model = emq.convert(net, emq.QuantSpec(bits=(2, 8), weight="minmax"))
    assert len(emq.summary(model)) == count
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == count - 2
    calls: Counter[nn.Module] = Counter()
    hooks = [m.register_forward_hook(lambda m, *_: calls.update([m])) for m in layers]
    with torch.no_grad(), Products(model) as watched:
        model(x)
    for hook in hooks:
        hook.remove()
    assert set(calls) == set(layers)  # those that were not called would be weights unused, or used behind their backs
    kept = model.emq.decided.kept
    assert set(watched.plain) == {f"{name}.weight" for name in kept} and len(kept) == 2


def test_the_watch_sees_plain_weights_and_fast_paths(rng: torch.Generator) -> None:
    """A watch that sees nothing would prove nothing."""
    net, x = encoder(1).eval(), torch.randn(2, 5, 6, generator=rng)
    with torch.no_grad(), Products(net) as fast:
        net(x)
    with Products(net) as slow:
        net(x)
    names = {"0.weight", "2.weight", "1.layers.0.linear1.weight", "1.layers.0.linear2.weight"}
    names |= {"1.layers.0.self_attn.in_proj_weight", "1.layers.0.self_attn.out_proj.weight"}
    assert set(fast.plain) == set(slow.plain) == names and fast.made == 3 < slow.made


@pytest.mark.parametrize("network", NETWORKS)
def test_at_32_bits_it_is_the_plain_network(network: str, rng: torch.Generator) -> None:
    build, shape, _ = NETWORKS[network]
    torch.manual_seed(0)
    net, x = build().eval(), torch.randn(shape, generator=rng)
    model = emq.convert(net, emq.QuantSpec(bits=(2, 8), weight="minmax"))
    with emq.at_bits(model, 32), torch.no_grad():
        torch.testing.assert_close(model(x), net(x))
    with torch.no_grad():
        expected, at_8 = net(x), model(x)
        emq.set_bits(model, 2)
        at_2 = model(x)
    assert (at_8 - expected).norm() < 0.2 * expected.norm() < (at_2 - expected).norm() * 2


def test_inputs_of_a_vit_are_signed_and_its_ends_kept() -> None:
    model = emq.convert(models.vit_tiny(5, width=24, depth=2), emq.QuantSpec(bits=(2, 8)))
    table = emq.summary(model)
    assert model.emq.decided.kept == {"conv_proj": "first", "heads.head": "last"}
    assert table[table.note.eq("")].signed.all() and set(table[table.note.eq("")].range) == {"tracked"}
    every = emq.convert(models.vit_tiny(5, width=24, depth=1), emq.QuantSpec(bits=(2, 8), full_precision=()))
    assert emq.summary(every).bits.eq(8).all()


def test_every_weight_of_a_vit_learns_at_every_bit_width(rng: torch.Generator) -> None:
    torch.manual_seed(0)
    model = emq.convert(models.vit_tiny(5, width=24, depth=2), emq.QuantSpec(bits=(2, 4, 8), weight="minmax"))
    x = torch.randn(4, 3, 32, 32, generator=rng)
    for bits in (2, 4, 8):
        emq.set_bits(model, bits)
        model.zero_grad()
        model(x).square().sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, (bits, name)
