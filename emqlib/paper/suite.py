"""All results by one command: trains what the notebooks need, side by side, and then executes the notebooks.

`python -m emqlib.paper.suite [NOTEBOOK ...]`, or `make results`. A finished run is never run twice, so that a
second call takes minutes, and one that was stopped goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from multiprocessing import get_context, get_start_method, set_start_method
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from .. import checks
from ..files import home, write_text
from ..train.checkpoint import Deadline, OutOfTime
from ..train.distributed import Ranks
from . import experiments as ex
from .profiles import PROFILES, Parameters, parameters
from .runs import Run, data_of, rows_file, run_all

# What each notebook trains, in the order in which results are wanted.
NOTEBOOKS: dict[str, tuple[Callable[[Parameters], list[Run]], ...]] = {
    "00_quickstart": (ex.quickstart,),
    "01_cifar10": (ex.table1, ex.curves),
    "02_cifar100_tinyimagenet": (ex.table2,),
    "03_imagenet": (ex.imagenet,),
    "04_vit": (ex.vit,),
    "05_coreset_comparison": (ex.comparison,),
    "06_ablation_bias_correction": (ex.bias_correction, ex.uncalibrated),
    "07_ablation_scoring_scheme": (ex.scoring_ablation, ex.equal_epochs),
    "08_activation_distributions": (ex.corrected_or_not,),
    "09_knowledge_transfer": (ex.transfer,),
    "10_untrained_bitwidths": (ex.untrained,),
    "11_training_cost": (ex.growth,),
    "12_deploy": (ex.deployed,),
}
A_NOTEBOOK = 200_000  # sample passes that take about as long as a notebook whose runs are finished


def needed(names: Iterable[str], p: Parameters) -> list[Run]:
    """The runs of the notebooks `names`, each once. ValueError: a name that is not in NOTEBOOKS."""
    chosen = [checks.choice("notebook", name, NOTEBOOKS) for name in names]
    return list(dict.fromkeys(run for name in chosen for table in NOTEBOOKS[name] for run in table(p)))


def _train_all(runs: list[Run], p: Parameters, jobs: int, deadline: Deadline, bar: tqdm) -> None:
    """Finish `runs` in so many processes of one thread each, which share the work. OutOfTime: `deadline` came first.

    bar: moves by sample passes. ChildProcessError: one failed, and the others were stopped.
    """
    costs = {rows_file(run, p.results_dir): _passes(run) for run in runs}
    left = [run for run in runs if not rows_file(run, p.results_dir).exists()]
    seconds = None if deadline.end is None else max(deadline.end - time.monotonic(), 0.001)
    with _one_thread(), _ended() as workers:
        for _ in range(min(checks.integer("jobs", jobs, 1, 1024), len(left))):
            task = (left, p.results_dir, seconds, get_start_method())
            workers.append(get_context("spawn").Process(target=_work, args=task))
            workers[-1].start()
        alive = True
        while alive:
            alive = any(worker.is_alive() for worker in workers)  # before their status is looked at
            _show(bar, costs)
            if any(worker.exitcode not in (None, 0, ex.CALL_AGAIN) for worker in workers):
                raise ChildProcessError("a run failed: its error stands above")
            time.sleep(alive)
    if any(worker.exitcode == ex.CALL_AGAIN for worker in workers):
        raise OutOfTime("")


def _work(runs: list[Run], results_dir: Path, budget: float | None, method: str) -> None:
    set_start_method(method, force=True)  # else what decodes images would be spawned too, which takes seconds each time
    try:
        run_all(runs, results_dir, progress=False, budget=budget)
    except OutOfTime:
        sys.exit(ex.CALL_AGAIN)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that are started within the block compute with one thread: rows depend on how many there are."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@contextmanager
def _ended() -> Iterator[list[BaseProcess]]:
    """A list of processes, none of which outlives the block."""
    workers: list[BaseProcess] = []
    try:
        yield workers
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _show(bar: tqdm, costs: dict[Path, float]) -> None:
    finished = [cost for path, cost in costs.items() if path.exists()]
    bar.set_postfix_str(f"{len(finished)} of {len(costs)} runs", refresh=False)
    bar.update(round(sum(finished)) - bar.n)


def _passes(run: Run) -> float:
    """Sample passes of `run` by the formulas of `results.growth_table`; all images are taken for CIFAR-10's 50,000."""
    pruned, epochs = run.config.coreset, run.config.epochs
    if pruned is not None and pruned.pruning_rate:
        scoring = pruned.warmup
        epochs = scoring * pruned.candidates + (1 - pruned.pruning_rate) * (epochs - scoring)
    return len(run.spec.bits) * (run.subset[0] or 50_000) * epochs


