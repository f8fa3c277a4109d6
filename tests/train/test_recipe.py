"""The recommended recipe, trained with."""

import torch

import emqlib as emq


def test_the_recipe_takes_all_data_once_and_then_new_coresets() -> None:
    spec, config = emq.recipe(bits=(2, 8), epochs=4, pruning_rate=0.75, lr=0.05)
    torch.manual_seed(0)
    model = emq.convert(emq.models.build("resnet8", 10, width=4), spec)
    data = emq.load_dataset("digits").subset(240, 60)
    history = emq.train(model, data, config, progress=False)
    assert history.sample_passes.tolist() == [480, 120, 120, 120] and history.steps.tolist() == [12, 4, 4, 4]
    draws = history.attrs["coresets"]
    assert [(row["epoch"], row["size"]) for row in draws] == [(e, 60) for e in (2, 3, 4) for _ in (2, 8)]
    assert all(row["drift"] > 0.2 for row in draws[2:])
    rows = emq.evaluate(model, data, bits=(2, 4, 8))
    assert rows.trained.tolist() == [True, False, True] and config.lr == 0.05


def test_the_recipe_without_pruning_trains_on_all_data() -> None:
    spec, config = emq.recipe(pruning_rate=0, epochs=3, batch_size=32)
    assert (config.coreset, config.batch_size, spec.bits, spec.output_correction) == (None, 32, (2, 4, 8), True)
