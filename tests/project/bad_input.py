"""Wrong values for the public functions: `test_bad_input` gives them, one at a time, and looks at what happens.

TABLE has a line for each function: its path below `emqlib`, arguments that are right, and for some of its parameters
values that are wrong. A key "name:dataset" is the parameter `name`, which the error calls `dataset`. A value that is a
function is called, and what it returns is given: so it is made when it is needed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import emqlib as emq
from emqlib.paper.profiles import Parameters, parameters
from emqlib.paper.runs import Run

SMALL = Path(__file__).resolve().parents[2] / "results/small"


# What the functions are right with


@cache
def net() -> nn.Module:
    return emq.models.resnet8(10, width=2)


@cache
def model() -> nn.Module:
    return emq.convert(net(), emq.QuantSpec(bits=(2, 4, 8)))


@cache
def unseen() -> nn.Module:
    return emq.convert(net(), emq.QuantSpec(bits=(2, 8), activation="lsq"))


@cache
def packed() -> nn.Module:
    return emq.pack(model(), 4)


@cache
def switchable() -> nn.Module:
    return emq.convert(net(), emq.QuantSpec(bits=(2, 4), norm="switchable"))


@cache
def with_zero() -> nn.Module:
    return emq.convert(net(), emq.QuantSpec(bits=(2, 4), weight="minmax", zero_level=True))


@cache
def headless() -> nn.Module:
    layers = (nn.Conv2d(3, 3, 3) for _ in range(3))
    return emq.convert(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), emq.QuantSpec(bits=(2, 4)))


@cache
def transformer() -> nn.Module:
    vit = emq.models.vit_tiny(10, patch_size=16, width=4, depth=1, heads=1)
    return emq.convert(vit, emq.QuantSpec(bits=(2, 8)))


@cache
def digits() -> emq.Dataset:
    return emq.load_dataset("digits").subset(40, 20)


def without(split: str) -> Callable[[], emq.Dataset]:
    """The digits, of which this split has no images."""
    return lambda: replace(digits(), **{split: getattr(digits(), split).take(torch.tensor([], dtype=torch.int64))})


RUN = {"profile": "smoke", "dataset": "digits", "model": "resnet8", "model_args": (("width", 2),)}
RUN |= {"spec": emq.QuantSpec(bits=(2, 4)), "config": emq.TrainConfig(epochs=1)}


@cache
def run() -> Run:
    return Run(**RUN)


def small() -> Parameters:
    """Parameters in which an experiment's own data set is not replaced by the digits."""
    return parameters(profile="small", results_dir="results")


@cache
def table(name: str) -> pd.DataFrame:
    return pd.read_csv(SMALL / f"{name}.csv")


def damaged() -> Path:
    """A folder of results in which the rows of the run are no JSON."""
    Path("damaged/runs").mkdir(parents=True)
    Path("damaged/runs", f"{run().hash}.json").write_text("{")
    return Path("damaged")


P = torch.full((4, 2), 0.5)  # probabilities
LABELS = torch.tensor([0, 1, 0, 1])
ONES = torch.ones(2, 2)
IMAGE = torch.ones(1, 3, 32, 32)


# What is wrong for many of them

