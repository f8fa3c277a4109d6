"""Running statistics of several kinds from one training, against networks that were trained with them."""

import pytest
import torch
from torch import Tensor, nn

import emqlib as emq
from emqlib.norms import MultiBitBatchNorm
from emqlib.paper import statistics
from emqlib.train.evaluate import batch_norms

BITS = (2, 4, 8)
CONFIG = emq.TrainConfig(epochs=2, batch_size=32, lr=0.05)


def _trained(norm: str, track: bool) -> tuple[nn.Module, list[tuple[int, Tensor, Tensor]]]:
    """A network trained on digits, and each batch's statistics at its first norm, in float64."""
    torch.manual_seed(0)
    model = emq.convert(emq.models.build("resnet8", 10, width=4), emq.QuantSpec(bits=BITS, norm=norm))
    if track:
        statistics.track(model)
    seen = []

    def see(module: MultiBitBatchNorm, inputs: tuple[Tensor, ...]) -> None:
        if module.training:
            x = inputs[0].detach().double().transpose(0, 1).flatten(1)
            seen.append((module.bits, x.mean(1), x.var(1)))

    batch_norms(model)[0].register_forward_pre_hook(see)
    emq.train(model, emq.load_dataset("digits").subset(192, 48), CONFIG, progress=False)
    return model, seen


def test_one_training_gives_every_kind_of_statistics() -> None:
    model, seen = _trained("shared_affine", track=True)
    shared, _ = _trained("shared", track=False)
    weights = dict(shared.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    for ours, theirs in zip(batch_norms(model), batch_norms(shared), strict=True):
        with statistics.using(model, "shared"):
            for found, expected in zip(ours.statistics(), theirs.statistics(), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    turns = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert [bits for bits, *_ in turns[0]] == [8, 4, 2] and len(turns) > 4
    for kind, order, momentum in (("reversed", [x for turn in turns for x in turn[::-1]], 0.1), ("slow", seen, 0.01)):
        mean, var = torch.zeros(4).double(), torch.ones(4).double()
        for _, batch_mean, batch_var in order:
            mean = (1 - momentum) * mean + momentum * batch_mean
            var = (1 - momentum) * var + momentum * batch_var
        with statistics.using(model, kind):
            for found, expected in zip(batch_norms(model)[0].statistics(), (mean, var), strict=True):
                torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_even_statistics_are_the_mean_over_bit_widths_and_own_ones_come_back() -> None:
    model, _ = _trained("shared_affine", track=True)
    norm, own = batch_norms(model)[0], []
    for bits in BITS:
        emq.set_bits(model, bits)
        own.append(torch.stack(norm.statistics()))
    with statistics.using(model, "even"):
        for bits in (2, 3, 8):
            emq.set_bits(model, bits)
            torch.testing.assert_close(torch.stack(norm.statistics()), torch.stack(own).mean(0))
    for bits, before in zip(BITS, own, strict=True):
        emq.set_bits(model, bits)
        assert torch.equal(torch.stack(norm.statistics()), before)


def test_rows_tell_which_statistics_were_used() -> None:
    model, _ = _trained("shared_affine", track=True)
    data = emq.load_dataset("digits").subset(192, 48)
    rows = statistics.evaluate_each(model, data, BITS)
    assert list(rows.statistics.unique()) == list(statistics.KINDS) and len(rows) == 3 * len(statistics.KINDS)
    own = emq.evaluate(model, data, BITS)
    assert rows[rows.statistics == "own"].loss.tolist() == own.loss.tolist()
    assert rows.groupby("statistics").loss.mean().nunique() == len(statistics.KINDS)


def test_statistics_that_are_not_each_bit_widths_own_are_refused() -> None:
    model = emq.convert(emq.models.build("resnet8", 10, width=4), emq.QuantSpec(bits=BITS))
    with pytest.raises(ValueError, match=r"norm='shared': expected \"shared_affine\""):
        statistics.track(model)
    with pytest.raises(ValueError, match="kind='mean': expected one of"):
        with statistics.using(model, "mean"):
            pass
