"""Direct preference optimization: make the chosen answers likelier than the rejected ones."""

from pathlib import Path
from typing import Annotated, Literal
from zipfile import BadZipFile

import numpy as np
import typer
from numpy.typing import NDArray
from pydantic import Field

from minimind.datasets.batches import Extra
from minimind.datasets.encoded import EncodedDataset
from minimind.errors import UserError
from minimind.metrics import write_history, write_metrics
from minimind.model.checkpoint import load_model, save_checkpoint
from minimind.objectives.dpo import Dpo
from minimind.objectives.loss import Objective
from minimind.objectives.orpo import Orpo
from minimind.objectives.preference import Reduction
from minimind.params import load_section
from minimind.terminal.command import stage_app
from minimind.training.fit import fit, summary
from minimind.training.run import start_training
from stages._shared import PARAMS, EncodedPairs, File
from stages._supervised import SupervisedConfig, open_dataset

app = stage_app("dpo")


class DpoConfig(SupervisedConfig):
    """The `dpo` section."""

    loss: Literal["dpo", "orpo"] = "dpo"
    beta: float = Field(gt=0)  # of dpo the pull towards the reference, of orpo the weight of odds
    nll_weight: float = Field(ge=0)  # of the chosen answers' own loss; 0: DPO alone
    reduction: Reduction  # log-probabilities of an answer: sum or mean over its tokens


@app.command()
def main(
    preferences: EncodedPairs,
    reference: Annotated[Path, typer.Option(help="the reference's log-probabilities, .npy")],
    output: File,
    metrics: File,
    history: File,
    params: File = PARAMS,
) -> None:
    """Train on preference pairs; dpo compares with cached log-probabilities of the reference."""
    config = load_section(params, "dpo", DpoConfig)
    inputs = [config.init, preferences, reference]
    with start_training("dpo", params, {"dpo": config}, inputs) as run:
        model = load_model(config.init)
        dataset = open_dataset(preferences, config.init, "preference")
        extras = {"reference": Extra(load_reference(reference, dataset), per="rows")}
        objective: Objective = Orpo(config.beta)
        if config.loss == "dpo":
            objective = Dpo(config.beta, config.reduction, config.nll_weight)
        trained = fit(model, objective, dataset, config, run, extras)
        results = summary(trained)
        if "val_accuracy" in results:
            results["pair_accuracy"] = results.pop("val_accuracy")
        with run.saving(metrics):
            save_checkpoint(output, model, config.init)
            write_history(history, trained.rows)
            write_metrics(metrics, "dpo", results)


def load_reference(file: Path, dataset: EncodedDataset) -> NDArray[np.float32]:
    """Log-probabilities of the rows of a data set, as stage reference writes them: [rows]."""
    try:
        logprobs = np.load(file, mmap_mode="r", allow_pickle=False)
        found = f"{logprobs.dtype} {list(logprobs.shape)}"
    except (ValueError, EOFError, AttributeError, BadZipFile) as error:
        raise UserError(f"{file} cannot be read: {error}; run stage reference again.") from None
    if logprobs.shape != (dataset.rows,) or logprobs.dtype != np.float32:
        raise UserError(
            f"{file} holds {found}, but {dataset.directory} calls for float32 [{dataset.rows}]; "
            "run stage reference again."
        )
    if not np.isfinite(logprobs).all():
        raise UserError(f"{file} holds NaN or infinite values; run stage reference again.")
    return logprobs


if __name__ == "__main__":
    app()
