"""What a teacher says of every trained token, computed once for any number of students."""

from minimind.datasets.encoded import EncodedDataset
from minimind.distillation.outputs import (
    TeacherOutputsConfig,
    compute_teacher_outputs,
    online_meta,
    save_teacher_outputs,
)
from minimind.distillation.teacher import load_teacher
from minimind.metrics import Number, write_metrics
from minimind.params import load_path, load_section
from minimind.terminal.command import stage_app
from minimind.training.run import start_run
from stages._shared import PARAMS, Encoded, File

app = stage_app("teacher_outputs")


@app.command()
def main(encoded: Encoded, output: File, metrics: File, params: File = PARAMS) -> None:
    """Keep the teacher's likeliest tokens; or, in online mode, only check that it fits."""
    config = load_section(params, "teacher_outputs", TeacherOutputsConfig)
    teacher = load_path(params, "distill.teacher")
    conversations = encoded / load_path(params, "distill.data")
    inputs = [teacher, conversations]
    with start_run("teacher_outputs", params, {"teacher_outputs": config}, inputs) as run:
        dataset = EncodedDataset.open(conversations)
        dataset.check_format("chat", "text")
        model = load_teacher(teacher, dataset, config.dtype).to(run.device)
        measured: dict[str, Number]
        if config.mode == "online":
            meta = online_meta(dataset, config)
            measured = {"tokens": 0}
        else:
            meta, measured = compute_teacher_outputs(model, dataset, config, run)
        with run.saving(metrics):
            save_teacher_outputs(output, meta, run)
            write_metrics(metrics, "teacher_outputs", measured)


if __name__ == "__main__":
    app()
