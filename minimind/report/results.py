"""What the stages have written, as the report reads it. Starts fast: no torch."""

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from minimind.errors import UserError
from minimind.lineage.dvc_files import value_at
from minimind.metrics import Number
from minimind.params import read_params

Record = dict[str, Any]
History = list[dict[str, float]]  # rows, of the values that each has
PREDICTION_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "problem": (str,),
    "level": (int, NoneType),
    "task": (str, NoneType),
    "prompt": (str,),
    "output": (str,),
    "answer": (str,),
    "correct": (bool,),
    "choice_correct": (bool, NoneType),
}
ENCODING_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(["rows", "samples", "truncated_rows", "skipped_rows", "dropped_rows"], (int,)),
    **dict.fromkeys(["duplicate_rows", "eval_overlap_rows"], (int,)),
    "trained_share": (int, float),
    **dict.fromkeys(["formats", "left_out", "first_left_out"], (dict,)),
}
WATCHED_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "prompt": (str,),
    "completion": (str,),
    "reward": (int, float),
}
RUN_TYPES = {"seed": (int,), "problems": (str,), "dtype": (str,), "isa": (str,), "metrics": (dict,)}


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one checkpoint."""

    name: str
    metrics: dict[str, Number]
    predictions: list[Record]  # in the order of the problems


@dataclass(frozen=True)
class RecordedRun:
    """A run of the whole graph that was recorded."""

    seed: int
    dtype: str
    isa: str  # instruction set, which decides the last bits
    problems: str  # a digest of what was asked
    training: dict[str, dict[str, Number]]  # metrics by stage
    evaluation: dict[str, dict[str, Number]]  # metrics by checkpoint


@dataclass(frozen=True)
class Results:
    """What the stages have written of checkpoints, in the order of the graph."""

    evaluations: list[Evaluation]
    training: dict[str, dict[str, Number]]  # by stage, as histories
    histories: dict[str, History]
    starts: dict[str, str]  # of a checkpoint, the name of the one that it was trained from
    runs: list[RecordedRun]  # of other seeds
    watched: dict[str, list[Record]] = field(default_factory=dict)  # what reinforcement wrote

    @classmethod
    def read(
        cls,
        names: Sequence[str],
        evaluations: Path,
        predictions: Path,
        training: Path,
        histories: Path,
        record: Path | None,
        params: Path,
    ) -> "Results":
        """From folders of <name>.json, .jsonl, .json and .csv.

        Raises:
            UserError: a file is missing or broken.
        """
        values = read_params(params)
        starts = {name: value_at(values, f"{name}.init") for name in names}
        files = [evaluations / f"{name}.json" for name in names]
        evaluated = read_evaluations(files, predictions)
        return cls(
            evaluated,
            read_metrics([training / f"{name}.json" for name in names]),
            {name: read_history(histories / f"{name}.csv") for name in names},
            {name: Path(start).name for name, start in starts.items() if isinstance(start, str)},
            of_same_problems(read_record(record), evaluated) if record else [],
            read_watched(histories, names),
        )


def read_evaluations(metrics: Sequence[Path], predictions: Path) -> list[Evaluation]:
    """Checkpoints' {name: metrics}, and their predictions from <folder>/<name>.jsonl.

    Raises:
        UserError: a file is missing or not what `stages.evaluate` writes, or a name comes twice.
    """
    evaluations: list[Evaluation] = []
    for path in metrics:
        contents = _read_json(path)
        if len(contents) != 1 or not all(isinstance(value, dict) for value in contents.values()):
            raise UserError(
                f"{path} has the keys {', '.join(contents) or 'none'}; it must hold the metrics "
                "of one checkpoint under its name: run its evaluate stage."
            )
        ((name, values),) = contents.items()
        if any(name == evaluation.name for evaluation in evaluations):
            raise UserError(f"{path}: {name} comes twice; name each checkpoint once.")
        _require_numbers(path, values)
        file = predictions / f"{name}.jsonl"
        rows = parse_predictions(_read(file), file)
        evaluations.append(Evaluation(name, values, rows))
    return evaluations


def parse_predictions(text: str, where: Path | str) -> list[Record]:
    """The rows of a file of predictions.

    Raises:
        UserError: a line is none; `where` and its number say which.
    """
    todo = "it must be a prediction: run the evaluate stage"
    return _rows(text, where, PREDICTION_TYPES, todo)


def _rows(
    text: str, where: Path | str, types: Mapping[str, tuple[type, ...]], todo: str
) -> list[Record]:
    rows = []
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        row = _parse(line, f"{where}:{number}")
        _require_types(row, types, f"{where}:{number}", todo)
        rows.append(row)
    return rows


def read_metrics(paths: Sequence[Path]) -> dict[str, dict[str, Number]]:
    """Metrics of stages by the stage's name; names inside a stage are joined by dots.

    Raises:
        UserError: a file is missing or broken.
    """
    stages: dict[str, dict[str, Number]] = {}
    for path in paths:
        for stage, values in _read_json(path).items():
            leaves = flat(values)
            _require_numbers(path, leaves)
            stages.setdefault(stage, {}).update(leaves)
    return stages


def read_encodings(paths: Sequence[Path]) -> dict[str, Record]:
    """What stage encode says of each data set, by its name.

    Raises:
        UserError: a file is missing or not what the stage writes.
    """
    found: dict[str, Record] = {}
    for path in paths:
        encode = _read_json(path).get("encode")
        for name, counts in encode.items() if isinstance(encode, dict) else ():
            none: Record = {"left_out": {}, "first_left_out": {}}
            counts = none | counts if isinstance(counts, dict) else {}
            _require_types(counts, ENCODING_TYPES, f"{path}: {name}", "run its encode stage again")
            found[name] = counts
    return found


def read_history(path: Path) -> History:
    """The rows of a training history.

    Raises:
        UserError: the file is missing, or a row is none.
    """
    reader, rows = csv.DictReader(_read(path).splitlines()), []
    try:
        for row in reader:
            values = {name: float(value) for name, value in row.items() if value}
            if not all(map(math.isfinite, [values["step"], *values.values()])):
                raise ValueError
            rows.append(values)
    except (csv.Error, KeyError, TypeError, ValueError):
        where = f"{path}:{reader.line_num}"
        raise UserError(f"{where}: no row of a history; run the stage that wrote it.") from None
    return rows


def read_watched(folder: Path, names: Sequence[str]) -> dict[str, list[Record]]:
    """What stages said to the same prompts as they trained, of those that have written it.

    Raises:
        UserError: a line of a file is none of a stage's.
    """
    found = {}
    for name in names:
        if (file := folder / f"{name}.jsonl").is_file():
            found[name] = _rows(_read(file), file, WATCHED_TYPES, "run its stage again")
    return found


def problems_digest(predictions: Sequence[Record]) -> str:
    """Of the problems that a checkpoint was asked, in whichever words."""
    asked = [(row["id"], row["answer"]) for row in predictions]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def of_same_problems(
    runs: Sequence[RecordedRun], evaluations: Sequence[Evaluation]
) -> list[RecordedRun]:
    """Recorded runs that were asked what these were: of other numbers they say nothing."""
    asked = {problems_digest(evaluation.predictions) for evaluation in evaluations}
    return [run for run in runs if run.problems in asked]


def read_record(path: Path) -> list[RecordedRun]:
    """The runs that benchmarks/claims.py has recorded; none if there is no record.

    Raises:
        UserError: it is broken, or a run in it lacks what a table needs.
    """
    if not path.exists():
        return []
    runs = _read_json(path).get("runs")
    if not isinstance(runs, list):
        raise UserError(f"{path}: runs is {runs!r}; it must be a list of runs.")
    return [_recorded_run(run, f"{path}: run {number}") for number, run in enumerate(runs, 1)]


def _recorded_run(run: Any, where: str) -> RecordedRun:
    run = run if isinstance(run, dict) else {}
    _require_types(run, RUN_TYPES, where, "record the run again")
    parts: dict[str, dict[str, dict[str, Number]]] = {}
    for part in ("training", "evaluation"):
        metrics = run["metrics"].get(part)
        if not isinstance(metrics, dict) or not all(isinstance(v, dict) for v in metrics.values()):
            raise UserError(f"{where}: metrics.{part} is {metrics!r}; record the run again.")
        parts[part] = {name: flat(values) for name, values in metrics.items()}
        for name, values in parts[part].items():
            _require_numbers(f"{where}: {name}", values)
    return RecordedRun(run["seed"], run["dtype"], run["isa"], run["problems"], **parts)


def _require_types(
    row: Record, types: Mapping[str, tuple[type, ...]], where: str, todo: str
) -> None:
    for key, allowed in types.items():
        if type(row.get(key, ...)) not in allowed:
            found = repr(row[key]) if key in row else "missing"
            raise UserError(f"{where}: {key} is {found}; {todo}.")


def _require_numbers(where: Path | str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if type(value) not in (int, float):
            raise UserError(
                f"{where}: {name} is {value!r}; it must be a number: run what wrote it again."
            )


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """What stands in mappings inside each other, by names joined by dots."""
    if not isinstance(values, dict):
        return {prefix: values}
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= flat(value, f"{prefix}.{key}" if prefix else key)
    return leaves


def _read_json(path: Path) -> Record:
    return _parse(_read(path), str(path))


def _parse(text: str, where: str) -> Record:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: broken JSON: {error}; run the stage that wrote it.") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object; run the stage that wrote it.")
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run the stage that writes it.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; run the stage that wrote it.") from None
