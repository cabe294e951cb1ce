"""What a teacher says of a data set, computed once and kept: a row for each trained token.

ids.bin       uint16 or uint32 [tokens, K], the teacher's likeliest tokens, likeliest first
logprobs.bin  float16 [tokens, K + 1], their log-probabilities and that of all others together,
              at the temperature of meta.json; [tokens, V] when K is the whole vocabulary V
meta.json     the sizes of these, and how the teacher was computed

In online mode there is meta.json alone, and the teacher runs beside the student.
"""

import hashlib
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from minimind.compute.precision import DType
from minimind.datasets.batches import Extra, in_order
from minimind.datasets.encoded import EncodedDataset
from minimind.distillation.teacher import Teacher
from minimind.errors import UserError
from minimind.files import replacing
from minimind.lineage.resume import ResumeCheckpoint
from minimind.metrics import Number
from minimind.objectives.distill import TEACHER_IDS, TEACHER_LOGPROBS, bucket_logprobs
from minimind.objectives.loss import token_logprobs
from minimind.params import Section
from minimind.training.run import StageRun, newest_checkpoint

# What 16 bits change is far below what the K tokens leave out: see docs/deviations.md.
LOGPROB_DTYPE = np.dtype(np.float16)
ROWS_AT_A_TIME = 2**16  # of a check: bounds its memory
IDS, LOGPROBS, META = "ids.bin", "logprobs.bin", "meta.json"


class TeacherOutputsConfig(Section):
    """The `teacher_outputs` section."""

    mode: Literal["cached", "online"]
    temperature: float = Field(gt=0)
    top_k: int = Field(gt=0)  # of cached mode; online takes the whole distribution
    dtype: DType = "bfloat16"
    batch_size: int = Field(64, gt=0)  # rows computed at once


class TeacherMeta(Section):
    """meta.json: all that the distill stage has to know."""

    mode: Literal["cached", "online"]
    temperature: float = Field(gt=0)
    dtype: DType
    tokens: int  # trained tokens of the data set
    num_ids: int = Field(ge=0)  # K; 0 in online mode, as the next
    num_buckets: int = Field(ge=0)
    id_dtype: Literal["uint16", "uint32"]

    @model_validator(mode="after")
    def _buckets_fit_ids(self) -> "TeacherMeta":
        if self.mode == "cached" and not 0 < self.num_ids <= self.num_buckets <= self.num_ids + 1:
            raise ValueError("num_ids and num_buckets do not belong together")
        return self


@dataclass(frozen=True)
class TeacherOutputs:
    """Opened teacher outputs; the arrays are mapped from disk, never read as a whole."""

    meta: TeacherMeta
    extras: Mapping[str, Extra]  # what the distillation objective finds in its batches

    @classmethod
    def open(cls, directory: Path, dataset: EncodedDataset, vocab_size: int) -> "TeacherOutputs":
        """Map the teacher outputs of a data set, for a student of that many tokens.

        Raises:
            UserError: a file is missing or of another size, it is about other data, or it holds
                what no teacher says.
        """
        try:
            meta = TeacherMeta.model_validate_json((directory / META).read_bytes())
        except FileNotFoundError:
            raise UserError(f"{directory / META} is missing; run stage teacher_outputs.") from None
        except ValidationError:
            raise UserError(f"{directory / META} is damaged; run teacher_outputs again.") from None
        if meta.tokens != _num_trained(dataset):
            raise UserError(
                f"{directory} is about {meta.tokens} trained tokens, but {dataset.directory} has "
                f"{_num_trained(dataset)}; run teacher_outputs again on the same data."
            )
        if meta.mode == "online":
            return cls(meta, {})
        ids = _map(directory / IDS, np.dtype(meta.id_dtype), meta.tokens, meta.num_ids)
        logprobs = _map(directory / LOGPROBS, LOGPROB_DTYPE, meta.tokens, meta.num_buckets)
        for start in range(0, meta.tokens, ROWS_AT_A_TIME):
            rows = slice(start, start + ROWS_AT_A_TIME)
            if ids[rows].max() >= vocab_size or not np.isfinite(logprobs[rows]).all():
                raise UserError(
                    f"{directory} holds tokens or values that cannot be; run teacher_outputs again."
                )
        arrays = {TEACHER_IDS: ids, TEACHER_LOGPROBS: logprobs}
        return cls(meta, {name: Extra(array, per="tokens") for name, array in arrays.items()})


