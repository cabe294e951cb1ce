"""White-box distillation of a smaller student, and its no-teacher baseline, stage baseline."""

from typing import Annotated

import typer
from pydantic import Field

from minimind.chat.tokenizer import ChatTokenizer
from minimind.distillation.outputs import TeacherOutputs
from minimind.distillation.teacher import load_teacher
from minimind.metrics import write_history, write_metrics
from minimind.model.checkpoint import save_checkpoint, start_model
from minimind.model.transformer import ModelShape
from minimind.objectives.distill import Distill
from minimind.params import Section, UserPath, load_section
from minimind.terminal.command import stage_app
from minimind.training.bits import bits_per_byte
from minimind.training.fit import fit, summary
from minimind.training.run import start_training
from stages._shared import PARAMS, Encoded, File
from stages._supervised import SupervisedConfig, open_dataset

app = stage_app("distill")


class DistillConfig(SupervisedConfig):
    """The `distill` section, which decides the no-teacher baseline too."""

    teacher: UserPath  # a checkpoint's or any Hugging Face directory
    data: str  # its name among the encoded data sets
    init: UserPath  # the path of a tokenizer, for a new student, or of a checkpoint of its shape
    student: ModelShape


class DistillLossConfig(Section):
    """The `distill_loss` section."""

    alpha: float = Field(0.1, ge=0, le=1)  # share of cross-entropy; the rest is the teacher's


@app.command()
def main(
    encoded: Encoded,
    teacher_outputs: File,
    output: File,
    metrics: File,
    history: File,
    params: File = PARAMS,
    baseline: Annotated[
        bool, typer.Option(help="learn without the teacher, for comparison")
    ] = False,
) -> None:
    """Train a student on data and teacher, or the baseline, only measured against the teacher."""
    app.stage = stage = "baseline" if baseline else "distill"
    config = load_section(params, "distill", DistillConfig)
    sections: dict[str, Section] = {"distill": config}
    alpha = 1.0
    if not baseline:
        loss = load_section(params, "distill_loss", DistillLossConfig)
        sections["distill_loss"], alpha = loss, loss.alpha
    conversations = encoded / config.data
    inputs = [config.init, conversations, config.teacher, teacher_outputs]
    with start_training(stage, params, sections, inputs, code="distill") as run:
        dataset = open_dataset(conversations, config.init, "chat", "text")
        asked_by = f"{params}: distill.student"
        student = start_model(config.init, config.student, config.seed, asked_by)
        outputs = TeacherOutputs.open(teacher_outputs, dataset, student.config.vocab_size)
        beside = None
        if outputs.meta.mode == "online":
            beside = load_teacher(config.teacher, dataset, outputs.meta.dtype).to(run.device)
        objective = Distill(alpha, outputs.meta.temperature, beside)
        trained = fit(student, objective, dataset, config, run, outputs.extras)
        results = {"parameters": student.num_parameters, **summary(trained)}
        if "val_kl" in results:
            results["kl_to_teacher"] = results.pop("val_kl")
        with run.saving(metrics):
            save_checkpoint(output, student, config.init)
            write_history(history, trained.rows)
            results |= bits_per_byte(trained, dataset, config, ChatTokenizer.load(config.init))
            write_metrics(metrics, stage, results)


if __name__ == "__main__":
    app()
