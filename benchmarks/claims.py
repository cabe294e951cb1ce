"""Whether each stage teaches what it is claimed to: in every seed, number format and processor.

    python -m benchmarks.claims                   runs what is missing, one run after the other
    python -m benchmarks.claims --side-by-side 2  two runs at a time, with a thread each
    python -m benchmarks.claims --show            prints what was recorded

A run is `dvc repro` of the shipped graph in a clone of the last commit, with another seed, dtype or
processor. Held-out problems are the same in all of them. Each run is added to
benchmarks/results/claims.json when it ends; one that was stopped goes on where it was, and one
that breaks a claim keeps its clone, to be looked at. What was recorded of other code or parameters
is run again, unless --keep is given.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, NamedTuple

import typer
import yaml

from benchmarks.claims_list import CLAIMS, Results, merged_equals_adapter, untouched
from minimind.report.results import problems_digest

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "claims.json"
WORKSPACE = ROOT / ".claims"
# What decides the results of a run, and so what a recorded run is a run of.
DECIDING = ("code", "params.yaml", "dvc.yaml")
# A processor without 16-bit instructions, as far as one that has them can be made to act like it.
LESSER = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MINIMIND_CPU_MATMULS": "float32",
}


class Plan(NamedTuple):
    """One run."""

    seed: int
    dtype: str
    lesser: bool = False

    @property
    def name(self) -> str:
        return f"{self.seed}-{self.dtype}" + ("-lesser" if self.lesser else "")


PLANS = [
    *(Plan(seed, "bfloat16") for seed in (1, 2, 3, 4, 5)),
    *(Plan(seed, "float32") for seed in (1, 2)),
    *(Plan(seed, "bfloat16", lesser=True) for seed in (1, 2)),
]


def main(
    side_by_side: Annotated[
        int, typer.Option(min=1, help="runs at a time; from 2 on of one thread each")
    ] = 1,
    show: Annotated[bool, typer.Option(help="print what was recorded, run nothing")] = False,
    keep: Annotated[bool, typer.Option(help="runs of other code or parameters count, too")] = False,
) -> None:
    """Run the chain again and again, and hold each run against the claims."""
    if not show:
        require_clean()
        version = deciding_version()
        missing = missing_plans(read_record(), version, keep)
        with ThreadPoolExecutor(side_by_side) as threads:
            list(threads.map(lambda plan: run_and_record(plan, version, side_by_side), missing))
    print_record(read_record())


def missing_plans(runs: list[dict[str, Any]], version: str, keep: bool) -> list[Plan]:
    """What is still to run. A run of other code or parameters says nothing of these, unless
    `keep` says that what has changed since does not change a model.
    """
    recorded = {run["name"] for run in runs if keep or run["version"] == version}
    return [plan for plan in PLANS if plan.name not in recorded]


def require_clean() -> None:
    changed = git("status", "--porcelain", "--", *DECIDING)
    if changed:
        sys.exit(f"claims: commit first, a run is of the last commit:\n{changed}")


def deciding_version(folder: Path = ROOT) -> str:
    """A short name for the content of all that decides results, in a clone's last commit."""
    trees = [git("rev-parse", f"HEAD:{path}", folder=folder) for path in DECIDING]
    return "-".join(tree[:8] for tree in trees)


def run_and_record(plan: Plan, version: str, side_by_side: int) -> None:
    project = prepare(plan, version)
    minutes = repro(project, plan, side_by_side)
    results = Results.read(project)
    claims = {claim.name: claim.margin(results) for claim in CLAIMS}
    held = {name: margin.holds for name, margin in claims.items()}
    held["lora: base weights untouched"] = untouched(project)
    held["lora: merged equals adapter"] = merged_equals_adapter(project)
    run = {
        "name": plan.name,
        "seed": plan.seed,
        "dtype": plan.dtype,
        "isa": simulated_isa() if plan.lesser else isa(),
        "minutes": round(minutes, 1),
        "side_by_side": side_by_side,
        "commit": git("rev-parse", "HEAD", folder=project),
        "version": version,
        "processor": processor(),
        "problems": problems_digest(results.predictions["pretrain"]),
        "claims": held,
        "distances": {name: round(margin.distance, 4) for name, margin in claims.items()},
        "sigmas": {
            name: round(margin.sigmas, 1) for name, margin in claims.items() if margin.sigmas
        },
        "metrics": results.metrics,
    }
    add_to_record(run)
    if broken := [name for name, holds in held.items() if not holds]:
        print(f"{plan.name} breaks {', '.join(broken)}; look in {project}", flush=True)
    else:
        print(f"{plan.name} keeps all {len(held)} claims", flush=True)
        shutil.rmtree(project)


