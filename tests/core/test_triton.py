"""The Triton kernels against the formulas: by Triton's interpreter, which takes no GPU, and compiled for one.

Triton reads TRITON_INTERPRET when it is imported, so the interpreted tests run in a process of their own.
"""

import os
import subprocess
import sys
from threading import Lock

import pytest
import torch
from torch import Tensor

import emqlib as emq
from emqlib import correction, kernels, layers, models, quantizers
from emqlib.convert import quantized_layers, step_weights

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the last test starts")
# bit-widths, and whether the number of levels is a tensor
CASES = [(32, False), *((b, b % 2 == 0) for b in range(1, 9)), (1, True)]


def weights() -> list[Tensor]:
    """Of odd sizes; zeros are ties between two levels, and extremes are shared."""
    torch.manual_seed(7)  # no other weight lies near a tie, where float32 may round otherwise than float64
    shapes = [(5, 5, 3, 3), (6, 20, 1, 1), (3, 17), (4, 6, 3, 3), (1, 1), (2, 5)]
    found = [0.2 * torch.randn(shape) for shape in shapes]
    found[0][2:4] = found[0][:2]
    found[1][:, :4] = 0
    found[2][1] = 0.3  # a channel of equal weights
    found[3] = found[3].contiguous(memory_format=torch.channels_last)
    found[5].zero_()
    return [w.requires_grad_() for w in found]


def formula(w: Tensor, bits: int) -> Tensor:
    w_q, domain = quantizers.dorefa_weight(w, quantizers.levels(bits))
    return domain if bits == 32 else correction.correct_weight(w_q, domain)


def number(n: float, tensor: bool) -> quantizers.Number:
    """n as Python knows it, or as a captured graph reads it."""
    return torch.tensor(n) if tensor else n


@interpreted
def test_a_weight_that_starts_at_zero_learns() -> None:
    from emqlib.triton_kernels import correct_dorefa_weights

    w, grad = torch.zeros(2, 5, requires_grad=True), torch.rand(2, 5)
    correct_dorefa_weights([w], 3.0)[0].backward(grad)
    torch.testing.assert_close(w.grad, grad)


@interpreted
@pytest.mark.parametrize(("bits", "tensor"), CASES)
def test_values_and_gradients_are_the_formulas(bits: int, tensor: bool) -> None:
    from emqlib.triton_kernels import correct_dorefa_weights

    given = weights()
    twins = [w.detach().double().requires_grad_() for w in given]
    found = correct_dorefa_weights(given, number(quantizers.levels(bits), tensor))
    expected = [formula(w, bits) for w in twins]
    upstream = [torch.randn_like(w) for w in given]
    torch.autograd.backward(found[:-1], upstream[:-1])  # the gradient of weights that are all zero is anything
    torch.autograd.backward(expected[:-1], [g.double() for g in upstream[:-1]])
    assert given[-1].grad is None and not found[-1].any()
    for w, twin, ours, theirs in zip(given[:-1], twins, found, expected, strict=False):
        assert ours.stride() == w.stride()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(w.grad.double(), twin.grad, rtol=1e-4, atol=2e-5)


@interpreted
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_has_the_gradients_of_plain_functions(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = emq.convert(models.build("resnet8", 10, width=4), emq.QuantSpec(bits=(2, 4), activation="none"))
    x = torch.randn(4, 3, 8, 8)
    emq.set_bits(model, {"*conv1": 2, "*": 32})

    def step() -> tuple[list[Tensor], Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), step_weights(model):
            prepared = [layer.prepared[0][0].detach() for layer in quantized_layers(model).values()]
            model(x).float().square().sum().backward()
        return prepared, torch.cat([p.grad.flatten() for p in model.parameters()])

    prepared, gradient = step()
    monkeypatch.setattr(kernels, "runs_triton", lambda w: False)
    plain, expected = step()
    for ours, theirs in zip(prepared, plain, strict=True):
        assert ours.dtype == (torch.bfloat16 if autocast else torch.float32)
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=0.008 if autocast else 1e-5, atol=1e-6)
    # the interpreter truncates to bfloat16, where a GPU rounds
    assert (gradient - expected).norm() <= (0.2 if autocast else 1e-3) * expected.norm()


@interpreted
def test_a_part_without_autocast_takes_weights_of_its_own() -> None:
    net = emq.convert(models.build("resnet8", 10, width=4), emq.QuantSpec(bits=(2, 4), activation="none"))
    layer = next(iter(quantized_layers(net).values()))
    x = torch.randn(1, layer.in_channels, 4, 4)
    with torch.autocast("cpu", torch.bfloat16), step_weights(net), torch.autocast("cpu", enabled=False):
        assert torch.equal(layer(x), layer._conv_forward(x, *layer.weight_and_bias()))