NAN, INF = math.nan, math.inf
NUMBERS = [None, "3", 2.5, True, NAN, [3], 10**30]
COUNTS = [*NUMBERS, 0, -1, INF]
GIVEN = COUNTS[1:]
RATES = [None, "0.8", 80, 1.0, -0.1, NAN, True]
FLAGS = [None, 1, "yes"]
NAMES = [None, "", "nothing", 3, ["random"], np.ones(2)]
BITS = [None, (), (9,), (0, 2), (2, 2), "2,4", 4, (2.0,), (True,), [[2]], {2: 4}, torch.tensor(2), range(10**9)]
BITS += [lambda: count(1)]
ONE_WIDTH = [None, 0, 9, "4", 2.0, True, 10**5000]
BY_LAYER = [{}, {"nothing.*": 2, "*": 4}, {1: 2}, {"layer1.*": 2}]
MODELS = [None, "resnet8", nn.Linear, net]
DATA = [None, "digits", [], lambda: digits().train]
PAIRS = [None, "digits", [1, 2], torch.ones(3), (torch.ones(4, 3, 8, 8), LABELS)]
PAIRS += [lambda: iter([]), [(torch.ones(2, 3, 8, 8), LABELS)]]
PATHS = [None, "", 3, b"a", "a\0b", "a" * 5000, Path("a" * 300), "\ud800"]
FILES = [*PATHS, "FOLDER"]
FOLDERS = [*PATHS, "FILE", "FILE/a"]
TENSORS = [None, [0.5, 0.5], np.ones(4), 0.5]
LOGITS = [*TENSORS, torch.tensor([[3.0, -1.0]]), P * NAN, torch.ones(4), P[:0]]
CLASSES = [[0, 1, 0, 1], LABELS.float(), LABELS - 1]
OF_EACH = [None, *CLASSES, LABELS[:3], LABELS + 1]
FEATURES = [*TENSORS, torch.ones(3, 2), torch.ones(4), torch.ones(4, 2) * 1j]
VECTORS = [*TENSORS, torch.ones(4, 2), torch.tensor(1.0), torch.ones(4) * 1j]
WINDOWS, DECAYS = [*COUNTS, 2, 10**9], [None, 0, 2.0, "0.9", NAN]
WEIGHTS = [*TENSORS, torch.ones(0, 2), torch.ones(2, 2, dtype=torch.int64)]
SCALES = [0.1, torch.tensor(0.0), torch.ones(2), torch.tensor(NAN), torch.tensor(1j), torch.tensor(INF)]
IMAGES = [None, [1, 2], (), torch.ones(()), torch.ones(0, 3, 32, 32), torch.ones(2, 1, 32, 32), IMAGE.long()]
ARCHITECTURES = [*NAMES, "keras.resnet50", "torchvision.nothing", "timm.nothing", 10**5000]
SPECS = [None, (2, 4), emq.QuantSpec]
CONFIGS = [None, {}, emq.TrainConfig]
RUNS = [None, "table1", Run, RUN["spec"]]
# As papermill passes them
LISTS = ["[2,banana]", "[2,4", "", "__import__('os').getcwd()", "[" * 10_000, "9" * 5000, "1e999", "10**10**10", "\0"]
LISTS += ["\ud800", "{1: 2}", "{[1]: 2}", "[[2]]", "['2']", "nan", "None"]

Row = tuple[str, dict[str, Any], dict[str, list[Any]]]
TABLE: list[Row] = []

# Networks

SIZES = {"num_classes": 10, "image_size": 32, "patch_size": 4, "width": 12, "depth": 1, "heads": 1}
VIT = {name: [0, "8", 10**9] for name in SIZES} | {"patch_size": [5, 0], "heads": [5, None]}
for name in ("resnet8", "resnet18", "resnet20"):
    TABLE += [(f"models.{name}", {}, {"num_classes": COUNTS, "width": [0, "8", 10**9]})]
SMALLEST = {"name": "resnet8", "num_classes": 10}
TABLE += [
    ("models.preact_resnet20", {}, {"num_classes": [0], "width_factor": COUNTS}),
    ("models.resnet50", {}, {"num_classes": COUNTS}),
    ("models.vit_tiny", SIZES, VIT),
    ("models.vit_small", SIZES, VIT),
    ("models.check_name", {"parameter": "model"}, {"name:model": ARCHITECTURES}),
    ("models.build", SMALLEST, {"name": ARCHITECTURES, "num_classes": COUNTS, "width": ["8"], "depth": [3]}),
    ("models.build", {"name": "torchvision.resnet18", "num_classes": 10}, {"num_classes": COUNTS, "depth:kwargs": [3]}),
]

# Formulas

