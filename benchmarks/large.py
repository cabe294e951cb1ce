"""Data larger than memory: how fast it is encoded, and what memory that and training take.

    python -m benchmarks.large --gigabytes 0.1
    python -m benchmarks.large --gigabytes 5 --folder /mnt/disk    # some 15 GB there, meanwhile

Writes a JSONL file of pseudo-text for each size, trains a tokenizer on a part of it, and then, each
in a process of its own: encodes it with stage encode; puts the same text, if it is no more than
1 GB, in the same batches and with the same threads, through `tokenizers` alone; and trains some
steps with stage pretrain.

Memory is anonymous memory (RssAnon and VmSwap of /proc/<pid>/status, so Linux only), sampled: what
the kernel cannot take back. Pages of files that are read or mapped come and go with what is free.
Writes benchmarks/results/large.json.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from benchmarks.pseudo_text import write_chats, write_texts
from benchmarks.table import save
from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.encode import row_batches
from minimind.datasets.formats import parse_chat, parse_text, read_rows_and_bad_rows
from minimind.datasets.row_checks import texts

ROOT = Path(__file__).parents[1]
GB = 10**9  # as disks count
VOCAB_SIZE = 6400  # of MiniMind's tokenizer
TOKENIZER_BYTES = 4 * 10**6  # of text that it is trained on
SAMPLE_SECONDS = 0.01
MOST_ALONE = 1.0  # GB; what it shows does not depend on the size, and it takes as long again
SPACE = 3  # on disk, in sizes of the text: it, its arrays, and room
WRITERS = {"text": write_texts, "chat": write_chats}
PARSERS = {"text": parse_text, "chat": parse_chat}


@dataclass
class Usage:
    """What a process took."""

    seconds: float
    cpu_seconds: float
    anonymous_mib: float  # at its peak
    resident_mib: float  # at its peak, pages of files included
    load: float  # of the machine in the last minute, by all processes
    printed: str


def main() -> None:
    arguments = _parse()
    rows = []
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            free = shutil.disk_usage(folder).free
            if free < SPACE * gigabytes * GB:
                sys.exit(f"{gigabytes} GB of text need {SPACE * gigabytes:.1f} GB in {folder}.")
            rows.append(measure(Path(folder), gigabytes, arguments.format, arguments.steps))
        save(arguments.output, rows, _setting(arguments))  # what there is, so far
    print("\n" + as_text(rows))


def measure(folder: Path, gigabytes: float, data_format: str, num_steps: int) -> dict[str, Any]:
    """One row of the results."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["tokenizer"]["vocab_size"] = VOCAB_SIZE
    params["pretrain"] |= {"max_steps": num_steps, "validation_share": 0.0, "init": "tokenizer"}
    name = {"text": "pretrain", "chat": "sft"}[data_format]
    nothing = folder / "nothing.jsonl"
    nothing.write_text('{"text": "what no row asks"}\n', encoding="utf-8")
    params["data"] |= {"tokenizer": "sample.jsonl", name: "data.jsonl"}
    params["data"] |= {"problems": nothing.name, "text": nothing.name}
    params["data"]["synonyms"] = str(ROOT / params["data"]["synonyms"])
    params["encode"]["tokenizer"] = "tokenizer"
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    source, sample = folder / "data.jsonl", folder / "sample.jsonl"
    WRITERS[data_format](sample, TOKENIZER_BYTES)
    num_rows = WRITERS[data_format](source, int(gigabytes * GB))
    _say(f"{source.stat().st_size / 1e6:,.0f} MB in {num_rows:,} rows")
    tokenizer = ["--output=tokenizer", "--metrics=tokenizer.json"]
    encode = [f"--format={data_format}", f"--name={name}", "--output=encoded"]
    encode += ["--metrics=encode.json"]
    pretrain = ["--text=encoded", "--output=model"]
    pretrain += ["--metrics=pretrain.json", "--history=history.csv"]
    alone = ["--alone", source.name, "--format", data_format]

    _run(folder, "stages.tokenizer", tokenizer)
    encode_usage = _run(folder, "stages.encode", encode)
    train_usage = _run(folder, "stages.pretrain", pretrain)
    (counts,) = json.loads((folder / "encode.json").read_text())["encode"].values()
    megabytes = source.stat().st_size / 1e6
    row: dict[str, Any] = {
        "gigabytes": gigabytes,
        "format": data_format,
        "rows": num_rows,
        "tokens": counts["tokens"],
        "arrays_mb": round(sum(f.stat().st_size for f in (folder / "encoded").iterdir()) / 1e6),
        "encode": _rounded(encode_usage) | {"mb_per_second": _rate(megabytes, encode_usage)},
        "train": _rounded(train_usage) | {"steps": num_steps},
    }
    if gigabytes > MOST_ALONE:
        return row
    alone_usage = _run(folder, "benchmarks.large", alone)
    only = json.loads(alone_usage.printed)
    return row | {
        # Without starting, and without reading rows.
        "tokenizers_alone": {
            "mb_per_second": round(megabytes / only["seconds"], 2),
            "seconds": round(only["seconds"], 2),
            "cpu_seconds": round(only["cpu_seconds"], 2),
            "load": round(alone_usage.load, 1),
        },
        "share_of_alone": round(only["seconds"] / encode_usage.seconds, 3),
        "cpu_share_of_alone": round(only["cpu_seconds"] / encode_usage.cpu_seconds, 3),
    }


