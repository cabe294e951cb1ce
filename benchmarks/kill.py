"""Kill every kind of stage at random moments, run it again, compare with a run left in peace.

    python -m benchmarks.kill                 # 400 kills of commands, 60 under DVC: 20 minutes
    python -m benchmarks.kill --kills 20 --dvc-kills 0 --stages sft,grpo --seed 7

Kills are drawn by phase (start, step, state write, final save, DVC's commit) and by means
(any signal that ends a process, or a full disk); each is counted by the phase that it really hit,
which is read from what lies on disk. What a run draws depends on the seed, the stage and how many
runs it had before. A run is killed several times before it may end. Its outputs must
then have the bytes of an uninterrupted run, and each run must have gone on from the newest
checkpoint that the one before it had completed; all else is a loss.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.under_dvc import (
    become_reaper,
    kill_under_dvc,
    kill_under_experiments,
    note_resumed,
    record,
)
from benchmarks.victims import (
    NOTHING_TO_RESUME,
    SIGNALS,
    Stage,
    Tally,
    build_project,
    digests,
    newest_checkpoint,
    phase_on_disk,
    start,
)
from benchmarks.warm import StageProcess

# Weights in the draw; under DVC there is its commit, too.
PHASES = {"start": 3, "step": 3, "state write": 4, "final save": 2}
MEANS = dict.fromkeys(SIGNALS, 2) | {"SIGKILL": 5, "full disk": 2}  # weights in the draw
MAX_KILLS_PER_RUN = 6
RUN_AGAIN = "same command again"  # said by whatever stops in good order


def draw_moment(
    project: Path, stage: Stage, phase: str, phase_now: Callable[[], str], rng: random.Random
) -> Callable[[], bool]:
    """When to kill: a test of what lies on disk, and a while after it has become true."""
    before = newest_checkpoint(project) or 0
    wanted = before + rng.randint(1, 3)
    delay = {"start": 0.5 * stage.seconds, "step": 0.01, "state write": 0.006, "final save": 0.02}
    wait = rng.uniform(0, delay[phase] * rng.random())

    def has_come() -> bool:
        if phase == "start":
            return True
        if phase == "step":
            return (newest_checkpoint(project) or 0) >= wanted or phase_now() == "final save"
        if phase == "state write":
            return phase_now() in ("state write", "final save")
        return phase_now() == "final save"

    since: list[float] = []

    def is_now() -> bool:
        if not since and has_come():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= wait

    return is_now


def kill_commands(
    project: Path, stage: Stage, num_kills: int, rng: random.Random, tally: Tally
) -> None:
    """Kill a stage's command over and over in one run, then let it end."""
    tally.runs += 1
    shutil.rmtree(project / ".resume", ignore_errors=True)
    under_dvc = rng.random() < 0.8
    history: list[str] = []
    for _ in range(num_kills):
        before = newest_checkpoint(project)
        means = rng.choices(list(MEANS), list(MEANS.values()))[0]
        planned = rng.choices(list(PHASES), list(PHASES.values()))[0]
        full = rng.randint(0, 40) if means == "full disk" else None
        process = start(project, stage, full, under_dvc)

        def phase_now(process: StageProcess = process) -> str:
            return phase_on_disk(project, stage, process.started)

        moment = draw_moment(project, stage, planned, phase_now, rng)
        hit = ""
        while process.is_running():
            if full is None and not hit and moment():
                hit = phase_now()
                process.send(getattr(signal, means))
            time.sleep(0.0005)
        code, printed = process.finish(), process.printed()
        if code == 0:
            continue  # it was faster
        if means in ("SIGKILL", "full disk"):
            hit = phase_now()
        history.append(f"{means} in {hit}, exit {code}")
        tally.kills += 1
        tally.means[means] += 1
        tally.phases[hit] += 1
        if means != "SIGKILL":
            check_farewell(stage, means, hit, code, printed, tally)
        note_resumed(stage, before, printed, False, tally)
    before = newest_checkpoint(project)
    process = start(project, stage, under_dvc=under_dvc)
    code, printed = process.finish(), process.printed()
    note_resumed(stage, before, printed, True, tally)
    if code == 0 and digests(project, stage) == stage.whole:
        tally.equal += 1
    else:
        tally.lose(f"{stage.name} ended with {code} and other bytes after {history}: {printed}")