BOTH = {"w_q": torch.ones(2, 3), "w": torch.ones(2, 3)}
SHAPES = [torch.ones(2, 4), torch.ones(2), torch.ones(0, 3)]
SCORES = [*VECTORS, torch.ones(0), torch.ones(4) * NAN]
SELECT = {"scores": torch.ones(4), "pruning_rate": 0.5, "how": "sample", "generator": torch.Generator()}
CHOOSE = {"scores": torch.ones(4), "keep": 2, "how": "sample", "generator": torch.Generator()}
QUANTIZED = {"bits": ONE_WIDTH, "method": NAMES, "scale": SCALES}
GRAND = {"probabilities": P, "labels": LABELS, "features": torch.ones(4, 3)}
TDDS = {"probabilities": P.expand(4, 4, 2), "window": 3}
UNEQUAL = [*TENSORS, torch.ones(4)]
KEEP, GENERATORS = [*NUMBERS, -1, 5], [None, 0]
TABLE += [
    ("quantizers.levels", {}, {"bits": ONE_WIDTH}),
    ("quantizers.quantize_weight", {"w": ONES, "bits": 4}, QUANTIZED | {"w": WEIGHTS, "zero_level": FLAGS}),
    ("quantizers.quantize_weight", {"w": ONES, "bits": 1, "method": "minmax"}, {"zero_level": [True]}),
    ("quantizers.quantize_activation", {"x": ONES, "bits": 4}, QUANTIZED | {"x": WEIGHTS, "signed": FLAGS}),
    ("correction.correct_weight", BOTH, {"w_q": TENSORS, "w": TENSORS, "mode": NAMES, "gradient": FLAGS}),
    ("correction.correct_weight", BOTH, {"w_q:w_q, w shapes": SHAPES}),
    ("correction.output_shift", BOTH | {"mean_input": torch.ones(3)}, dict.fromkeys((*BOTH, "mean_input"), UNEQUAL)),
    ("coreset.entropy", {}, {"probabilities": LOGITS}),
    ("coreset.el2n", {"probabilities": P, "labels": LABELS}, {"probabilities": LOGITS, "labels": OF_EACH}),
    ("coreset.grand", GRAND, {"probabilities": LOGITS, "labels": OF_EACH, "features": FEATURES}),
    ("coreset.forgetting", {}, {"correct": [*TENSORS, torch.ones(1, 4, dtype=torch.bool)]}),
    ("coreset.moderate", {"features": ONES.repeat(2, 1), "labels": LABELS}, {"features": FEATURES, "labels": CLASSES}),
    ("coreset.centrality", {}, {"scores": VECTORS}),
    ("coreset.ranks", {}, {"scores": VECTORS}),
    ("coreset.tdds", TDDS, {"window": [*WINDOWS, 5], "decay": DECAYS, "probabilities": LOGITS}),
    ("coreset.select", SELECT, {"scores": SCORES, "pruning_rate": RATES, "how": NAMES, "generator": GENERATORS}),
    ("coreset.select", SELECT, {"scores": [-torch.ones(4), torch.zeros(4)]}),
    ("coreset.kept", {"n": 4, "pruning_rate": 0.5}, {"n": [*NUMBERS, -1], "pruning_rate": RATES}),
    ("coreset.choose", CHOOSE, {"scores": VECTORS, "keep": KEEP, "how": NAMES, "generator": GENERATORS}),
    ("coreset.inclusion", {"scores": torch.ones(4), "keep": 2}, {"scores": VECTORS, "keep": KEEP}),
]

# Configurations

