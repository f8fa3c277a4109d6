"""A paper table becomes a list of runs; a run is one frozen config, one hash, one file of rows, and never run twice."""

import json
import platform
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torchvision
from torch import nn

from . import checks, devices, files, models
from .data import Dataset, load_dataset
from .files import canonical_json, digest, write_text
from .layers import QuantSpec
from .multibit import ADAPTATION_SAMPLES, convert, evaluate
from .profiles import Parameters
from .sampling import SCORES, CoresetConfig, generator
from .training import TrainConfig, train

COST = ("sample_passes", "scoring_passes", "steps", "seconds")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One network trained once and evaluated at every bit-width; its hash names its rows and its checkpoint.

    dataset, model: names of `load_dataset` and `models.build`; model_args: its keyword arguments. subset: (train, test)
    images, (0, 0) for all. eval_bits: bit-widths to evaluate, trained or not.
    """

    profile: str
    dataset: str
    model: str
    spec: QuantSpec
    config: TrainConfig
    model_args: tuple[tuple[str, int], ...] = ()
    subset: tuple[int, int] = (0, 0)
    eval_bits: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_bits", checks.bit_widths("eval_bits", self.eval_bits))

    @property
    def method(self) -> str:
        """The name of the method in the paper's tables."""
        if self.config.scheme == "dedicated":
            return "Dedicated"
        return "Any-Precision" if self.spec.norm == "switchable" else "Ours"

    @property
    def pruning_rate(self) -> float:
        """Fraction of the training set a child does not see in an epoch."""
        return 0.0 if self.config.coreset is None else self.config.coreset.pruning_rate

    @property
    def coreset(self) -> str:
        """What selects coresets, and which options differ from the defaults."""
        if not self.pruning_rate:
            return "full data"
        options = _asked(self.config.coreset)
        name = options.pop("score", "random")
        if name == "random" and options.pop("resample_every", 1) == 1:
            name = "RS2"  # a random coreset that is drawn anew each epoch
        named = [f"{k}={v}" for k, v in options.items() if k not in ("pruning_rate", "candidates", "scoring_epochs")]
        return ", ".join([name, *named])

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the SHA-256 of what differs from the defaults, the device left out.

        So an option that a later version adds does not rename the runs that never asked for it.
        """
        return digest(canonical_json(_asked(self)))[:12]


def _asked(config: Any) -> dict[str, Any]:
    """The fields of a config dataclass that differ from their defaults, those of nested configs likewise."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "device"}
    differing = {f.name: values[f.name] for f in fields(config) if f.name in values and values[f.name] != f.default}
    return {name: _asked(value) if is_dataclass(value) else value for name, value in differing.items()}


def base(p: Parameters, seed: int, dataset: str, epochs: int = 0) -> Run:
    """What all runs of a profile share, on the full data.

    epochs: 0 for the profile's own number; with another, only the trained bit-widths are evaluated.
    """
    config = replace(p.profile.training, seed=seed, epochs=epochs or p.profile.training.epochs)
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


def dedicated(base: Run) -> list[Run]:
    """One network for each bit-width, on the full data, without correction."""
    config = replace(base.config, scheme="dedicated", coreset=None)
    specs = (replace(base.spec, bits=(b,), correction="none") for b in base.spec.bits)
    return [replace(base, spec=spec, config=config, eval_bits=spec.bits) for spec in specs]


def any_precision(base: Run) -> Run:
    """Any-Precision: joint training with recursive distillation, a batch norm for each bit-width."""
    spec = replace(base.spec, norm="switchable", correction="none")
    return replace(base, spec=spec, config=replace(base.config, scheme="joint", distillation=True, coreset=None))


def ours(base: Run, coreset: CoresetConfig | None = None, correction: str = "mean_var", gradient: bool = True) -> Run:
    """Bit-wise training under one shared batch norm; `gradient`: whether the correction's statistics carry it."""
    config = replace(base.config, scheme="bitwise", distillation=False, coreset=coreset)
    return replace(base, spec=replace(base.spec, correction=correction, correction_gradient=gradient), config=config)


def quickstart(p: Parameters) -> list[Run]:
    """One network on the embedded digits, without and with weight bias correction."""
    shared = base(p, p.seeds[0], "digits")
    if p.profile.name != "smoke":  # digits need neither a large network nor a long schedule
        config = TrainConfig(epochs=4, batch_size=64, lr=0.1, seed=p.seeds[0])
        shared = replace(shared, dataset="digits", model="resnet8", model_args=(), config=config)
    return [ours(shared, correction="none"), ours(shared)]


