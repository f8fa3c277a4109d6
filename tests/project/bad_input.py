"""Wrong values for the public functions, each with a name; `test_bad_input` gives them and looks at what happens.

A value that has to be made anew each time, or only when it is needed, is `late`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import emqlib as emq
from emqlib import coreset, correction, models, quantizers
from emqlib.convert import converted
from emqlib.deploy import onnx as export
from emqlib.deploy import pack as packing
from emqlib.paper import claims as gallery
from emqlib.paper import deployment, experiments, plots, profiles, remedies, runs, studies, suite
from emqlib.paper import deployment as serving
from emqlib.paper import experiments as methods
from emqlib.paper import measure as analysis
from emqlib.paper import measure as transfer
from emqlib.paper import plots as figures
from emqlib.paper import runs as derived
from emqlib.paper import tables as results
from emqlib.train import data
from emqlib.train import distributed as devices
from emqlib.train import evaluate as evaluation
from emqlib.train.checkpoint import checked

SMALL = Path(__file__).resolve().parents[2] / "results/small"


@dataclass(frozen=True)
class Case:
    """A call whose arguments are right but for one, and the name under which the error is to tell that one."""

    name: str
    call: Callable[..., object]
    right: dict[str, Any]
    parameter: str
    value: Any
    told: str


@dataclass(frozen=True)
class late:
    """A value made when it is needed."""

    make: Callable[[], Any]


CASES: list[Case] = []
NOTHING: dict[str, Any] = {}


def wrong(
    name: str,
    call: Callable[..., object],
    right: dict[str, Any] = NOTHING,
    told: dict[str, str] = NOTHING,
    /,
    **values: dict[str, Any],
) -> None:
    """Cases for one function: values, by their names, for some of its parameters; told: other names in the errors."""
    for parameter, named in values.items():
        for label, value in named.items():
            told_as = told.get(parameter, parameter)
            CASES.append(Case(f"{name}-{parameter}-{label}", call, right, parameter, value, told_as))


# What the functions are right with


@cache
def net() -> nn.Module:
    return models.resnet8(10, width=2)


@cache
def model() -> nn.Module:
    return emq.convert(net(), emq.QuantSpec(bits=(2, 4, 8)))


@cache
def unseen() -> nn.Module:
    return emq.convert(net(), emq.QuantSpec(bits=(2, 8), activation="lsq"))


@cache
def transformer() -> nn.Module:
    return emq.convert(models.vit_tiny(10, patch_size=16, width=4, depth=1, heads=1), emq.QuantSpec(bits=(2, 8)))


@cache
def own_statistics() -> nn.Module:
    return emq.convert(net(), emq.QuantSpec(bits=(2, 8), norm="shared_affine"))


@cache
def digits() -> emq.Dataset:
    return emq.load_dataset("digits").subset(40, 20)


@cache
def run() -> runs.Run:
    spec, config = emq.QuantSpec(bits=(2, 4)), emq.TrainConfig(epochs=1)
    named = {"dataset": "digits", "model": "resnet8", "model_args": (("width", 2),)}
    return runs.Run(profile="smoke", spec=spec, config=config, **named)


def asked() -> profiles.Parameters:
    return profiles.parameters(profile="smoke", results_dir="results")


@cache
def table(name: str) -> pd.DataFrame:
    return pd.read_csv(SMALL / f"{name}.csv")


CONFIG = emq.TrainConfig(epochs=1)
P = torch.full((4, 2), 0.5)  # probabilities
LABELS = torch.tensor([0, 1, 0, 1])

# What is wrong for many of them

NAN, INF = math.nan, math.inf
NUMBERS = {"None": None, "text": "3", "a fraction": 2.5, "True": True, "nan": NAN, "a list": [3], "huge": 10**30}
COUNTS = NUMBERS | {"zero": 0, "negative": -1, "infinite": INF}
GIVEN = {name: value for name, value in COUNTS.items() if name != "None"}
RATES = {"None": None, "text": "0.8", "percent": 80, "one": 1.0, "negative": -0.1, "nan": NAN, "True": True}
FLAGS = {"None": None, "one": 1, "text": "yes"}
NAMES = {"None": None, "empty": "", "unknown": "nothing", "a number": 3, "a list": ["random"], "an array": np.ones(2)}
BITS = {
    **{"None": None, "none": (), "nine": (9,), "zero": (0, 2), "twice": (2, 2), "text": "2,4", "a number": 4},
    **{"a fraction": (2.0,), "True": (True,), "nested": [[2]], "a dict": {2: 4}, "scalar": torch.tensor(2)},
    **{"endless": late(lambda: count(1)), "a billion": range(10**9)},
}
ONE_WIDTH = {"None": None, "zero": 0, "nine": 9, "text": "4", "a fraction": 2.0, "True": True, "huge": 10**5000}
MODELS = {"None": None, "a name": "resnet8", "a class": nn.Linear, "not converted": late(net)}
PAIRS = {
    **{"None": None, "a name": "digits", "numbers": [1, 2], "a tensor": torch.ones(3), "empty": []},
    **{"an iterator": late(lambda: iter([])), "of unequal length": [(torch.ones(2, 3, 8, 8), LABELS)]},
    **{"one pair": (torch.ones(4, 3, 8, 8), LABELS)},
}
DATA = {"None": None, "a name": "digits", "a list": [], "a split": late(lambda: digits().train)}
PATHS = {"None": None, "empty": "", "a number": 3, "bytes": b"a", "null byte": "a\0b", "too long": "a" * 5000}
FILES = PATHS | {"a folder": "FOLDER"}
TENSORS = {"None": None, "a list": [0.5, 0.5], "an array": np.ones(4), "a number": 0.5}
RUNS = {"None": None, "a name": "table1", "a class": runs.Run, "a spec": late(lambda: run().spec)}
TABLES = {"None": None, "a path": "rows.csv", "a dict": {"bits": [2]}, "no rows and columns": pd.DataFrame()}


def rows(source: str) -> dict[str, Any]:
    """What is no table of such rows: see also `test_bad_input.test_a_table_without_a_column`."""
    other = pd.DataFrame({"x": [1.0]})
    return TABLES | {"no rows": late(lambda: table(source)[:0]), "other columns": other}


# Networks and their quantizers

for builder in (models.resnet8, models.resnet20, models.resnet18):
    wrong(f"models.{builder.__name__}", builder, num_classes=COUNTS, width={"zero": 0, "text": "8", "a billion": 10**9})
wrong("models.preact_resnet20", models.preact_resnet20, num_classes={"zero": 0}, width_factor=COUNTS)
wrong("models.resnet50", models.resnet50, num_classes=COUNTS)
for builder in (models.vit_tiny, models.vit_small):
    sizes = {"num_classes": 10, "image_size": 32, "patch_size": 4, "width": 12, "depth": 1, "heads": 1}
    many = {name: {"zero": 0, "text": "8", "a billion": 10**9} for name in sizes}
    many |= {"patch_size": {"no divisor": 5, "zero": 0}, "heads": {"no divisor": 5, "None": None}}
    wrong(f"models.{builder.__name__}", builder, sizes, **many)
UNKNOWN = NAMES | {"of no library": "keras.resnet50", "unknown to torchvision": "torchvision.nothing", "huge": 10**5000}
wrong("models.check_name", lambda name: models.check_name("model", name), {}, {"name": "model"}, name=UNKNOWN)
wrong("models.build", models.build, {"name": "resnet8", "num_classes": 10}, name=UNKNOWN, num_classes=COUNTS)
wrong("models.build", models.build, {"name": "resnet8", "num_classes": 10}, width={"text": "8"}, depth={"unknown": 3})
foreign = {"name": "torchvision.resnet18", "num_classes": 10}
wrong("models.build of torchvision", models.build, foreign, {"depth": "kwargs"}, num_classes=COUNTS, depth={"no": 3})
wrong("quantizers.levels", quantizers.levels, bits=ONE_WIDTH)
NOT_WEIGHTS = TENSORS | {"empty": torch.ones(0, 2), "integers": torch.ones(2, 2, dtype=torch.int64)}
SCALES = {"a number": 0.1, "zero": torch.tensor(0.0), "two": torch.ones(2), "nan": torch.tensor(NAN)}
SCALES |= {"complex": torch.tensor(1j), "infinite": torch.tensor(INF)}
for function, x in ((quantizers.quantize_weight, "w"), (quantizers.quantize_activation, "x")):
    some = {x: NOT_WEIGHTS, "bits": ONE_WIDTH, "method": NAMES, "scale": SCALES}
    flag = {"zero_level": FLAGS} if x == "w" else {"signed": FLAGS}
    wrong(f"quantizers.{function.__name__}", function, {x: torch.ones(2, 2), "bits": 4}, **some, **flag)
one_bit = {"w": torch.ones(2, 2), "bits": 1, "method": "minmax"}
wrong("quantizers.quantize_weight", quantizers.quantize_weight, one_bit, zero_level={"at one bit": True})
both = {"w_q": torch.ones(2, 3), "w": torch.ones(2, 3)}
shapes = {"w_q": {"unequal": torch.ones(2, 4), "one dimension": torch.ones(2), "empty": torch.ones(0, 3)}}
wrong("correction.correct_weight", correction.correct_weight, both, w_q=TENSORS, w=TENSORS, mode=NAMES, gradient=FLAGS)
wrong("correction.correct_weight shapes", correction.correct_weight, both, {"w_q": "w_q, w shapes"}, **shapes)
both = both | {"mean_input": torch.ones(3)}
unequal = TENSORS | {"unequal": torch.ones(4)}
wrong("correction.output_shift", correction.output_shift, both, w_q=unequal, w=TENSORS, mean_input=unequal)

# Coresets

LOGITS = TENSORS | {"logits": torch.tensor([[3.0, -1.0]]), "nan": P * NAN, "flat": torch.ones(4), "empty": P[:0]}
CLASSES = {"None": None, "a list": [0, 1, 0, 1], "floats": LABELS.float(), "too few": LABELS[:3]}
CLASSES |= {"negative": LABELS - 1, "unknown": LABELS + 1}
FEATURES = TENSORS | {"too few": torch.ones(3, 2), "flat": torch.ones(4), "complex": torch.ones(4, 2) * 1j}
VECTORS = TENSORS | {"a table": torch.ones(4, 2), "a scalar": torch.tensor(1.0), "complex": torch.ones(4) * 1j}
wrong("coreset.entropy", coreset.entropy, probabilities=LOGITS)
wrong("coreset.el2n", coreset.el2n, {"probabilities": P, "labels": LABELS}, probabilities=LOGITS, labels=CLASSES)
right = {"probabilities": P, "labels": LABELS, "features": torch.ones(4, 3)}
wrong("coreset.grand", coreset.grand, right, probabilities=LOGITS, labels=CLASSES, features=FEATURES)
wrong("coreset.forgetting", coreset.forgetting, correct=TENSORS | {"one epoch": torch.ones(1, 4, dtype=torch.bool)})
right = {"features": torch.ones(4, 3), "labels": LABELS}
some = {name: value for name, value in CLASSES.items() if name not in ("unknown", "too few")}
wrong("coreset.moderate", coreset.moderate, right, features=FEATURES, labels=some)
wrong("coreset.centrality", coreset.centrality, scores=VECTORS)
wrong("coreset.ranks", coreset.ranks, scores=VECTORS)
WINDOWS, DECAYS = (
    COUNTS | {"two": 2, "a billion": 10**9},
    {"None": None, "zero": 0, "two": 2.0, "text": "0.9", "nan": NAN},
)
right = {"probabilities": P.expand(4, 4, 2), "window": 3}
wrong("coreset.tdds", coreset.tdds, right, window=WINDOWS | {"too long": 5}, decay=DECAYS, probabilities=LOGITS)
wrong("coreset.check_window", coreset.check_window, {"window": 3, "decay": 0.9}, window=WINDOWS, decay=DECAYS)
right = {"scores": torch.ones(4), "pruning_rate": 0.5, "how": "sample", "generator": torch.Generator()}
GENERATORS = {"None": None, "a seed": 0}
SCORES = VECTORS | {"empty": torch.ones(0), "nan": torch.ones(4) * NAN}
select = {"scores": SCORES, "pruning_rate": RATES, "how": NAMES, "generator": GENERATORS}
wrong("coreset.select", coreset.select, right, **select)
weights = right | {"how": "sample"}
wrong("coreset.select by weight", coreset.select, weights, scores={"negative": -torch.ones(4), "zero": torch.zeros(4)})
wrong("coreset.kept", coreset.kept, {"n": 4, "pruning_rate": 0.5}, n=NUMBERS | {"negative": -1}, pruning_rate=RATES)
right = {"scores": torch.ones(4), "keep": 2, "how": "sample", "generator": torch.Generator()}
keep = NUMBERS | {"negative": -1, "more than all": 5}
wrong("coreset.choose", coreset.choose, right, scores=VECTORS, keep=keep, how=NAMES, generator=GENERATORS)
wrong("coreset.inclusion", coreset.inclusion, {"weights": torch.ones(4), "keep": 2}, weights=VECTORS, keep=keep)

# Configurations

spec = {"bits": BITS, "weight": NAMES, "activation": NAMES, "correction": NAMES, "norm": NAMES, "zero_level": FLAGS}
kept = {
    "None": None,
    "text": "first",
    "numbers": (1,),
    "empty": ("",),
    "scalar": torch.tensor(1),
    "a lot": range(10**9),
}
spec |= {"activation_range": NAMES, "full_precision": kept, "correction_gradient": FLAGS, "output_correction": FLAGS}
wrong("QuantSpec", emq.QuantSpec, {"bits": (2, 4)}, **spec)
train = {"scheme": NAMES, "epochs": COUNTS, "optimizer": NAMES, "schedule": NAMES, "device": NAMES, "autocast": NAMES}
train |= {"lr": {"zero": 0, "nan": NAN, "text": "0.1", "huge": 10**400}, "compile": NAMES}
train |= {"coreset": {"a rate": 0.8, "a name": "random", "a class": emq.CoresetConfig}}
train |= {"milestones": {"None": None, "text": "1", "a number": 5, "an array": np.ones(2)}, "seed": NUMBERS}
wrong("TrainConfig", emq.TrainConfig, **train)
chosen = {"score": NAMES, "pruning_rate": RATES, "how": NAMES, "window": WINDOWS, "decay": DECAYS, "cut": RATES}
wrong("CoresetConfig", emq.CoresetConfig, **chosen, across_bits=NAMES, scoring=NAMES, power={"nan": NAN, "text": "1"})
wrong(
    "Run",
    lambda **changed: replace(run(), **changed),
    eval_bits=BITS,
    profile={"None": None, "a number": 3},
    dataset=NAMES,
    model=NAMES,
    spec={"None": None, "bits": (2, 4), "a class": emq.QuantSpec},
    config={"None": None, "a dict": {}, "a class": emq.TrainConfig},
    model_args={"None": None, "a dict": {"width": 4}, "a name": ("width",), "text": "width=4"},
    subset={"None": None, "a number": 5, "one": (5,), "negative": (-1, 5), "fractions": (0.5, 0.5)},
    image_size={"None": None, "negative": -1, "a fraction": 32.0},
    stream=FLAGS,
)

# Networks at any bit-width

wrong(
    "convert",
    emq.convert,
    {"net": late(net), "spec": emq.QuantSpec(bits=(2, 4))},
    net=MODELS | {"not converted": late(model)},
    spec={"None": None, "bits": (2, 4), "a class": emq.QuantSpec},
)
NO_PATTERN = {
    "no pattern": {},
    "an idle pattern": {"nothing.*": 2, "*": 4},
    "numbers": {1: 2},
    "a layer left": {"layer1.*": 2},
}
wrong("set_bits", emq.set_bits, {"model": late(model), "bits": 4}, model=MODELS, bits=ONE_WIDTH | NO_PATTERN)
wrong(
    "at_bits",
    lambda **given: emq.at_bits(**given).__enter__(),
    {"model": late(model), "bits": 4},
    model=MODELS,
    bits=ONE_WIDTH | NO_PATTERN,
)
wrong("converted", converted, model=MODELS)
wrong("summary", emq.summary, model=MODELS)
wrong("evaluation.batch_norms", evaluation.batch_norms, model=MODELS)
PACKED = {"bits": ONE_WIDTH | NO_PATTERN, "model": MODELS | {"that has seen nothing": late(unseen)}}
wrong("pack", emq.pack, {"model": late(model), "bits": 4}, **PACKED)
right = {"codes": torch.tensor([1, 2]), "bits": 2}
CODES = {
    "None": None,
    "a list": [1, 2],
    "floats": torch.ones(2),
    "too large": torch.tensor([4]),
    "negative": torch.tensor([-1]),
}
wrong("packing.pack_integers", packing.pack_integers, right, codes=CODES, bits=COUNTS)
right = {"packed": torch.zeros(1, dtype=torch.uint8), "bits": 2, "count": 4}
wrong(
    "packing.unpack_integers", packing.unpack_integers, right, packed=TENSORS, bits=COUNTS, count=NUMBERS | {"five": 5}
)
wrong("packing.packed_bytes", packing.packed_bytes, network={"None": None, "a name": "resnet8"})
wrong("export.native", export.native, bits=COUNTS)
IMAGES = {"None": None, "numbers": [1, 2], "none": (), "a scalar": torch.ones(()), "empty": torch.ones(0, 3, 32, 32)}
IMAGES |= {"of one channel": torch.ones(2, 1, 32, 32), "integers": torch.ones(2, 3, 32, 32, dtype=torch.int64)}
right = {"model": late(model), "path": "a.onnx", "bits": 4, "example_inputs": torch.ones(1, 3, 32, 32)}
wrong("export_onnx", emq.export_onnx, right, **PACKED, path=FILES, example_inputs=IMAGES)
wrong("save", emq.save, {"model": late(model), "path": "a.safetensors"}, model=MODELS, path=FILES)
wrong("load", emq.load, path=FILES | {"not there": "nothing", "no such file": "FILE"})

# Data, evaluation and training

wrong(
    "load_dataset",
    emq.load_dataset,
    {"name": "digits"},
    name=NAMES,
    image_size=GIVEN | {"that fits no memory": 10**6},
    workers={"negative": -1, "text": "2", "a fraction": 1.5, "a billion": 10**9},
    stream={"one": 1, "text": "yes", "True": True},
)
places = {name: value for name, value in PATHS.items() if name != "None"}
wrong("load_dataset", emq.load_dataset, {"name": "cifar10"}, root=places)
folders = {"null byte": "imagefolder:a\0b", "too long": "imagefolder:" + "a" * 5000, "digits": 10**5000}
wrong("load_dataset", emq.load_dataset, name=folders)
wrong(
    "Dataset.subset",
    lambda train, test: digits().subset(train, test),
    {"train": 20, "test": 10},
    train=COUNTS | {"more than all": 41},
    test=COUNTS,
)
wrong("data.check_name", lambda name: data.check_name("dataset", name), {}, {"name": "dataset"}, name=NAMES)
right = {"model": late(model), "data": late(digits), "bits": (2, 4)}
measured = {"model": MODELS, "data": PAIRS, "bits": BITS}
wrong("evaluate", emq.evaluate, right, **measured, batch_size=COUNTS, adapt_norm=FLAGS)
few = {"classes": [(torch.ones(2, 3, 8, 8), torch.tensor([0, 10]))]}
wrong("evaluate", emq.evaluate, right, {"data": "model"}, data=few)
wrong(
    "evaluate",
    emq.evaluate,
    right,
    data={"no images": late(lambda: replace(digits(), test=digits().test.take(LABELS[:0])))},
)
wrong(
    "evaluate",
    emq.evaluate,
    right | {"model": late(transformer)},
    {"adapt_norm": "model"},
    adapt_norm={"of none": True},
)
wrong("adapt_norm", emq.adapt_norm, right, **measured, samples=COUNTS, batch_size=COUNTS)
wrong("adapt_norm", emq.adapt_norm, right | {"data": late(digits)}, model={"without batch norm": late(transformer)})
of_batches = {"data": late(digits), "split": "test", "device": torch.device("cpu"), "batch_size": 10}
wrong(
    "evaluation.batches",
    lambda **given: list(evaluation.batches(**given)),
    of_batches,
    data=PAIRS | {"empty": 3},
    split=NAMES,
    batch_size=COUNTS,
    limit=COUNTS | {"None": 0},
)


def inside(**given: Any) -> object:
    """What the block of `undisturbed` begins with."""
    return evaluation.undisturbed(**given).__enter__()


wrong("evaluation.undisturbed", inside, {"model": late(model), "data": late(digits), "batch_size": 10}, model=MODELS)
right = {"model": late(model), "data": late(digits), "config": CONFIG, "progress": False}
budgets = {"zero": 0, "text": "60", "nan": NAN, "without a checkpoint": 60}
wrong(
    "train",
    emq.train,
    right,
    model=MODELS,
    data=DATA,
    config={"None": None, "a dict": {}, "a class": emq.TrainConfig},
    checkpoint={name: value for name, value in FILES.items() if name != "None"} | {"below a file": "FILE/a"},
    progress={"None": None, "one": 1},
    observe={"a number": 3, "a name": "loss"},
    budget=budgets,
)
empty = late(lambda: replace(digits(), train=digits().train.take(LABELS[:0])))
wrong("train", emq.train, right, data={"no images": empty})
wrong("checkpoints.checked", checked, checkpoint={name: value for name, value in FILES.items() if name != "None"})
DEVICES = {"None": None, "unknown": "gpu", "a number": 0, "meta": "meta", "empty": ""}
wrong("devices.device_named", devices.device_named, {}, {"name": "device"}, name=DEVICES)

# What is measured of networks

wrong("analysis.weight_shift", analysis.weight_shift, {"model": late(model)}, model=MODELS, bits=BITS)
right = {"model": late(model), "data": late(digits), "bits": (2, 4)}
wrong("analysis.preactivations", analysis.preactivations, right, **measured, samples=COUNTS, batch_size=COUNTS)
wrong("analysis.layer_norms", analysis.layer_norms, right | {"model": late(transformer)}, **measured, samples=COUNTS)
wrong("analysis.layer_norms", analysis.layer_norms, right, model={"without layer norm": late(model)})
wrong(
    "transfer.angle",
    transfer.angle,
    {"a": torch.ones(2), "b": torch.ones(2)},
    a=TENSORS,
    b=TENSORS | {"unequal": torch.ones(3)},
)
wrong(
    "transfer.gradient_angles",
    transfer.gradient_angles,
    right | {"samples": 10},
    model=MODELS,
    data=DATA,
    bits=BITS,
    samples=COUNTS | {"too many": 21},
    batch_size=COUNTS,
)
wrong("transfer.linear_probes", transfer.linear_probes, right, **measured, samples=COUNTS, batch_size=COUNTS)
wrong("remedies.gaussian_inputs", remedies.gaussian_inputs, model={"None": None, "a name": "resnet8"})
wrong(
    "remedies.compare",
    remedies.compare,
    {"model": late(own_statistics), "data": late(digits), "bits": (2,)},
    model=MODELS | {"of one table": late(model)},
    data=PAIRS,
    bits=BITS,
    samples=COUNTS,
)
right = {"model": late(model), "data": late(digits), "full": late(model), "bits": (2, 4)}
wrong("deployment.served", deployment.served, right, model=MODELS, data=DATA, full=MODELS, bits=BITS, repeats=COUNTS)
right = {"model": late(model), "data": late(digits), "bits": (2, 4)}
foreign_net = late(
    lambda: emq.convert(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4096, 10)),
        emq.QuantSpec(bits=(2, 4)),
    )
)
wrong(
    "deployment.switching",
    deployment.switching,
    right,
    model=MODELS | {"of no recipe": foreign_net},
    data=DATA,
    bits=BITS,
    repeats=COUNTS,
)
wrong(
    "serving.load",
    serving.load,
    {"path": "a.onnx"},
    path={"None": None, "not there": "nothing", "no ONNX": "FILE", "a folder": "FOLDER"},
    threads=NUMBERS | {"negative": -1},
)
ARRAYS = {"None": None, "a list": [1.0], "empty": np.ones((0, 3)), "a scalar": np.ones(())}
one = {"images": np.ones((2, 3, 8, 8), np.float32)}
wrong("serving.logits", serving.logits, one | {"network": np.copy}, images=ARRAYS, batch=COUNTS)
wrong(
    "serving.seconds",
    serving.seconds,
    one | {"network": np.copy},
    images=ARRAYS,
    least={"endless": INF, "nan": NAN, "text": "1", "None": None},
)
wrong("serving.cost", serving.cost, one | {"load": lambda: np.copy}, images=ARRAYS, batch=COUNTS)

# Notebooks: their parameters as Python values, and as the strings that papermill passes

LISTS = {
    "banana": "[2,banana]",
    "unclosed": "[2,4",
    "empty": "",
    "code": "__import__('os').getcwd()",
    "deep": "[" * 10_000,
    "long": "9" * 5000,
    "infinite": "1e999",
    "a power": "10**10**10",
    "null byte": "\0",
    "surrogate": "\ud800",
    "a dict": "{1: 2}",
    "unhashable": "{[1]: 2}",
    "nested": "[[2]]",
    "text inside": "['2']",
    "nan": "nan",
    "None as text": "None",
}
asked_for = {
    "profile": NAMES | {"upper case": "Smoke"},
    "bits": BITS | LISTS | {"a number": 9, "scalar": 0, "text": "2;4"},
    "dataset": NAMES
    | {
        "empty": "mnist",
        "of a null byte": "imagefolder:\0",
        "too long": "imagefolder:" + "a" * 5000,
        "nowhere": "imagefolder",
    },
}
asked_for |= {
    "seed": NUMBERS | {"negative": -1, "a list as text": "[0]"},
    "repeats": NUMBERS | {"negative": -1, "a billion": 10**9},
    "processes": COUNTS | {"a billion": 10**9},
}
asked_for |= {
    "pruning_rates": RATES | LISTS | {"twice": "[0.5, 0.5]", "text": "0.8;0.9", "a percentage": [80]},
    "lengths": LISTS | {"twice": [4, 4], "zero": 0, "None": None, "a billion": [10**9], "True": True},
}
asked_for |= {
    "results_dir": PATHS | {"a file": "FILE", "below a file": "FILE/a"},
    "model": UNKNOWN | {"empty": "resnet"},
}
wrong("parameters", profiles.parameters, {"profile": "smoke"}, **asked_for)
ONE_DATASET = {"dataset": {"None": None, "unknown": "mnist", "empty": "", "a number": 3}}
small = {
    "p": late(lambda: profiles.parameters(profile="small", results_dir="results"))
}  # of which `dataset` is not replaced
of_one_dataset = [
    experiments.table1,
    experiments.curves,
    experiments.comparison,
    experiments.bias_correction,
    experiments.corrected_or_not,
    experiments.deployed,
    experiments.uncalibrated,
    experiments.untrained,
    experiments.transfer,
    studies.deploy,
    studies.distributions,
    studies.remedies,
    studies.alignment,
]
for function in of_one_dataset:
    wrong(f"{function.__module__.removeprefix('emqlib.')}.{function.__name__}", function, small, **ONE_DATASET)
for function in (experiments.equal_epochs, experiments.scoring_ablation):
    wrong(f"experiments.{function.__name__}", function, small, **ONE_DATASET, pruning_rate=RATES)
wrong("experiments.growth", experiments.growth, small, pruning_rate=RATES)
wrong(
    "experiments.imagenet",
    lambda dataset: experiments.imagenet(replace(asked(), dataset=dataset)),
    dataset={"another": "cifar10"},
)
wrong(
    "experiments.transfer", lambda bits: experiments.transfer(replace(asked(), bits=bits)), bits={"a single one": (4,)}
)
wrong(
    "experiments.main",
    lambda name, value: experiments.main(["quickstart", "-p", name, value]),
    {"name": "bits", "value": "[2,4]"},
    {"name": "parameter", "value": "bits"},
    name={"unknown": "bitz", "empty": ""},
    value=LISTS,
)
wrong(
    "experiments.main",
    lambda budget: experiments.main(["quickstart", "--budget", budget]),
    budget={"zero": "0", "nan": "nan", "infinite": "inf"},
)
wrong(
    "suite.needed",
    lambda notebook: suite.needed([notebook], asked()),
    {},
    notebook={"a number": "01", "a file": "01_cifar10.ipynb", "None": None, "empty": ""},
)
ROWS_OF = {"rows": "00_quickstart"}
wrong(
    "gallery.number",
    gallery.number,
    {"folder": SMALL},
    source={
        "no file": {},
        "a text": "00_quickstart",
        "an unknown key": ROWS_OF | {"column": "top1"},
        "no such rows": ROWS_OF | {"where": {"bits": 9}},
        "no such column": ROWS_OF | {"of": "top5"},
        "no rows of the same seeds": ROWS_OF | {"where": {"seed": 0}, "minus": {"where": {"seed": 1}}},
    },
)
wrong("gallery.main", gallery.main, {}, root={"None": None, "a number": 3})
for name in ("budget", "jobs"):
    wrong(
        "suite.main",
        lambda value, name=name: suite.main(["00_quickstart", "--profile", "smoke", f"--{name}", value]),
        {},
        {"value": name},
        value={f"{name} of zero": "0", f"a negative {name}": "-1"},
    )
of_base = {"p": {"None": None, "a dict": {}}, "seed": NUMBERS | {"negative": -1}} | ONE_DATASET
wrong(
    "methods.base",
    methods.base,
    {"p": late(asked), "seed": 0, "dataset": "cifar10"},
    **of_base,
    epochs={"a fraction": 1.5, "negative": -1, "text": "3"},
)
for function in (methods.vit_base, methods.coreset_base):
    wrong(
        f"methods.{function.__name__}",
        function,
        small | {"seed": 0, "dataset": "cifar10"},
        seed=of_base["seed"],
        **ONE_DATASET,
    )
wrong(
    "methods.of_length",
    methods.of_length,
    {"p": late(asked), "seed": 0, "dataset": "cifar10", "epochs": 3},
    seed=of_base["seed"],
    **ONE_DATASET,
    epochs={"a fraction": 1.5, "negative": -1, "a billion": 10**9},
)
wrong(
    "methods.in_setting",
    methods.in_setting,
    {"base": late(run), "setting": late(lambda: asked().profile.vit)},
    base=RUNS,
    setting={"None": None, "a dict": {}},
)
wrong("methods.dedicated", methods.dedicated, base=RUNS)
wrong("methods.any_precision", methods.any_precision, base=RUNS)
wrong(
    "methods.ours",
    methods.ours,
    {"base": late(run)},
    base=RUNS,
    coreset=NAMES | {"None": 0},
    weight=NAMES,
    bits=BITS,
)
wrong("methods.bitwise_coreset", methods.bitwise_coreset, {"pruning_rate": 0.8}, pruning_rate=RATES, score=NAMES)
wrong(
    "methods.redrawn",
    methods.redrawn,
    {"base": late(run), "pruning_rate": 0.8},
    {"base": "run"},
    base=RUNS,
    pruning_rate=RATES,
    parts=COUNTS,
)
wrong("methods.in_parts", methods.in_parts, {"run": late(run), "parts": 2}, run=RUNS, parts=COUNTS | {"too many": 129})
wrong(
    "runs.run_all",
    runs.run_all,
    {"runs": late(lambda: [run()]), "results_dir": "results", "progress": False},
    runs={"none": [], "None": None, "a run": late(run), "numbers": [3], "a name": "table1"},
    results_dir=PATHS | {"a file": "FILE", "below a file": "FILE/a"},
    progress=FLAGS,
    processes=COUNTS | {"a billion": 10**9},
    budget={"zero": 0, "nan": NAN, "text": "60"},
)
wrong("runs.build", runs.build, {"run": late(run), "num_classes": 10}, num_classes=COUNTS)


def damaged(run: runs.Run) -> Path:
    """A folder of results in which the rows and the table of a run are no JSON."""
    for name in (f"{run.hash}.json", f"{run.hash}-table.json"):
        place = Path("damaged/runs", name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("{")
    return Path("damaged")


wrong("runs.trained", runs.trained, {"results_dir": "results"}, run=RUNS)
wrong("runs.build", runs.build, {"num_classes": 10}, run=RUNS)
unfinished = {"unfinished": late(lambda: [run()]), "None": None, "numbers": [3]}
wrong("runs.coreset_rows", runs.coreset_rows, {"results_dir": "results"}, runs=unfinished)
kept = {"damaged": late(lambda: damaged(run()))}
wrong("runs.run_all", runs.run_all, {"runs": late(lambda: [run()]), "progress": False}, results_dir=kept)
for function in (derived.derived, derived.followed):
    wrong(
        f"derived.{function.__name__}", function, {"run": late(run), "name": "table", "measure": len}, results_dir=kept
    )
    right = {"run": late(run), "results_dir": "r", "name": "t", "measure": len}
    wrong(f"derived.{function.__name__}", function, right, run=RUNS, measure={"None": None, "a name": "loss"})

# Tables and figures

OF_ROWS: dict[Callable[..., object], tuple[str, dict[str, Any]]] = {
    results.spread: ("01_cifar10", {"by": ["method", "bits"]}),
    results.seed_means: ("01_cifar10", {"by": ["method"]}),
    results.with_cost: ("01_cifar10", {"cost": "seconds"}),
    results.accuracy_table: ("01_cifar10", {}),
    results.training_cost: ("01_cifar10", {"columns": ["calibration", "seconds"]}),
    results.cost_table: ("01_cifar10", {"table": "table1"}),
    results.gap_table: ("01_cifar10", {}),
    results.comparison_table: ("05_coreset_comparison", {}),
    results.coreset_table: ("05_coresets", {}),
    results.curve_table: ("01_cifar10_curves", {}),
    results.equal_cost_table: ("01_cifar10_curves", {}),
    results.named: ("07_ablation_scoring_scheme", {}),
    results.option_table: ("07_ablation_scoring_scheme", {}),
    results.remedy_gaps: ("06_remedies", {}),
    results.remedy_table: ("06_remedies", {}),
    results.served: ("10_untrained_bitwidths", {}),
    results.untrained_table: ("10_untrained_bitwidths", {}),
    results.transfer_table: ("09_knowledge_transfer", {}),
    results.growth_table: ("11_training_cost", {}),
    results.deployment_table: ("12_deploy", {}),
    results.switching_table: ("12_switching", {}),
    plots.accuracy_by_bits: ("00_quickstart", {}),
    plots.accuracy_by_cost: ("02_cifar100", {}),
    plots.accuracy_by_pruning: ("05_coreset_comparison", {}),
    plots.accuracy_by_coreset: ("07_ablation_scoring_scheme", {}),
    plots.growth: ("11_training_cost", {}),
    plots.distributions: ("08_activation_distributions", {}),
    plots.mismatch: ("08_mismatch", {}),
    plots.gap_by_bits: ("06_remedies", {}),
    plots.angles_by_layer: ("09_angles", {}),
    plots.angles_by_epoch: ("09_angles", {}),
    plots.accuracy_by_size: ("12_deploy", {}),
    plots.latency: ("12_deploy", {}),
    plots.ranges: ("12_deploy", {"label": "runtime", "value": "latency", "title": "", "unit": "s"}),
}
FIRST = {results.coreset_table: "draws", plots.distributions: "histograms"}
COSTS = {"None": None, "unknown": "dollars", "a list": ["seconds"]}
for function, (source, right) in OF_ROWS.items():
    short = f"{function.__module__.removeprefix('emqlib.')}.{function.__name__}"
    wrong(short, function, right, **{FIRST.get(function, "rows"): rows(source)})
    whole = {"rows": late(lambda source=source: table(source))} | right
    if function.__module__ == plots.__name__ and function not in (
        plots.distributions,
        plots.accuracy_by_size,
        plots.latency,
        plots.ranges,
    ):
        wrong(short, function, whole, ax={"a number": 3, "text": "ax"})
    if function in (results.equal_cost_table, plots.accuracy_by_cost, plots.growth):
        wrong(short, function, whole, cost=COSTS)
wrong("results.spread", results.spread, {"rows": late(lambda: table("01_cifar10"))}, by={"None": None, "text": "bits"})
wrong("results.paper", results.paper, table={"None": None, "a number": 3, "null byte": "\0", "too long": "a" * 5000})
widths = {"None": None, "a number": 3, "zero": range(3), "text": ("a",), "ten": (10,)}
wrong("results.ratio_definitions", results.ratio_definitions, bits=widths, epochs=COUNTS)
saved = {"table": late(lambda: table("12_switching")), "path": Path("a")}
wrong(
    "results.save",
    results.save,
    saved,
    table=TABLES | {"no rows and columns": 3},
    path=PATHS,
    rows={"a path": "rows.csv"},
)
wrong("plots.axes", plots.axes, {"title": ""}, ax={"a number": 3, "text": "ax"})
wrong("plots.bit_color", plots.bit_color, bits=ONE_WIDTH)
wrong(
    "plots.save",
    plots.save,
    {"ax": late(lambda: plots.axes(None, "")), "path": Path("a")},
    ax={"None": None, "a number": 3},
    path=PATHS,
)
drawn = {"unknown": "nothing", "without rows": "00_quickstart"}
wrong("figures.draw", figures.draw, path=PATHS | drawn | {"of rows that are none": late(lambda: broken("01_cifar10"))})
wrong("figures.main", figures.main, folder=PATHS)


def broken(name: str) -> Path:
    """A figure whose CSV is empty."""
    Path(f"{name}.csv").touch()
    return Path(name)