SPEC = dict.fromkeys(("weight", "activation", "correction", "norm", "activation_range"), NAMES)
SPEC |= dict.fromkeys(("zero_level", "correction_gradient", "output_correction"), FLAGS)
SPEC |= {"bits": BITS, "full_precision": [None, "first", (1,), ("",), torch.tensor(1), range(10**9)]}
TRAIN = dict.fromkeys(("scheme", "optimizer", "schedule", "device", "autocast", "compile"), NAMES)
TRAIN |= {"epochs": COUNTS, "lr": [0, NAN, "0.1", 10**400], "coreset": [0.8, "random", emq.CoresetConfig]}
TRAIN["device"] = [*NAMES, "meta", "gpu", "cuda:99"]
TRAIN |= {"milestones": [None, "1", 5, np.ones(2)], "seed": NUMBERS}
CHOSEN = {"score": NAMES, "pruning_rate": RATES, "how": NAMES, "window": WINDOWS, "decay": DECAYS, "scoring": NAMES}
RUN_FIELDS = {"eval_bits": BITS, "profile": [None, 3], "spec": SPECS, "config": CONFIGS}
RUN_FIELDS |= {"dataset": NAMES, "model": NAMES}
RUN_FIELDS |= {"model_args": [None, {"width": 4}, ("width",), "width=4"], "image_size": [None, -1, 32.0]}
RUN_FIELDS |= {"subset": [None, 5, (5,), (-1, 5), (0.5, 0.5)], "stream": FLAGS}
RUN_FIELDS |= {"every_statistics": FLAGS, "held_out": [-1, 0.5, None]}
TABLE += [
    ("QuantSpec", {"bits": (2, 4)}, SPEC | {"zero_level": [*FLAGS, True]}),
    ("QuantSpec", {"bits": (1, 2), "weight": "minmax"}, {"zero_level": [True]}),
    ("TrainConfig", {}, TRAIN),
    ("TrainConfig", {"epochs": 5}, {"momentum:nesterov": [0], "warmup_epochs": [5]}),
    ("TrainConfig", {"scheme": "dedicated"}, {"distillation": [True]}),
    ("CoresetConfig", {}, CHOSEN | {"across_bits": NAMES, "power": [NAN, "1"], "unscored": [True], "unbiased": [True]}),
    ("CoresetConfig", {"scoring_epochs": 1}, {"score": ["random"]}),
    ("CoresetConfig", {"candidates": 0.5}, {"score": ["random"]}),
    ("CoresetConfig", {"score": "tdds", "window": 5}, {"scoring_epochs": [4]}),
    ("CoresetConfig", {"score": "forgetting"}, {"scoring_epochs": [1]}),
    ("CoresetConfig", {"score": "el2n", "pruning_rate": 0.5}, {"candidates": [0.49]}),
    ("CoresetConfig", {"score": "el2n", "how": "sample", "candidates": 0.5}, {"unbiased": [True]}),
    ("CoresetConfig", {"how": "sample", "across_bits": "disjoint"}, {"unbiased": [True]}),
    ("paper.runs.Run", RUN, RUN_FIELDS),
]

# Networks at any bit-width, and their files


class OwnNorm(nn.BatchNorm2d):
    """Of nobody knows what forward."""


class OwnAttention(nn.MultiheadAttention):
    """Of nobody knows what forward either."""


def among_others(layer: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))


NORMS = (nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4, momentum=None), OwnNorm(4))
ATTENTIONS = [nn.MultiheadAttention(8, 2, **{option: True}) for option in ("add_bias_kv", "add_zero_attn")]
OTHER_NETS = [among_others(layer) for layer in (*NORMS, *ATTENTIONS, OwnAttention(8, 2))]
OTHER_NETS += [lambda: nn.Sequential(nn.ReLU()), lambda: nn.Linear(4, 3)]
PACKED = {"model": [*MODELS, unseen, packed], "bits": ONE_WIDTH + BY_LAYER}
INTEGERS = {"packed": torch.zeros(1, dtype=torch.uint8), "bits": 2, "count": 4}
CODES = [None, [1, 2], torch.ones(2), torch.tensor([4]), torch.tensor([-1])]
ONNX = {"model": model, "path": "a.onnx", "bits": 4, "example_inputs": IMAGE}
TABLE += [
    ("convert", {"net": net, "spec": emq.QuantSpec(bits=(2, 4))}, {"net": [*MODELS[:-1], model], "spec": SPECS}),
    ("convert", {"spec": emq.QuantSpec(bits=(2, 4))}, {"net": OTHER_NETS}),
    ("convert", {"net": net}, {"spec:net": [emq.QuantSpec(bits=(2,), full_precision=("*",))]}),
    ("convert", {"net": net}, {"spec:full_precision": [emq.QuantSpec(bits=(2,), full_precision=("layer9.*",))]}),
    ("set_bits", {"model": model, "bits": 4}, {"model": [*MODELS, packed], "bits": ONE_WIDTH + BY_LAYER}),
    ("set_bits", {"model": with_zero, "bits": 4}, {"bits": [1]}),
    ("at_bits", {"model": model, "bits": 4}, {"model": MODELS, "bits": ONE_WIDTH + BY_LAYER}),
    ("summary", {}, {"model": MODELS}),
    ("pack", {"model": model, "bits": 4}, PACKED),
    ("freeze", {"model": model, "bits": 4}, PACKED),
    ("deploy.pack.pack_integers", {"codes": torch.tensor([1, 2]), "bits": 2}, {"codes": CODES, "bits": COUNTS}),
    ("deploy.pack.unpack_integers", INTEGERS, {"packed": TENSORS, "bits": COUNTS, "count": [*NUMBERS, 5]}),
    ("export_onnx", ONNX, PACKED | {"path": FILES, "example_inputs": IMAGES}),
    ("save", {"model": model, "path": "a.safetensors"}, {"model": MODELS, "path": FILES}),
    ("load", {}, {"path": [*FILES, "nothing", "FILE"]}),
    ("load", {"path": "a.safetensors"}, {"quantizers": [None, "my_quantizer", net, [3]]}),
]