@interpreted
@pytest.mark.parametrize(
    "spec", [{"weight": "minmax"}, {"correction": "mean"}, {"correction_gradient": False}, {"output_correction": True}]
)
def test_other_weights_are_quantized_one_by_one(spec: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = emq.convert(models.build("resnet8", 10, width=4), emq.QuantSpec(bits=(2, 4), **spec))
    found = list(quantized_layers(model).values())
    assert found and not any(layer.is_joint() for layer in found)
    layers.prepare(found, Lock())
    assert all(layer.prepared for layer in found)
    layer = emq.convert(models.build("resnet8", 10, width=4), emq.QuantSpec(bits=(2, 4))).layer1[0].conv1
    assert layer.is_joint() and not layer.double().is_joint()  # nor those of another type, nor longer ones
    layer.weight = torch.nn.Parameter(torch.ones(1, layers.LONGEST + 1))
    assert not layer.is_joint()


@interpreted
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor", [False, True])
def test_activations_are_the_formulas(bits: int, dtype: torch.dtype, tensor: bool) -> None:
    n = quantizers.levels(bits)
    x = (torch.randn(3, 5, 7, 3) + 0.5).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, 0, :, 0] = (torch.arange(7) - 2) / (2 * n)  # ends, and half levels
    given, twin = x.clone().requires_grad_(), x.double().requires_grad_()
    grid = quantizers.dorefa_grid(number(n, tensor), 1.0)
    found = kernels.fake_quantize(given, *grid, learn_step=False, unit=True)
    expected = quantizers.dorefa_activation(x.float(), n)
    quantizers.dorefa_activation(twin, n).sum().backward()
    found.sum().backward()
    assert found.dtype == dtype and found.stride() == x.stride()
    torch.testing.assert_close(found.float(), expected, rtol=0.008 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert torch.equal(given.grad.double(), twin.grad)
    assert kernels.fake_quantize(x[:0] + 0, 0.5, 0.0, 2.0).shape == (0, 5, 7, 3)
    assert kernels.fake_quantize(torch.tensor([torch.nan, 9.0]), 0.5, 0.0, 2.0).isnan().tolist() == [True, False]


def test_without_a_gpu_functions_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.ones(2, 3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not kernels.runs_triton(w)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.runs_triton(w)
    monkeypatch.setattr(kernels, "_TRITON", False)
    assert not kernels.runs_triton(w)


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
@pytest.mark.parametrize("gives", ["the formula", "other numbers", "other levels", "an error"])
def test_kernels_that_a_device_gets_wrong_are_not_used_there(gives: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_kernels = pytest.importorskip("emqlib.triton_kernels")

    def kernel(weights: list[Tensor], n: float) -> tuple[Tensor, ...]:
        if gives == "an error":
            raise RuntimeError("no driver")
        right = tuple(correction.correct_weight(*quantizers.dorefa_weight(w, n)) for w in weights)
        return tuple(w + 1e-3 * (gives == "other numbers") for w in right)

    def rounded(x: Tensor, scale: float, q_min: float, q_max: float) -> Tensor:
        return quantizers.fake_quantize(x, scale, q_min, q_max + (gives == "other levels"))

    monkeypatch.setattr(triton_kernels, "correct_dorefa_weights", kernel)
    monkeypatch.setattr(triton_kernels, "fake_quantize", rounded)
    tried = kernels._agree.__wrapped__
    if gives == "the formula":
        assert tried(torch.device("cpu"))
        return
    with pytest.warns(UserWarning, match="not used on cpu, where " + ("they give|RuntimeError")):
        assert not tried(torch.device("cpu"))


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
@pytest.mark.parametrize("flag", [False, True])
def test_kernels_compile_for_a_gpu(flag: bool) -> None:
    """For compute capability 9.0, the H100's; without fused products and sums, as they are launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from emqlib import triton_kernels

    known = {"table": "*i64", "out": "*bf16", "grad": "*bf16"}
    known |= dict.fromkeys(("scale", "q_min", "q_max"), "*bf16" if flag else "fp32")
    for name in ("statistics", "values", "slopes", "gradients", "quantize"):
        kernel = getattr(triton_kernels, name)
        fixed = {
            k: v
            for k, v in {"BLOCK": 1024, "CHANNELS": 64, "FULL": flag, "LOADED": flag}.items()
            if k in kernel.arg_names
        }
        known["size"] = "i32" if name == "quantize" else "*fp32"
        kinds = {k: "constexpr" if k in fixed else known.get(k, "*fp32") for k in kernel.arg_names}
        source = ASTSource(kernel, kinds, {(kernel.arg_names.index(k),): v for k, v in fixed.items()})
        options = {"num_warps": 8, "enable_fp_fusion": False}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert made.asm["cubin"] and "fma.rn" not in made.asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_interpreted_tests_pass() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert f"{len(CASES) + 2 + 2 + 4 + 16 + 1} passed" in ran.stdout
