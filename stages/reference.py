"""Log-probabilities of preference pairs under the reference, computed once for any dpo run."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from pydantic import ConfigDict, Field

from minimind.compute.precision import DType, autocast
from minimind.datasets.batches import in_order
from minimind.errors import UserError
from minimind.files import replacing
from minimind.model.checkpoint import load_model
from minimind.objectives.preference import Reduction, row_logprobs
from minimind.params import Section, UserPath, load_section
from minimind.terminal.command import stage_app
from minimind.training.run import start_run
from stages._shared import PARAMS, EncodedPairs, File
from stages._supervised import open_dataset

app = stage_app("reference")


class SharedWithPolicy(Section):
    """Those keys of the `dpo` section that a log-probability depends on."""

    model_config = ConfigDict(extra="ignore")

    init: UserPath
    # The reference is computed in the policy's precision, or the loss would not start at ln 2.
    dtype: DType
    reduction: Reduction
    batch_size: int = Field(gt=0)  # pairs


@app.command()
def main(
    preferences: EncodedPairs,
    output: Annotated[Path, typer.Option(help=".npy, float32 [rows]")],
    params: File = PARAMS,
) -> None:
    """Score every row; depends on the checkpoint and the data, never on dpo's beta or lr."""
    config = load_section(params, "dpo", SharedWithPolicy)
    inputs = [config.init, preferences]
    with start_run("reference", params, {"dpo": config}, inputs, saves_states=False) as run:
        model = load_model(config.init).to(run.device).eval()
        dataset = open_dataset(preferences, config.init, "preference")
        dataset.check_positions(model.config.max_positions, str(config.init))
        pairs = np.arange(dataset.num_samples)
        with torch.inference_mode(), autocast(run.device, config.dtype):
            scores = [
                row_logprobs(model, batch.to(run.device), config.reduction).cpu()
                for batch in in_order(dataset, pairs, config.batch_size, extras={})
            ]
        logprobs = torch.cat(scores)
        if not torch.isfinite(logprobs).all():
            raise UserError(
                f"{config.init} gives log-probabilities that are not finite; "
                "take another, or dpo.dtype float32."
            )
        with run.saving(output), replacing(output) as partial, partial.open("wb") as file:
            np.save(file, logprobs.numpy(), allow_pickle=False)


if __name__ == "__main__":
    app()