# Data, evaluation and training

LOAD = {"name": [*NAMES, "CIFAR10", "cifar10:x", "imagefolder", "imagefolder:", "imagefolder:a\0b", 10**5000]}
LOAD["name"] += ["imagefolder:" + "a" * 5000]
LOAD |= {"image_size": [*GIVEN, 10**6], "workers": [-1, "2", 1.5, 10**9], "stream": [1, "yes", True]}
MEASURE = {"model": model, "data": digits, "bits": (2, 4)}
MEASURED = {"model": [*MODELS, packed], "data": [*PAIRS, []], "bits": BITS}
BATCHES = {"data": digits, "split": "test", "device": torch.device("cpu"), "batch_size": 10}
LEARN = {"model": model, "data": digits, "config": emq.TrainConfig(epochs=1), "progress": False}
LEARNED = {"model": MODELS, "data": [*DATA, without("train")], "config": CONFIGS, "progress": [None, 1]}
LEARNED |= {"checkpoint": [*FILES[1:], "FILE/a"], "observe": [3, "loss"]}
SIGNALS = torch.ones(4, 2, 8)
TENSORS_OF_OWN = {"images": SIGNALS, "labels": LABELS, "test_images": SIGNALS, "test_labels": LABELS}
INPUTS = [None, "digits", 1j, torch.ones(4), SIGNALS[:0], SIGNALS.long(), {"a": 1}, lambda: digits().train]
INTEGERS_OF_EACH = [None, "digits", 1, *CLASSES[1:], LABELS[:3], LABELS[None], [0, 1, 0, 10**30], LABELS * 1j]
TENSORS_WRONG = {"images": INPUTS, "labels": INTEGERS_OF_EACH, "test_labels": INTEGERS_OF_EACH, "name": [None, 3]}
TENSORS_WRONG |= {"test_images": [*INPUTS, torch.ones(4, 3, 8), SIGNALS.byte()], "flip": FLAGS}
TENSORS_WRONG |= {"classes": ["ab", ["a"], [0, 1], {"a": 0, "b": 1}], "crop_padding": [*NUMBERS, -1]}
TENSORS_WRONG |= {"mean": [0.5, "ab", [NAN], ["0", 1], [1, 2, 3]], "std": [1, [0], [-1.0, 1], [INF, 1], []]}
PAIRED = [(torch.ones(2, 8), 0), (torch.ones(2, 8), 1)]
MAPPED = [None, "digits", 3, [], {"train": PAIRED}, torch.ones(4, 2), np.ones((4, 2)), iter(PAIRED)]
MAPPED += [lambda: digits().train]
UNPAIRED = [[item] for item in (PAIRED, 0, "ab", (1, 2, 3), (torch.ones(1).long(), 0), {"label": 1})]
UNLABELLED = [[(PAIRED[0][0], label)] for label in ("a", 0.5, -1, None, ONES)]
LABELLED = [None, 3, "digits", [], [0.5], [[0]], [-1, 0], LABELS.float(), LABELS[:, None], LABELS > 0, {}, iter([0])]
OWN = {"labels": LABELS, "bits": (2, 4), "epochs": 3, "config": emq.CoresetConfig(score="el2n", pruning_rate=0.5)}
EPOCHS = [*NUMBERS, -1, 3]