def prepare(plan: Plan, version: str) -> Path:
    """The clone that a run is made in; one of an earlier try is gone on with."""
    project = WORKSPACE / f"{plan.name}-{version}"
    if project.exists():
        return project
    WORKSPACE.mkdir(exist_ok=True)
    begun = project.with_suffix(".begun")
    shutil.rmtree(begun, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(begun)], check=True)
    if deciding_version(begun) != version:
        sys.exit("claims: the last commit has other code or parameters than when this began.")
    params = begun / "params.yaml"
    values = yaml.safe_load(params.read_text(encoding="utf-8"))
    values |= {"seed": plan.seed, "dtype": plan.dtype}
    params.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    begun.rename(project)
    return project


def repro(project: Path, plan: Plan, side_by_side: int) -> float:
    """Run the whole graph; returns the minutes that all tries together took."""
    log, clock = project / "claims.log", project / "claims.minutes"
    before = float(clock.read_text()) if clock.exists() else 0.0
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **(LESSER if plan.lesser else {}),
        **({"MINIMIND_THREADS": "1", "OMP_NUM_THREADS": "1"} if side_by_side > 1 else {}),
    }
    started = time.monotonic()
    try:
        with log.open("ab") as output:
            subprocess.run(
                [sys.executable, "-m", "dvc", "repro"],
                cwd=project,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=True,
            )
    except subprocess.CalledProcessError:
        sys.exit(f"claims: `dvc repro` failed in {project}: see {log}")
    finally:
        minutes = before + (time.monotonic() - started) / 60
        clock.write_text(str(minutes))
    return minutes


_recording = Lock()


def add_to_record(run: dict[str, Any]) -> None:
    with _recording:
        runs = [old for old in read_record() if old["name"] != run["name"]]
        order = {plan.name: place for place, plan in enumerate(PLANS)}
        runs = sorted([*runs, run], key=lambda r: order.get(r["name"], len(order)))
        partial = RECORD.with_suffix(".partial")
        partial.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
        partial.replace(RECORD)


def read_record() -> list[dict[str, Any]]:
    if not RECORD.exists():
        return []
    try:
        runs = json.loads(RECORD.read_text(encoding="utf-8"))["runs"]
        needed = {"name": str, "version": str, "claims": dict, "sigmas": dict}
        if all(type(run[key]) is kind for run in runs for key, kind in needed.items()):
            return list(runs)
    except (ValueError, KeyError, TypeError):
        pass
    sys.exit(f"claims: {RECORD} is no record of runs; bring it back with git checkout.")


def print_record(runs: list[dict[str, Any]]) -> None:
    """Each claim: in how many runs it held, and how far inside its limit the closest was."""
    if not runs:
        print(f"{RECORD} has no runs; without --show they are made.")
    for claim in runs[0]["claims"] if runs else []:
        held = [run["claims"].get(claim, False) for run in runs]
        sigmas = [run["sigmas"][claim] for run in runs if run["sigmas"].get(claim) is not None]
        closest = f", closest {min(sigmas):.1f} standard errors of the problems" if sigmas else ""
        print(f"{sum(held)} of {len(held)}  {claim}{closest}")


def isa() -> str:
    """The instruction set that PyTorch's own kernels use here."""
    return torch_says("torch.backends.cpu.get_cpu_capability()", {})


def simulated_isa() -> str:
    return f"{torch_says('torch.backends.cpu.get_cpu_capability()', LESSER)}, float32 matmuls"


def torch_says(expression: str, environment: dict[str, str]) -> str:
    """Asked in another process: these variables count when PyTorch is loaded."""
    command = [sys.executable, "-c", f"import torch; print({expression})"]
    return subprocess.run(
        command, env=os.environ | environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git(*arguments: str, folder: Path = ROOT) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


if __name__ == "__main__":
    typer.run(main)