def compute_teacher_outputs(
    teacher: Teacher, dataset: EncodedDataset, config: TeacherOutputsConfig, run: StageRun
) -> tuple[TeacherMeta, dict[str, Number]]:
    """Ask the teacher about every trained token; returns meta.json's content and metrics.

    The arrays grow in the run's resume folder, from where :func:`save_teacher_outputs` copies them.

    Raises:
        Stopped: a signal came; a checkpoint to resume from is saved.
    """
    meta = _meta(dataset, config, teacher.vocab_size)
    num_samples = dataset.num_samples
    num_batches = math.ceil(num_samples / config.batch_size)
    done, sums, digests = _restore(meta, dataset, run)
    progress = run.progress(num_batches, done // config.batch_size)
    files = _grow(meta, dataset, done, run)
    last_save = time.monotonic()

    def save() -> None:
        nonlocal last_save
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        written = [digest.hexdigest() for digest in digests]
        run.store.save(ResumeCheckpoint(done, {}, {"sums": sums, "written": written}))
        last_save = time.monotonic()

    with files[0], files[1], progress, torch.inference_mode():
        samples = np.arange(done, num_samples)
        for batch in in_order(dataset, samples, config.batch_size, extras={}):
            batch = batch.to(run.device)
            logits = teacher(batch.tokens, batch.predict_at).logits
            ids = logits.topk(meta.num_ids).indices
            logprobs = bucket_logprobs(logits, ids, config.temperature)
            if not torch.isfinite(logprobs).all():
                shown = ", ".join(map(str, batch.rows[:16]))
                raise UserError(
                    f"the teacher gives values that are not finite on rows {shown}, ... of "
                    f"{dataset.directory}; take another teacher, or dtype float32."
                )
            arrays = (
                ids.cpu().numpy().astype(meta.id_dtype),
                logprobs.cpu().numpy().astype(LOGPROB_DTYPE),
            )
            for file, array, digest in zip(files, arrays, digests, strict=True):
                file.write(array.tobytes())
                digest.update(array.tobytes())
            cross_entropy = -token_logprobs(logits, batch.targets)
            sums["ce"] += float(cross_entropy.cpu().double().sum())
            sums["top_share"] += float(logprobs[:, : meta.num_ids].cpu().double().exp().sum())
            done += batch.counts.samples
            values = {"loss": float(cross_entropy.mean())}
            progress.update(math.ceil(done / config.batch_size), values, len(batch.tokens.ids))
            if run.stop.requested or time.monotonic() - last_save >= run.settings.save_seconds:
                save()
                run.raise_if_stopped(f"after {done} of {num_samples} samples")
        save()
    return meta, {"tokens": meta.tokens} | {name: s / meta.tokens for name, s in sums.items()}


def online_meta(dataset: EncodedDataset, config: TeacherOutputsConfig) -> TeacherMeta:
    """What stands in meta.json when the teacher is to run beside the student."""
    return _meta(dataset, config, vocab_size=0)


def _meta(dataset: EncodedDataset, config: TeacherOutputsConfig, vocab_size: int) -> TeacherMeta:
    """vocab_size: of what is stored; 0 where nothing is."""
    num_ids = min(config.top_k, vocab_size)
    return TeacherMeta(
        **config.model_dump(include={"mode", "temperature", "dtype"}),
        tokens=_num_trained(dataset),
        num_ids=num_ids,
        num_buckets=min(num_ids + 1, vocab_size),
        id_dtype="uint16" if vocab_size <= 2**16 else "uint32",
    )


def save_teacher_outputs(directory: Path, meta: TeacherMeta, run: StageRun) -> None:
    """Copy finished arrays from the resume folder to `directory`, which appears whole."""
    with replacing(directory) as partial:
        partial.mkdir()
        if meta.mode == "cached":
            for name in (IDS, LOGPROBS):
                shutil.copyfile(run.store.directory / name, partial / name)
        (partial / META).write_text(meta.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _restore(
    meta: TeacherMeta, dataset: EncodedDataset, run: StageRun
) -> tuple[int, dict[str, float], list[Any]]:
    """Samples done, sums over their tokens and digests of the arrays so far: of the newest
    checkpoint, if the arrays begin with what it has written.
    """
    state = newest_checkpoint(run)
    if state is not None:
        sizes = _bytes_of(meta, dataset, state.step)
        digests = [
            _digest_of(run.store.directory / name, size)
            for name, size in zip((IDS, LOGPROBS), sizes, strict=True)
        ]
        if [digest.hexdigest() for digest in digests] == state.values["written"]:
            run.say(f"going on after {state.step} of {dataset.num_samples} samples")
            return state.step, dict(state.values["sums"]), digests
        run.say("the outputs so far are not those that were saved: all are computed again")
    return 0, {"ce": 0.0, "top_share": 0.0}, [hashlib.sha256(), hashlib.sha256()]


def _digest_of(file: Path, num_bytes: int) -> Any:
    """Of a file's first bytes, or of all if there are fewer."""
    digest = hashlib.sha256()
    if file.is_file():
        with file.open("rb") as opened:
            while num_bytes > 0 and (block := opened.read(min(num_bytes, 2**20))):
                digest.update(block)
                num_bytes -= len(block)
    return digest


def _grow(
    meta: TeacherMeta, dataset: EncodedDataset, samples_done: int, run: StageRun
) -> list[BufferedWriter]:
    """The two array files, to be appended to; what lies beyond the samples done is cut off."""
    files = [(run.store.directory / name).open("ab") for name in (IDS, LOGPROBS)]
    for file, size in zip(files, _bytes_of(meta, dataset, samples_done), strict=True):
        file.truncate(size)
    return files


def _bytes_of(meta: TeacherMeta, dataset: EncodedDataset, num_samples: int) -> tuple[int, int]:
    """Sizes of the array files of the first samples."""
    tokens = int(dataset.trained_offsets[num_samples * dataset.rows_per_sample])
    id_bytes = tokens * meta.num_ids * np.dtype(meta.id_dtype).itemsize
    return id_bytes, tokens * meta.num_buckets * LOGPROB_DTYPE.itemsize


def _num_trained(dataset: EncodedDataset) -> int:
    return int(dataset.trained_offsets[-1])


def _map(file: Path, dtype: np.dtype[Any], rows: int, columns: int) -> NDArray[Any]:
    expected = rows * columns * dtype.itemsize
    if not file.is_file() or file.stat().st_size != expected:
        raise UserError(f"{file} should have {expected} bytes; run teacher_outputs again.")
    return np.asarray(np.memmap(file, dtype=dtype, mode="r", shape=(rows, columns)))
