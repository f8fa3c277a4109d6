"""Schedules of short runs, what is used where a processor has no bfloat16, and what `make demo` prints."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_cases import quick, tiny, train

import emqlib as emq
from emqlib import layers
from emqlib.paper import experiments, profiles, runs, tables
from emqlib.train import distributed, loop


@pytest.mark.parametrize("epochs", range(1, 13))
def test_short_runs_keep_the_decays_apart_and_an_epoch_after_each(epochs: int) -> None:
    p = profiles.parameters(profile="paper")
    scaled = experiments.base(p, 0, "cifar10", epochs).config.milestones
    assert all(earlier < later for earlier, later in pairwise((0, *scaled, epochs)))
    own = p.profile.training.milestones
    assert len(scaled) == len(own) or epochs < 6
    assert all(abs(m - n * epochs / 200) <= 1 for m, n in zip(scaled, own, strict=False))


# A processor without bfloat16

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True])
def bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether the processor has it, whatever processor this is."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: request.param, raising=False)
    distributed.has_bfloat16.cache_clear()
    yield request.param
    distributed.has_bfloat16.cache_clear()


def test_bfloat16_is_float32_where_the_cpu_has_none_and_that_is_told_once(bfloat16: bool) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            with distributed.autocast("bfloat16", CPU):
                found = nn.Linear(2, 2)(torch.ones(1, 2)).dtype
            with warnings.catch_warnings():  # after which Python itself would tell it again
                pass
    assert found == (torch.bfloat16 if bfloat16 else torch.float32)
    assert [str(w.message)[:35] for w in told] == ([] if bfloat16 else ["this processor has no fast bfloat16"])
    asked = [("none", CPU), ("float16", CPU), ("bfloat16", torch.device("cuda"))]
    assert [distributed.autocast_used(*pair) for pair in asked] == ["none", "float16", "bfloat16"]


def test_the_warning_comes_before_the_first_step(
    bfloat16: bool, digits: emq.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_step", lambda *_: pytest.fail("a step was made"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "this processor has no fast bfloat16")
        with pytest.raises(pytest.fail.Exception if bfloat16 else UserWarning, match=r"a step|runs in float32"):
            train(tiny(), digits, quick(autocast="bfloat16"))


def small_run(tmp_path: Path) -> runs.Run:
    (_, run) = experiments.quickstart(profiles.parameters(profile="smoke", bits=(4,), results_dir=tmp_path))
    return replace(run, subset=(8, 8), config=replace(run.config, epochs=1, batch_size=8, autocast="bfloat16"))


def test_rows_tell_what_was_used_and_by_which_processor(bfloat16: bool, tmp_path: Path) -> None:
    rows = runs.run_all([small_run(tmp_path)], tmp_path, progress=False)
    assert set(rows.autocast) == {"bfloat16" if bfloat16 else "none"}
    assert set(rows.instructions) == {torch.backends.cpu.get_cpu_capability()}
    (model,) = set(rows.processor)
    assert model and (not Path("/proc/cpuinfo").exists() or model in Path("/proc/cpuinfo").read_text() + "aarch64")


def test_rows_from_before_are_read_beside_new_ones(tmp_path: Path) -> None:
    new = small_run(tmp_path)
    old = replace(new, config=replace(new.config, seed=1))
    runs.run_all([new, old], tmp_path, progress=False)
    path = runs.rows_file(old, tmp_path)
    record = json.loads(path.read_text())
    for name in ("processor", "instructions", "autocast"):
        del record["provenance"][name]
    path.write_text(json.dumps(record))
    rows = runs.run_all([new, old], tmp_path, progress=False)
    assert list(rows.processor.isna()) == list(rows.seed == 1)
    assert "processor" not in runs.run_all([old], tmp_path, progress=False)


# The convolution whose gradient fails channels-last

STRIDED = [
    nn.Conv2d(4, 8, 1, stride=2),
    nn.Conv2d(4, 8, 1, stride=(1, 3), bias=False, groups=2),
    nn.Conv2d(4, 8, 1, stride=2, padding=(1, 2)),
    nn.Conv2d(4, 8, 1, stride=3, padding=2, padding_mode="reflect"),
]


def gradients(conv: nn.Conv2d, x: torch.Tensor) -> list[torch.Tensor]:
    y = conv(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *conv.parameters()])]


@pytest.mark.parametrize("conv", STRIDED, ids=str)
def test_it_is_computed_from_the_pixels_it_reads(conv: nn.Conv2d, rng: torch.Generator) -> None:
    """Against the plain one, contiguous, in which it does not fail; both weight and input channels-last."""
    x = torch.randn(3, 4, 7, 8, generator=rng, requires_grad=True)
    expected = gradients(conv, x)
    safe = layers.SafeConv2d(**layers.geometry(conv), bias=conv.bias is not None)
    safe.load_state_dict(conv.state_dict())
    seen, convolve = [], F.conv2d

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **options: int) -> torch.Tensor:
        seen.append(options)
        return convolve(x, weight, bias, **options)

    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers.F, "conv2d", watched)
        found = gradients(safe.to(memory_format=torch.channels_last), last)
    assert seen == [{"groups": conv.groups}]  # of stride 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_convert_makes_it_safe_whether_it_is_quantized_or_kept() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 1), nn.Flatten()
    )
    model = emq.convert(net, emq.QuantSpec(bits=(4,), full_precision=("2",), activation="none"))
    assert [isinstance(m, layers.SafeConv2d) for m in model[:4]] == [True] * 4
    assert type(model[2]) is layers.SafeConv2d and type(net[2]) is nn.Conv2d
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(emq.pack(model, 4)(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_on_a_cpu_it_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler takes channels-last by itself."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model: asked.append((model[0].stride, model[0].in_channels)) or model)
    for stride, channels in product((1, 2), (4, 16)):
        distributed.compiled(nn.Sequential(nn.Conv2d(channels, 8, 1, stride=stride)), True, 0)
        distributed.compiled(nn.Sequential(nn.Conv2d(channels, 8, 1, stride=stride, device="meta")), True, 0)
    made = [((s, s), c) for s, c in product((1, 2), (4, 16)) for _ in range(1 if (s, c) == (2, 4) else 2)]
    assert asked == made


# What `make demo` prints

ROOT = Path(__file__).resolve().parents[2]


def test_the_notebook_shows_the_table_that_the_demo_prints(tmp_path: Path) -> None:
    cells = json.loads((ROOT / "notebooks/00_quickstart.ipynb").read_text())["cells"]
    (shown,) = [cell for cell in cells if "tables.save(table" in "".join(cell["source"])]
    assert "table = tables.correction_table(rows)" in "".join(shown["source"])
    table = tables.correction_table(tables.pd.read_csv(ROOT / "results/small/00_quickstart.csv"))
    with tables.pd.option_context("display.max_columns", 20):  # as in Jupyter, which is no terminal
        assert "".join(shown["outputs"][0]["data"]["text/plain"]) == repr(tables.shown(table))
    tables.save(table, tmp_path / "a")
    assert (tmp_path / "a.md").read_text() == (ROOT / "results/small/00_quickstart.md").read_text()