@cache
def coresets() -> emq.Coresets:
    return emq.Coresets(**OWN)


@cache
def observed() -> emq.Coresets:
    """In the scoring phase."""
    made = emq.Coresets(**OWN | {"config": emq.CoresetConfig(score="grand")})
    made.subsets(0)
    return made


SEEN = {"self": observed, "bits": 4, "indices": LABELS[:2], "logits": ONES, "labels": LABELS[:2], "features": ONES}
UNSEEN = {"bits": [3], "indices": [LABELS[:2].float()], "logits": [ONES[0]], "features": [None]}
OTHERS_STATE = [None, {}, "state", lambda: coresets().state_dict() | {"ranks": 3}]
OTHERS_STATE += [lambda: coresets().state_dict() | {"recorders": {2: {}}}]
TABLE += [
    ("Dataset.from_tensors", TENSORS_OF_OWN, TENSORS_WRONG),
    ("Dataset.from_tensors", TENSORS_OF_OWN, {"flip:images": [True], "crop_padding:images": [1]}),
    ("Dataset.from_dataset", {"train": PAIRED}, {"train": MAPPED, "test": MAPPED[1:], "name": [None, 3]}),
    ("Dataset.from_dataset", {"train": PAIRED}, {"classes": ["ab", ["a"]], "num_workers": [*NUMBERS, -1, 10**9]}),
    ("Dataset.from_dataset", {}, {"train:data": UNPAIRED, "train:label": UNLABELLED}),
    ("load_dataset", {"name": "digits"}, LOAD),
    ("load_dataset", {"name": "cifar10"}, {"root": PATHS[1:]}),
    ("Dataset.subset", {"self": digits, "train": 20, "test": 10}, {"train": [*COUNTS, 41], "test": COUNTS}),
    ("recipe", {}, {"bits": BITS, "epochs": [*NUMBERS, -1], "pruning_rate": RATES, "lr": [0, -1, NAN, "0.1"]}),
    ("Dataset.validation", {"self": digits, "count": 10}, {"count": [*COUNTS, 40]}),
    ("train.sources.check_name", {"parameter": "dataset"}, {"name:dataset": NAMES}),
    ("evaluate", MEASURE, MEASURED | {"batch_size": COUNTS, "adapt_norm": FLAGS}),
    ("evaluate", MEASURE, {"data": [without("test")]}),
    ("evaluate", MEASURE, {"data:model": [[(torch.ones(2, 3, 8, 8), torch.tensor([0, 10]))]]}),
    ("evaluate", MEASURE | {"model": transformer}, {"adapt_norm:model": [True]}),
    ("adapt_norm", MEASURE, MEASURED | {"samples": COUNTS, "batch_size": COUNTS}),
    ("adapt_norm", MEASURE, {"model": [transformer]}),
    ("train.evaluate.batches", BATCHES, {"data": PAIRS, "split": NAMES, "batch_size": COUNTS, "limit": GIVEN}),
    ("train", LEARN, LEARNED),
    ("train", LEARN, {"config:scheme": [emq.TrainConfig(scheme="dedicated")]}),
    ("Coresets", OWN, {"labels": LABELLED, "bits": BITS, "config": [3, "tdds"]}),
    ("Coresets", OWN, {"epochs": [*COUNTS, 1], "seed": NUMBERS}),
    ("Coresets.batches", {"self": coresets, "epoch": 0, "batch_size": 2}, {"epoch": EPOCHS, "batch_size": COUNTS}),
    ("Coresets.observe", SEEN, UNSEEN),
    ("Coresets.loader", {"self": coresets, "batch_size": 2}, {"dataset": [None, [1] * 5, iter([])]}),
    ("Coresets.load_state_dict", {"self": coresets, "state": lambda: coresets().state_dict()}, {"state": OTHERS_STATE}),
    ("soft_targets", {"model": model, "x": IMAGE}, {"model": MODELS}),
]