def table1(p: Parameters, dataset: str = "cifar10") -> list[Run]:
    """Table 1: Dedicated, Any-Precision, and ours at several pruning rates; on the full data with each correction.

    Coresets are random ones, drawn anew each epoch (RS2), and bit-wise ones by TDDS. At the middle rate also without
    gradient through the correction's statistics, which measures that option's default.
    The paper's numbers: results/paper/table1.csv.
    """
    rates, runs = p.pruning_rates or (0.5, 0.8, 0.9), []
    for seed in p.seeds:
        shared = base(p, seed, dataset)
        random = [CoresetConfig(pruning_rate=rate) for rate in rates if rate]
        runs += [ours(shared, correction=c) for c in ("none", "mean", "mean_var")]
        runs += [*(ours(shared, coreset) for coreset in random), any_precision(shared), *dedicated(shared)]
        runs += [ours(shared, coreset, gradient=False) for coreset in random[len(random) // 2 :][:1]]
        runs += [ours(shared, bitwise_coreset(rate)) for rate in rates if rate]
    return runs


def bitwise_coreset(pruning_rate: float, **options: Any) -> CoresetConfig | None:
    """Coresets by importance, TDDS where not said otherwise, as the notebooks use them; None where nothing is pruned.

    Cheap enough for short runs: each bit-width scores 4/3 of what it keeps, in the three epochs that TDDS needs at
    least, and so spends on them the price of one epoch more of its coreset.
    """
    if not pruning_rate:
        return None
    usual = {"score": "tdds", "scoring_epochs": 3, "candidates": min(1.0, (1 - pruning_rate) * 4 / 3)}
    return CoresetConfig(**{"pruning_rate": pruning_rate} | usual | options)


def curves(p: Parameters, dataset: str = "cifar10") -> list[Run]:
    """Accuracy against the cost of training: Any-Precision and ours at each pruning rate, at each run length.

    The first length has all seeds, a longer one the first alone.
    """
    rates = [0.0, *(rate for rate in p.pruning_rates or (0.5, 0.8, 0.9) if rate)]
    pairs = [(epochs, seed) for epochs in p.lengths for seed in (p.seeds if epochs == p.lengths[0] else p.seeds[:1])]
    runs = []
    for epochs, seed in pairs:
        shared = base(p, seed, dataset, 0 if epochs == p.profile.training.epochs else epochs)
        runs += [any_precision(shared), *(ours(shared, bitwise_coreset(rate)) for rate in rates)]
    return runs


def comparison(p: Parameters, dataset: str = "cifar10") -> list[Run]:
    """Coresets by score: Random and RS2, TDDS and EL2N at every pruning rate, all the others at the middle one.

    All scores are recorded in the same scoring phase, and so at the same price; Random and RS2 have none, and train on
    their coresets from the first epoch.
    """
    rates, runs = p.pruning_rates or (0.5, 0.8, 0.9), []
    for seed in p.seeds:
        shared = _coreset_base(p, seed, dataset)
        for rate in rates:
            middle = rate == rates[len(rates) // 2]
            scores = [score for score in SCORES[1:] if middle or score in ("tdds", "el2n")]
            coresets = [CoresetConfig(pruning_rate=rate, resample_every=every) for every in (0, 1)]
            coresets += [bitwise_coreset(rate, score=score) for score in scores]
            coresets += [bitwise_coreset(rate, how="sample")]
            runs += [ours(shared, coreset) for coreset in coresets]
    return runs


def scoring_ablation(p: Parameters, dataset: str = "cifar10", pruning_rate: float = 0.8) -> list[Run]:
    """What of a TDDS coreset matters: how it is scored, drawn, drawn again and shared between bit-widths.

    The seven from joint scoring on have all candidates, so nothing else sets bit-widths apart: "joint" against
    "bitwise" scoring is Table 7, and coresets that are identical, independent or disjoint across bit-widths, by
    importance and at random, tell what scores of its own are worth to a bit-width from what wider coverage is. The
    last ones train on the first coreset with another batch size, learning rate or weight decay.
    """
    options = [
        {},
        {"how": "sample"},
        {"how": "sample", "resample_every": 0},
        {"how": "sample", "rescore": True},
        {"how": "sample", "unbiased": True, "candidates": 1.0},
        {"how": "ccs", "cut": 0.1},
        {"balanced": True},
        {"full_epochs": 1},
    ]
    ways = ("identical", "independent", "disjoint")
    options += [{"candidates": 1.0, "scoring": "joint"}]
    options += [{"candidates": 1.0, "across_bits": way} for way in ways]
    random = {"score": "random", "candidates": 1.0, "scoring_epochs": 0, "resample_every": 0}
    options += [random | {"across_bits": way} for way in ways]
    first, runs = p.profile.training, []
    trainings = [{"batch_size": first.batch_size // 2}, {"lr": 2 * first.lr}, {"weight_decay": first.weight_decay / 5}]
    for start in (_coreset_base(p, seed, dataset) for seed in p.seeds):
        runs += [ours(start, bitwise_coreset(pruning_rate, **option)) for option in options]
        changed = (replace(start, config=replace(start.config, **training)) for training in trainings)
        runs += [ours(start, bitwise_coreset(pruning_rate)) for start in changed]
    return runs


def table2(p: Parameters) -> list[Run]:
    """The other small data sets, CIFAR-100 and TinyImageNet: Any-Precision, and ours at several pruning rates."""
    runs = []
    for dataset, seed in product(("cifar100", "tinyimagenet"), p.seeds):
        shared = _coreset_base(p, seed, dataset)
        coresets = [bitwise_coreset(rate) for rate in (0.0, *(p.pruning_rates or (0.6, 0.8)))]
        runs += [any_precision(shared), *(ours(shared, coreset) for coreset in coresets)]
    return runs


def _coreset_base(p: Parameters, seed: int, dataset: str) -> Run:
    """What runs that compare coresets share: more epochs, on as much of the data as they can then afford."""
    return replace(base(p, seed, dataset, p.profile.coreset_epochs), subset=p.profile.coreset_subset)


def growth(p: Parameters, pruning_rate: float = 0.8) -> list[Run]:
    """Every scheme over more and more bit-widths, on a small part of CIFAR-10: what it costs, not what it gives.

    The bit-widths asked for come first, the others of 1 to 8 after them.
    """
    order, runs = tuple(dict.fromkeys((*p.bits, 2, 4, 8, 6, 3, 5, 7, 1))), []
    for count in p.profile.bit_counts:
        shared = base(replace(p, bits=tuple(sorted(order[:count]))), p.seeds[0], "cifar10", p.profile.coreset_epochs)
        part = p.profile.subset if any(p.profile.subset) else (1280, 500)
        shared = replace(shared, subset=part, eval_bits=Run.eval_bits)
        runs += [*dedicated(shared), any_precision(shared), ours(shared), ours(shared, bitwise_coreset(pruning_rate))]
    return runs


def coreset_rows(runs: Iterable[Run], results_dir: str | Path) -> pd.DataFrame:
    """One row a draw and bit-width of the finished `runs`: size, union, overlap, drift, rank correlation, classes.

    overlap and rank_correlation are means over the other bit-widths; classes is each class's share of the coreset.
    """
    rows = []
    for run in runs:
        for draw in _stored(run, Path(results_dir))["coresets"]:
            classes = pd.Series(draw["classes"]) / draw["size"]
            means = {k: pd.Series(draw[k], dtype=float).mean() for k in ("overlap", "rank_correlation")}
            told = {k: draw[k] for k in ("epoch", "bits", "size", "union", "drift", "clipped")}
            spread = {"rarest_class": classes.min(), "commonest_class": classes.max()}
            asked = {"pruning_rate": run.pruning_rate, "coreset": run.coreset, "epochs": run.config.epochs}
            asked |= {"candidates": run.config.coreset.candidates, "seed": run.config.seed, "run": run.hash}
            rows.append(asked | told | means | spread)
    return pd.DataFrame(rows)


def run_all(runs: Iterable[Run], results_dir: str | Path, progress: bool = True) -> pd.DataFrame:
    """The tidy rows of all `runs`: read where a run is finished, run where it is not, resumed where it was cut short.

    One row a run, bit-width and adaptation, with its provenance. A killed call loses at most the epoch it was in.
    ValueError: no runs, or a damaged or foreign file where the rows of a run should be.
    """
    runs, results_dir = list(dict.fromkeys(runs)), Path(results_dir)
    if not runs:
        raise checks.invalid("runs", runs, "at least one Run")
    records = [_stored(run, results_dir) for run in runs]  # a damaged file is found now, not after hours of training
    frames, loaded = [], {}
    for i, run in enumerate(runs):
        record = records[i] or _stored(run, results_dir)  # another job may have finished it meanwhile
        if record is None:
            label = f"run {i + 1} of {len(runs)}: {run.method}, {run.spec.bits} bits, seed {run.config.seed}"
            record = _execute(run, _data(run, loaded), results_dir, progress and label)
        frames.append(_frame(run, record))
    return pd.concat(frames, ignore_index=True)


def _data(run: Run, loaded: dict[tuple, Dataset]) -> Dataset:
    key = (run.dataset, run.subset)
    if key not in loaded:
        data = load_dataset(run.dataset)
        loaded[key] = data.subset(*run.subset) if any(run.subset) else data
    return loaded[key]


def build(run: Run, num_classes: int) -> nn.Module:
    """The converted, untrained network of `run`, initialised from its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(run.config.seed, "init").initial_seed())
        return convert(models.build(run.model, num_classes, **dict(run.model_args)), run.spec)


def _execute(run: Run, data: Dataset, results_dir: Path, progress: bool | str) -> dict[str, Any]:
    model = build(run, data.num_classes)
    checkpoint = results_dir / "checkpoints" / f"{run.hash}.pt"
    history = train(model, data, run.config, checkpoint=checkpoint, progress=progress)
    plain = evaluate(model, data, bits=run.spec.bits if run.spec.norm == "switchable" else run.eval_bits)
    adapted = evaluate(model, data, bits=run.eval_bits, adapt_norm=True)
    rows = pd.concat([plain.assign(adapted=False), adapted.assign(adapted=True)])
    record = {
        "run": run.hash,
        "config": json.loads(canonical_json(asdict(run))),
        "provenance": provenance(data, devices.device(run.config.device)),
        "history": history.to_dict("records"),
        "coresets": history.attrs["coresets"],
        "n_train": len(data.train),
        "calibration_passes": min(ADAPTATION_SAMPLES, len(data.train)),
        "rows": rows.to_dict("records"),
    }
    write_text(_path(run, results_dir), json.dumps(record, indent=1) + "\n")
    return record


def provenance(data: Dataset, device: torch.device) -> dict[str, Any]:
    """Where a number came from: commit, versions, device, data."""
    cpu = f"cpu, {torch.get_num_threads()} threads"
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "emqlib")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": cpu if device.type == "cpu" else torch.cuda.get_device_name(device),
        "data_sha256": data.sha256,
    }


def _git(*arguments: str) -> str:
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no commit
        if (files.CHECKOUT / ".git").exists():  # not where this was installed, maybe inside somebody else's checkout
            command = ["git", "-C", str(files.CHECKOUT), *arguments]
            return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    return ""


def _path(run: Run, results_dir: Path) -> Path:
    return results_dir / "runs" / f"{run.hash}.json"


def _stored(run: Run, results_dir: Path) -> dict[str, Any] | None:
    """The finished record, if there is one; ValueError if it is another config's, whose defaults were others then."""
    path = _path(run, results_dir)
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        _frame(run, record)  # raises where a part is missing
        now, then = _flat(json.loads(canonical_json(asdict(run)))), _flat(record["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise checks.invalid("results_dir", str(path), f"a whole record of a run, or none ({error!r})") from error
    changed = [k for k, v in then.items() if now.get(k) != v and not k.endswith(".device")]
    if changed:
        raise checks.invalid(
            "results_dir", str(path), f"rows of this config, but {changed[0]} was {then[changed[0]]!r}"
        )
    return record


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, {"config.lr": 0.1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _frame(run: Run, record: dict[str, Any]) -> pd.DataFrame:
    """A run's rows, with what was asked for before them and its cost and provenance after them."""
    asked = {"method": run.method, "dataset": run.dataset, "model": run.model, "scheme": run.config.scheme}
    correction = run.spec.correction + ("" if run.spec.correction_gradient else ", no gradient")
    asked |= {"norm": run.spec.norm, "correction": correction, "pruning_rate": run.pruning_rate, "coreset": run.coreset}
    pruned = run.config.coreset if run.pruning_rate else CoresetConfig(pruning_rate=0)
    asked |= {"candidates": pruned.candidates, "scoring_epochs": pruned.warmup}
    asked |= {"trained_bits": " ".join(map(str, run.spec.bits)), "n_train": record["n_train"]}
    asked |= {k: getattr(run.config, k) for k in ("epochs", "batch_size", "lr", "weight_decay", "seed")}
    cost = {k: sum(epoch[k] for epoch in record["history"]) for k in COST}
    rows = pd.DataFrame(record["rows"])
    rows["calibration_passes"] = record["calibration_passes"] * rows.adapted
    rows = rows.assign(**cost, profile=run.profile, run=run.hash, **record["provenance"])
    return pd.concat([pd.DataFrame([asked] * len(rows)), rows], axis=1)
