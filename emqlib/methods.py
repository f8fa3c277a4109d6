"""A method of the paper's tables as a `Run`: what it shares with the others, and what sets it apart."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from . import checks
from .data import Dataset, check_name, load_dataset
from .layers import QuantSpec
from .profiles import Parameters, Setting
from .runs import Run
from .sampling import CoresetConfig


def base(p: Parameters, seed: int, dataset: str, epochs: int = 0) -> Run:
    """What all runs of a profile share, on the full data.

    epochs: 0 for the profile's own number; with another, only the trained bit-widths are evaluated, and milestones of
    the learning rate move in proportion: they stay an epoch apart, and those that no epoch would follow are dropped.
    """
    checks.instance("p", p, Parameters, "what profiles.parameters gives")
    check_name("dataset", checks.instance("dataset", dataset, str, "the name of a data set"))
    own = p.profile.training
    length = epochs or own.epochs
    config = replace(own, seed=seed, epochs=length, milestones=_scaled(own.milestones, length / own.epochs, length))
    return Run(
        profile=p.profile.name,
        dataset=p.profile.dataset or dataset,
        model=p.profile.model,
        model_args=p.profile.model_args,
        subset=p.profile.subset,
        spec=QuantSpec(bits=p.bits),
        config=config,
        eval_bits=p.bits if epochs else tuple({*Run.eval_bits, *p.bits}),
    )


def _scaled(milestones: tuple[int, ...], factor: float, epochs: int) -> tuple[int, ...]:
    """`milestones` times `factor`, at least an epoch apart, without those that no epoch would follow."""
    scaled: list[int] = []
    for milestone in milestones:
        scaled.append(max(round(milestone * factor), scaled[-1] + 1 if scaled else 1))
    return tuple(m for m in scaled if m < epochs)


def in_setting(base: Run, setting: Setting) -> Run:
    """`base` with the network, the training and the images of `setting`; of its own training the seed is kept."""
    return replace(
        _run("base", base),
        model=checks.instance("setting", setting, Setting, "a Setting, such as a profile's vit").model,
        model_args=setting.model_args,
        subset=setting.subset,
        image_size=setting.image_size,
        config=replace(setting.training, seed=base.config.seed),
    )


def vit_base(p: Parameters, seed: int, dataset: str) -> Run:
    """What runs of a ViT share, with as many patches on TinyImageNet's 64 x 64 pixels as on CIFAR's 32 x 32."""
    shared = in_setting(base(p, seed, dataset), p.profile.vit)
    args = dict(shared.model_args)
    if shared.dataset == "tinyimagenet":
        args |= {"image_size": 64, "patch_size": 2 * args["patch_size"]}
    spec = replace(shared.spec, weight="minmax", activation="lsq")
    return replace(shared, model_args=tuple(args.items()), spec=spec)


def coreset_base(p: Parameters, seed: int, dataset: str) -> Run:
    """What runs that compare coresets share: more epochs, on as much of the data as they can then afford."""
    return replace(base(p, seed, dataset, p.profile.coreset_epochs), subset=p.profile.coreset_subset)


def _run(name: str, value: Any) -> Run:
    return checks.instance(name, value, Run, "a Run, as base makes one")


def dedicated(base: Run) -> list[Run]:
    """One network for each bit-width, on the full data, without correction."""
    config = replace(_run("base", base).config, scheme="dedicated", coreset=None)
    specs = (replace(base.spec, bits=(b,), correction="none") for b in base.spec.bits)
    return [replace(base, spec=spec, config=config, eval_bits=spec.bits) for spec in specs]


def any_precision(base: Run) -> Run:
    """Any-Precision: joint training with recursive distillation, a batch norm for each bit-width."""
    spec = replace(_run("base", base).spec, norm="switchable", correction="none")
    return replace(base, spec=spec, config=replace(base.config, scheme="joint", distillation=True, coreset=None))


def ours(base: Run, coreset: CoresetConfig | None = None, **spec: Any) -> Run:
    """Bit-wise training under one shared batch norm; `spec`: fields of the `QuantSpec` that differ from the base's."""
    config = replace(_run("base", base).config, scheme="bitwise", distillation=False, coreset=coreset)
    return replace(base, spec=replace(base.spec, **spec), config=config)


def bitwise_coreset(pruning_rate: float, **options: Any) -> CoresetConfig | None:
    """Coresets by importance, TDDS where not said otherwise, as the notebooks use them; None where nothing is pruned.

    Cheap enough for short runs: each bit-width scores 4/3 of what it keeps, in the three epochs that TDDS needs at
    least, and so spends on them the price of one epoch more of its coreset.
    """
    if not checks.pruning_rate(pruning_rate):
        return None
    usual = {"score": "tdds", "scoring_epochs": 3, "candidates": min(1.0, (1 - pruning_rate) * 4 / 3)}
    return CoresetConfig(**{"pruning_rate": pruning_rate} | usual | options)


def of_length(p: Parameters, seed: int, dataset: str, epochs: int) -> Run:
    """`base` for as many epochs, and the very one of Table 1 where they are the profile's own."""
    return base(p, seed, dataset, 0 if epochs == p.profile.training.epochs else epochs)


def redrawn(base: Run, pruning_rate: float, parts: int = 2, **options: Any) -> Run:
    """Ours where steps and images are few (beyond the paper): each batch of the base in `parts` ones, coresets
    drawn anew each epoch from all data by importance, and running statistics for each trained bit-width.
    """
    drawn = bitwise_coreset(pruning_rate, **{"how": "sample", "unscored": True} | options)
    return ours(in_parts(base, parts), drawn, norm="shared_affine")


def in_parts(run: Run, parts: int) -> Run:
    """`run` with each batch in as many smaller ones."""
    count = checks.integer("parts", parts, 1, _run("run", run).config.batch_size)
    return replace(run, config=replace(run.config, batch_size=run.config.batch_size // count))


def as_files(run: Run, results_dir: Path) -> str:
    """The name of the run's data set as class folders of files below `results_dir`, which are written if need be."""
    folder = results_dir / "images" / run.dataset
    write_class_folders(load_dataset(run.dataset).subset(*run.subset), folder)
    return f"imagefolder:{folder}"


def write_class_folders(data: Dataset, folder: Path) -> None:
    """Write a data set that lies in memory as class folders of PNG files, {train,val}/<class>/*, unless it is there.

    So `imagefolder:PATH` reads it, or streams it. Whoever looks finds all of it or nothing.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    half_done = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, split in (("train", data.train), ("val", data.test)):
            for i, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
                place = half_done / name / data.classes[label]
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i:06d}.png")
        half_done.chmod(0o755)  # mkdtemp makes it private
        half_done.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(half_done, ignore_errors=True)