# What is measured of networks

PROBED = MEASURED | {"samples": [*COUNTS, 1], "batch_size": COUNTS}
ANGLES = {"model": MODELS, "data": DATA, "bits": BITS, "samples": [*COUNTS, 1, 21], "batch_size": [*COUNTS, 1]}
TABLE += [
    ("paper.measure.weight_shift", {"model": model}, {"model": MODELS, "bits": BITS}),
    ("paper.measure.preactivations", MEASURE, PROBED),
    ("paper.measure.moved_channel", MEASURE, MEASURED | {"samples": [*COUNTS, 1]}),
    ("paper.measure.moved_channel", MEASURE, {"model": [transformer]}),
    ("paper.measure.layer_norms", MEASURE | {"model": transformer}, PROBED),
    ("paper.measure.layer_norms", MEASURE, {"model": [model]}),
    ("paper.measure.preactivations", MEASURE, {"model": [transformer]}),
    ("paper.measure.angle", {"a": ONES[0], "b": ONES[0]}, {"a": TENSORS, "b": [*TENSORS, torch.ones(3)]}),
    ("paper.measure.gradient_angles", MEASURE | {"samples": 10}, ANGLES),
    ("paper.measure.gradient_angles", MEASURE | {"samples": 10, "model": switchable}, {"bits": [(2, 3)]}),
    ("paper.measure.linear_probes", MEASURE, PROBED | {"model": [*MODELS, headless]}),
    ("paper.measure.linear_probes", MEASURE | {"model": switchable}, {"bits": [(2, 3)]}),
]

# Notebooks and experiments

RATES_TWICE = [None, 80, 1.0, -0.1, NAN, True, *LISTS, [80], "[0.5, 0.5]", "0.8;0.9"]
NOTEBOOK = {"profile": [*NAMES, "Smoke"], "model": [*ARCHITECTURES[2:], None, "resnet"], "results_dir": FOLDERS}
NOTEBOOK |= {"bits": [*BITS[:5], *BITS[7:11], 9, 0, "2;4", *LISTS], "pruning_rates": RATES_TWICE}
NOTEBOOK |= {"dataset": [None, 3, "mnist", "imagefolder:\0", "imagefolder:" + "a" * 5000, "imagefolder"]}
NOTEBOOK |= {"lengths": [*LISTS, [4, 4], 0, None, [10**9], True], "seed": [*NUMBERS, -1, "[0]"]}
NOTEBOOK |= {"repeats": [*NUMBERS, -1, 10**9]}
FINISH = {"runs": lambda: [run()], "results_dir": "results", "progress": False}
FINISHED = {"runs": [[], None, run, [3], "table1"], "results_dir": [*FOLDERS, damaged], "progress": FLAGS}
BUDGETS = [0, -1.0, "60", True, NAN, INF, [60]]
DERIVE = {"run": run, "results_dir": "results", "name": "table", "measure": lambda: len}
TABLE += [
    ("paper.profiles.parameters", {"profile": "smoke"}, NOTEBOOK),
    ("paper.runs.run_all", FINISH, FINISHED | {"budget": BUDGETS}),
    ("paper.runs.build", {"run": run, "num_classes": 10}, {"run": RUNS, "num_classes": COUNTS}),
    ("paper.runs.trained", {"results_dir": "results"}, {"run": RUNS}),
    ("paper.runs.coreset_rows", {"results_dir": "results"}, {"runs": [lambda: [run()], None, [3]]}),
    ("paper.runs.derived", DERIVE, {"run": RUNS, "measure": [None, "loss"]}),
    ("paper.experiments.imagenet", {}, {"p:dataset": [lambda: replace(small(), dataset="cifar10")]}),
    ("paper.experiments.transfer", {}, {"p:bits": [lambda: replace(small(), bits=(4,))]}),
]