def encode_alone(source: Path, data_format: str, tokenizer: Path) -> None:
    """Print how long `tokenizers` takes for the texts of a file; called in a fresh process."""
    whole = ChatTokenizer.load(tokenizer)._tokenizer
    seconds = cpu_seconds = 0.0
    for batch in row_batches(read_rows_and_bad_rows(source, PARSERS[data_format]), 1):
        pieces = [text for row in batch for text in texts(row.value)]
        started, cpu_started = time.perf_counter(), time.process_time()
        whole.encode_batch_fast(pieces, add_special_tokens=False)
        seconds += time.perf_counter() - started
        cpu_seconds += time.process_time() - cpu_started
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}))


def as_text(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = [
        "| GB | rows | tokens | encode MB/s | tokenizers alone MB/s | of alone | of alone, by CPU "
        "| encode anonymous MiB | train anonymous MiB |",
        "|" + "---:|" * 9,
    ]
    for row in rows:
        alone = ["", "", ""]
        if "tokenizers_alone" in row:
            rate = str(row["tokenizers_alone"]["mb_per_second"])
            alone = [rate, f"{row['share_of_alone']:.0%}", f"{row['cpu_share_of_alone']:.0%}"]
        cells = [
            f"{row['gigabytes']:g}",
            f"{row['rows']:,}",
            f"{row['tokens']:,}",
            str(row["encode"]["mb_per_second"]),
            *alone,
            str(row["encode"]["anonymous_mib"]),
            str(row["train"]["anonymous_mib"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _run(folder: Path, module: str, options: list[str]) -> Usage:
    """Run a module in the folder and watch its memory."""
    _say(module)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DVC_")}
    environment |= {"PYTHONPATH": str(ROOT), "MINIMIND_LOG_SECONDS": "3600"}
    log = folder / "log"
    started = time.perf_counter()
    with log.open("wb") as errors, (folder / "printed").open("wb") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *options],
            cwd=folder,
            env=environment,
            stdout=printed,
            stderr=errors,
        )
        peak_kib, status, used = 0, 0, None
        try:
            while not used:
                peak_kib = max(peak_kib, _anonymous_kib(process.pid))
                time.sleep(SAMPLE_SECONDS)
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                used = usage if ended else None
        finally:
            if not used:
                process.kill()
                process.wait()
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{module} {' '.join(options)}: exit {process.returncode}\n{log.read_text()}")
    return Usage(
        seconds,
        used.ru_utime + used.ru_stime,
        peak_kib / 1024,
        used.ru_maxrss / 1024,
        os.getloadavg()[0],
        (folder / "printed").read_text(encoding="utf-8"),
    )


def _anonymous_kib(pid: int) -> int:
    """Anonymous memory of a process, what is swapped out included; 0 once it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(values.get(key, "0 kB").split()[0]) for key in ("RssAnon", "VmSwap"))


def _rounded(usage: Usage) -> dict[str, Any]:
    return {
        "seconds": round(usage.seconds, 2),
        "cpu_seconds": round(usage.cpu_seconds, 2),
        "anonymous_mib": round(usage.anonymous_mib),
        "resident_mib": round(usage.resident_mib),
        "load": round(usage.load, 1),
    }


def _rate(megabytes: float, usage: Usage) -> float:
    return round(megabytes / usage.seconds, 2)


def _setting(arguments: argparse.Namespace) -> dict[str, Any]:
    models = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "asked_for_gigabytes": arguments.gigabytes,
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": {
            name: os.environ.get(name, "default")
            for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MINIMIND_THREADS")
        },
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("tokenizers", "numpy", "torch")},
        "vocab_size": VOCAB_SIZE,
    }


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[5.0], help="sizes of text")
    parser.add_argument("--format", choices=WRITERS, default="text")
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--folder", type=Path, help="where there is room; default: the system's")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/large.json")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)  # how it calls itself
    arguments = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("anonymous memory is read from /proc, which only Linux has.")
    return arguments


if __name__ == "__main__":
    given = _parse()
    if given.alone:
        encode_alone(given.alone, given.format, Path("tokenizer"))
    else:
        main()
