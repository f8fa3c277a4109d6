"""What is measured in the networks of `experiments`: tables over all seeds, each part kept beside its run's rows."""

from collections.abc import Callable, Iterable

import pandas as pd
from torch import nn

from . import analysis, deployment
from .data import Dataset
from .derived import derived, followed
from .experiments import corrected_or_not, deployed, transfer, uncalibrated
from .methods import ours, vit_base
from .profiles import Parameters
from .remedies import compare
from .runs import Run, run_all, trained
from .transfer import gradient_angles, linear_probes


def _each(runs: Iterable[Run], measured: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([measured(run) for run in runs], ignore_index=True)


def layer_norms(p: Parameters) -> pd.DataFrame:
    """What weight bias correction changes before each layer norm of ViT's children, of networks without and with it.

    Rows of `analysis.layer_norms`, on CIFAR-10, at the trained bit-widths.
    """
    starts = (vit_base(p, seed, "cifar10") for seed in p.seeds)
    runs = [ours(start, correction=correction) for start in starts for correction in ("none", "mean_var")]
    return _each(
        runs, lambda run: derived(run, "norms", p.results_dir, lambda *net: analysis.layer_norms(*net, p.bits))
    )


def distributions(p: Parameters, dataset: str = "cifar10") -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Figure 3: what quantization does to weights and pre-activations, of ours trained without and with correction.

    Three tables: `analysis.weight_shift` of the networks trained without correction; the mismatch and the histograms of
    `analysis.preactivations` of all, at the trained bit-widths, histograms of the first seed. The networks are those of
    Table 1.
    """
    runs, kept = corrected_or_not(p, dataset), p.results_dir

    def found(run: Run, name: str, part: int) -> pd.DataFrame:
        return derived(run, name, kept, lambda *net: analysis.preactivations(*net, p.bits)[part])

    weights = _each(runs[::2], lambda run: derived(run, "weights", kept, lambda net, _: analysis.weight_shift(net)))
    mismatch = _each(runs, lambda run: found(run, "mismatch", 0))
    return weights, mismatch, _each(runs[:2], lambda run: found(run, "histograms", 1))


def remedies(p: Parameters, dataset: str = "cifar10") -> pd.DataFrame:
    """Accuracy without a calibration pass under each remedy, beside the same network's after batch-norm adaptation.

    One row a remedy, seed and bit-width, with top1 and adapted_top1 (%), the run's hash and its provenance. Four are
    trained with what they need, as `QuantSpec` says; those of `remedies.compare` start from one of them.
    """
    runs, tables = uncalibrated(p, dataset), []
    rows = run_all(runs, p.results_dir)
    for run in runs:
        own = rows[rows.run == run.hash]
        remedy = _REMEDIES[run.spec.norm, run.spec.output_correction]
        found = [own[~own.adapted].assign(remedy=remedy)]
        if remedy == "own, interpolated":
            found.append(derived(run, "remedies", p.results_dir, compare))
        adapted = own[own.adapted].set_index("bits").top1
        tables += [table.assign(adapted_top1=table.bits.map(adapted)) for table in found]
    table = pd.concat(tables, ignore_index=True)
    return table[[name for name in _REMEDY_COLUMNS if name in table or name not in _NEW_COLUMNS]]


_REMEDIES = {
    ("shared", False): "shared, as in the paper",
    ("shared", True): "shared, output correction",
    ("shared_affine", False): "own, interpolated",
    ("shared_affine", True): "own, output correction",
}
_REMEDY_COLUMNS = ["remedy", "bits", "trained", "top1", "adapted_top1", "dataset", "model", "trained_bits", "epochs"]
_REMEDY_COLUMNS += ["seed", "profile", "run", "commit", "dirty", "python", "torch", "torchvision", "device"]
_NEW_COLUMNS = ["processor", "instructions", "autocast"]  # which rows of release 1.0 do not have
_REMEDY_COLUMNS += [*_NEW_COLUMNS, "data_sha256"]


def alignment(p: Parameters, dataset: str = "cifar10") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Figure 4: angles between the children's gradients before and after each epoch, and linear probes at the end.

    Tables of `transfer.gradient_angles` and `transfer.linear_probes`, of the runs of `experiments.transfer` that train
    all children.
    """
    runs, kept = [run for run in transfer(p, dataset) if run.spec.bits == p.bits], p.results_dir

    def angles(run: Run) -> pd.DataFrame:
        count = min(1000, run.subset[0] // 4) if run.subset[0] else 1000
        return followed(run, "angles", kept, lambda *net: gradient_angles(*net, p.bits, count))

    probes = _each(runs, lambda run: derived(run, "probes", kept, lambda *net: linear_probes(*net, p.bits)))
    return _each(runs, angles), probes


def deploy(p: Parameters, dataset: str = "cifar10") -> tuple[pd.DataFrame, pd.DataFrame]:
    """What Table 1's networks, ours on the full data, cost where they are served; a switch of bit-width, of the first.

    Tables of `deployment.served`, beside networks trained alike in full precision, and of `deployment.switching`.
    """
    runs, kept = deployed(p, dataset), p.results_dir
    bits, repeats = (p.bits, 1) if p.profile.name == "smoke" else (runs[0].eval_bits, 5)
    tables = []
    for run, full in zip(runs[::2], runs[1::2], strict=True):

        def measure(model: nn.Module, data: Dataset, full: Run = full) -> pd.DataFrame:
            return deployment.served(model.cpu(), data, trained(full, kept)[0].cpu(), bits, repeats)

        tables.append(derived(run, "served", kept, measure))
    switching = derived(runs[0], "switching", kept, lambda net, data: deployment.switching(net.cpu(), data, bits))
    return pd.concat(tables, ignore_index=True), switching