def _execute_all(names: list[str], p: Parameters, jobs: int, deadline: Deadline, bar: tqdm) -> None:
    """Execute notebooks, so many at once: in place in `small`, whose results are committed, else beside the results.

    OutOfTime: `deadline` came before some were begun; what is begun is finished. ChildProcessError: one failed.
    """

    def execute(name: str) -> str:
        if deadline.passed(Ranks()):
            raise OutOfTime("")
        _execute(name, p)
        return name

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in as_completed([pool.submit(execute, name) for name in names]):
                bar.set_postfix_str(f"{done.result()} executed", refresh=False)
                bar.update(A_NOTEBOOK)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those that are under way are waited for all the same
            raise


def _execute(name: str, p: Parameters) -> None:
    """A notebook that had to measure is executed once more: what is kept is without progress bars."""
    source = home() / "notebooks" / f"{name}.ipynb"
    target = source if p.profile.name == "small" else p.output(name).with_suffix(".ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--ExecutePreprocessor.timeout=-1"]
    command += ["--ExecutePreprocessor.kernel_name=python3", "--ExecutePreprocessor.record_timing=False"]
    environment = {**os.environ, "EMQ_PROFILE": p.profile.name, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            finished = subprocess.run(
                [*command, "--output-dir", folder, str(source)], env=environment, capture_output=True, text=True
            )
            if finished.returncode:
                raise ChildProcessError(f"{source.name} failed\n{finished.stderr[-3000:]}")
            text = Path(folder, source.name).read_text()
            outputs = [out for cell in json.loads(text)["cells"] for out in cell.get("outputs", [])]
            if not any(out["output_type"] == "stream" for out in outputs):
                break
        write_text(target, text)


def main(arguments: list[str]) -> int:
    """Make the results of the notebooks that `arguments` name, all without any; returns the exit status.

    CALL_AGAIN where the budget is spent or Ctrl-C came, 1 where a run or a notebook failed. SystemExit: a wrong
    argument. ValueError: a wrong notebook, or a budget or number of jobs that is not > 0.
    """
    asked = _parser().parse_args(arguments)
    deadline, p = Deadline(asked.budget), parameters(profile=asked.profile)
    names = [name for name in asked.notebooks or NOTEBOOKS if name != "03_imagenet" or _has_imagenet(p)]
    runs = needed(names, p)
    total = round(sum(map(_passes, runs))) + A_NOTEBOOK * len(names)
    shown = {"desc": f"results, {p.profile.name}", "unit": "pass", "unit_scale": True, "smoothing": 0, "mininterval": 1}
    try:
        with tqdm(total=total, **shown) as bar:
            _train_all(runs, p, asked.jobs, deadline, bar)
            _execute_all(names, p, asked.jobs, deadline, bar)
    except (OutOfTime, KeyboardInterrupt):
        print("stopped: the same call goes on from here")
        return ex.CALL_AGAIN
    except ChildProcessError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(runs)} runs, {len(names)} notebooks: {p.results_dir}")
    return 0


def _has_imagenet(p: Parameters) -> bool:
    with suppress(FileNotFoundError):
        if p.profile.name != "smoke":
            data_of(ex.imagenet(p)[0], {})
        return True
    print("03_imagenet: not run, there is no ImageNet here (see GUIDE.md)")
    return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m emqlib.paper.suite")
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="such as 01_cifar10; all without any")
    parser.add_argument("--profile", default="auto", choices=["auto", *PROFILES])
    parser.add_argument("--jobs", type=int, default=2, help="runs, and notebooks, side by side; 2 by default")
    text = f"seconds after which to stop; the same call goes on. Exit status {ex.CALL_AGAIN} where work is left"
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