def check_farewell(
    stage: Stage, means: str, hit: str, code: int, printed: str, tally: Tally
) -> None:
    """A stage that can still speak says in one line how to go on, and does not exit with 0."""
    import_time = hit == "start"  # Python's own answer to the signal
    in_order = RUN_AGAIN in printed or "run the same command" in printed
    if code == 0 or not (in_order or import_time or stage.kind in NOTHING_TO_RESUME):
        tally.lose(f"{stage.name}: {means} in {hit} gave exit {code} and: {printed}")
    if "Traceback" in printed and not ("KeyboardInterrupt" in printed and import_time):
        tally.lose(f"{stage.name}: {means} in {hit} gave a traceback: {printed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=400, help="of commands")
    parser.add_argument("--dvc-kills", type=int, default=60, help="of `dvc repro` and its stages")
    parser.add_argument("--experiments", action="store_true", help="`--temp` and the queue too")
    parser.add_argument("--stages", default="", help="kinds, with commas; all if left out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON of what happened")
    parser.add_argument("--add-to", type=Path, help="such a JSON: its numbers are added")
    arguments = parser.parse_args()
    before = json.loads(arguments.add_to.read_text("utf-8")) if arguments.add_to else {}
    print(f"seed {arguments.seed}", flush=True)
    for name in SIGNALS[1:]:  # nohup, and shells in the background, have children ignore some
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    started = time.monotonic()
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder).resolve() / "tiny project"
        kinds = [kind for kind in arguments.stages.split(",") if kind]
        stages = build_project(project, kinds)
        chosen = [s for s in stages.values() if not kinds or s.kind in kinds]
        tallies = {stage.kind: Tally() for stage in chosen}
        print(f"built in {time.monotonic() - started:.0f} s", flush=True)

        def total() -> int:
            return sum(tally.kills for tally in tallies.values())

        def next_run() -> tuple[Stage, random.Random]:
            """A stage that had the fewest runs, and what all of its next one is drawn from."""
            runs = {stage.name: tallies[stage.kind].runs for stage in chosen}
            draws = {
                name: random.Random(f"{arguments.seed} {name} {n}") for name, n in runs.items()
            }
            stage = min(chosen, key=lambda stage: (runs[stage.name], draws[stage.name].random()))
            return stage, draws[stage.name]

        def report(stage: Stage) -> None:
            print(f"{time.monotonic() - started:.0f} s: {total()} kills, {stage.name}", flush=True)
            if arguments.output:  # now and not at the end: someone may kill us, too
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(added(summarize(tallies), before), indent=2) + "\n"
                arguments.output.write_text(text, encoding="utf-8")

        while total() < arguments.kills:
            stage, rng = next_run()
            wanted = min(rng.randint(3, MAX_KILLS_PER_RUN), arguments.kills - total())
            kill_commands(project, stage, wanted, rng, tallies[stage.kind])
            report(stage)
        shutil.rmtree(project / ".resume", ignore_errors=True)
        enough = total() + arguments.dvc_kills
        if arguments.dvc_kills or arguments.experiments:
            become_reaper()
            record(project, stages)
        while total() < enough:
            stage, rng = next_run()
            wanted = min(rng.randint(1, 4), enough - total())
            kill_under_dvc(project, stage, wanted, rng, tallies[stage.kind])
            report(stage)
        if arguments.experiments:
            kill_under_experiments(project, stages, tallies["sft"])
            report(stages["sft"])
    results = added(summarize(tallies), before)
    print(json.dumps(results, indent=2))
    sys.exit(results["losses"] > 0)


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The sums of two summaries, or of parts of them."""
    both = dict(other)
    for key, value in one.items():
        if isinstance(value, dict):
            both[key] = added(value, other.get(key, {}))
        else:
            both[key] = value + other.get(key, 0)
    return both


def summarize(tallies: dict[str, Tally]) -> dict[str, Any]:
    numbers = ("kills", "resumes", "equal", "losses")

    def counted(name: str) -> dict[str, int]:
        sums = sum((getattr(tally, name) for tally in tallies.values()), Counter[str]())
        return dict(sorted(sums.items()))

    signals = Counter[str]()
    for means, count in counted("means").items():
        if means != "full disk":
            signals[means.split()[-1]] += count
    return {
        **{name: sum(getattr(tally, name) for tally in tallies.values()) for name in numbers},
        "signals": dict(sorted(signals.items())),
        "phases": counted("phases"),
        "means": counted("means"),
        "stages": {
            kind: {name: getattr(tally, name) for name in numbers}
            | {"phases": dict(sorted(tally.phases.items()))}
            for kind, tally in tallies.items()
        },
    }


if __name__ == "__main__":
    main()
