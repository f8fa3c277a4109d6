"""Coresets in other training loops: each framework trains every epoch on its own batches, and scores are recorded."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training_cases import BITS, tiny

import emqlib as emq
from emqlib.train.data import normalize

EPOCHS, BATCH = 5, 10
pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks themselves


class Loop:
    """What each of them calls in a step, and what it should have been given."""

    def __init__(self, data: emq.Dataset) -> None:
        self.model, self.seen = tiny(), []
        self.samples = TensorDataset(normalize(data.train.images, data), data.train.labels)
        config = emq.CoresetConfig(score="tdds", pruning_rate=0.5)
        self.coresets = emq.Coresets(self.samples, BITS, config, epochs=EPOCHS)

    def loss(self, batch: Any, model: nn.Module) -> Tensor:
        bits, indices, (images, labels) = batch
        emq.set_bits(model, bits)
        logits = model(images)
        self.coresets.observe(bits, indices, logits, labels)
        self.seen.append((self.coresets.epoch, bits, indices.tolist()))
        return F.cross_entropy(logits, labels)


def check(loop: Loop) -> None:
    """Every epoch as a plain loop would have it, and coresets of the scores of three epochs."""
    assert len(loop.coresets.rows) == 6 and loop.coresets.next_epoch == EPOCHS
    of_epochs = [epoch for epoch, *_ in loop.seen]
    assert of_epochs == sorted(of_epochs)
    assert len(of_epochs) == sum(loop.coresets.count(epoch, BATCH) for epoch in range(EPOCHS))
    for epoch in (0, 1, 2, 4):  # those of the scoring phase, and of the latest draw
        expected = [(epoch, bits, indices.tolist()) for bits, indices in loop.coresets.batches(epoch, BATCH)]
        assert [row for row in loop.seen if row[0] == epoch] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_lightning(workers: int, digits: emq.Dataset) -> None:
    """It begins to iterate once more than there are epochs, and sets the epoch where it finds a sampler."""
    lightning = pytest.importorskip("lightning")
    loop = Loop(digits)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = loop.model

        def training_step(self, batch: Any, number: int) -> Tensor:
            return loop.loss(batch, self.model)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", use_distributed_sampler=False, **quiet)
    trainer.fit(Module(), loop.coresets.loader(loop.samples, BATCH, num_workers=workers))
    check(loop)


def test_trainer_of_huggingface(digits: emq.Dataset, tmp_path: Path) -> None:
    """It counts batches and never asks for one more, so that an iteration does not come to its end."""
    transformers = pytest.importorskip("transformers")
    loop = Loop(digits)

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            return loop.coresets.loader(self.train_dataset, BATCH)

        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
            return loop.loss(inputs, model)

    asked = {"num_train_epochs": EPOCHS, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = transformers.TrainingArguments(tmp_path, report_to=[], logging_strategy="no", **asked)
    Trainer(loop.model, arguments, train_dataset=loop.samples).train()
    check(loop)