# Tables and figures: path, the committed rows it is right with, its other arguments

OF_ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("tables.accuracy_table", "01_cifar10", {}),
    ("tables.correction_table", "00_quickstart", {}),
    ("tables.cost_table", "01_cifar10", {"table": "table1"}),
    ("tables.gap_table", "01_cifar10", {}),
    ("tables.comparison_table", "05_coreset_comparison", {}),
    ("tables.coreset_table", "05_coresets", {}),
    ("tables.untrained_table", "10_untrained_bitwidths", {}),
    ("tables.transfer_table", "09_knowledge_transfer", {}),
    ("tables.growth_table", "11_training_cost", {}),
    ("plots.accuracy_by_bits", "00_quickstart", {}),
    ("plots.accuracy_by_cost", "02_cifar100", {}),
    ("plots.accuracy_by_coreset", "07_ablation_scoring_scheme", {}),
    ("plots.growth", "11_training_cost", {}),
    ("plots.distributions", "08_activation_distributions", {}),
    ("plots.mismatch", "08_mismatch", {}),
    ("plots.angles", "09_angles", {}),
    ("plots.idea", "../idea", {}),
]
FIRST = {"tables.coreset_table": "draws", "plots.distributions": "histograms"}  # what others call rows
FRAMES = [None, "rows.csv", {"bits": [2]}, pd.DataFrame(), pd.DataFrame({"x": [1.0]})]
for name, source, right in OF_ROWS:
    none = [lambda source=source: table(source)[:0]]
    TABLE += [(f"paper.{name}", right, {FIRST.get(name, "rows"): FRAMES + none})]


def rows(source: str) -> dict[str, Any]:
    return {"rows": lambda: table(source)}


SAVED = {"table": FRAMES[-1], "path": Path("a")}
BAD_COST = [None, "dollars", ["seconds"]]
DRAWN = ["nothing", "00_quickstart"]  # no such figure, and one whose rows are not there
TABLE += [
    ("paper.plots.angles", rows("09_angles"), {"by": ["bits", None, ["layer"]]}),
    ("paper.tables.paper", {}, {"table": [None, 3, "\0", "a" * 5000]}),
    ("paper.tables.save", SAVED, {"table": [None, 3], "path": PATHS, "rows": ["a.csv"]}),
    ("paper.plots.accuracy_by_bits", rows("00_quickstart"), {"ax": [3, "ax"]}),
    ("paper.plots.accuracy_by_cost", rows("02_cifar100"), {"ax": [3, "ax"], "cost": BAD_COST}),
    ("paper.plots.growth", rows("11_training_cost"), {"ax": [3, "ax"], "cost": BAD_COST}),
    ("paper.plots.save", {"path": Path("a")}, {"ax": [None, 3]}),
    ("paper.plots.draw", {}, {"path": [*PATHS, *DRAWN]}),
]

# One case for each value


@dataclass(frozen=True)
class Case:
    """A call whose arguments are right but for one, and the name by which the error is to tell that one."""

    path: str
    right: dict[str, Any]
    parameter: str
    value: Any
    told: str

    def arguments(self) -> dict[str, Any]:
        return {name: made(value) for name, value in (self.right | {self.parameter: self.value}).items()}


def made(value: Any) -> Any:
    """What a function returns; classes and all other values as they are."""
    return value() if callable(value) and not isinstance(value, type) else value


def function(path: str) -> Callable[..., Any]:
    """The function of this path below `emqlib`."""
    module, _, name = path.rpartition(".")
    holder = getattr(emq, module) if module[:1].isupper() else import_module(f"emqlib.{module}" if module else "emqlib")
    return getattr(holder, name)


def cases() -> Iterator[Case]:
    for path, right, wrong in TABLE:
        for key, values in wrong.items():
            parameter, _, told = key.partition(":")
            yield from (Case(path, right, parameter, value, told or parameter) for value in values)


CASES = list(cases())
