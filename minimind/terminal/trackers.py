"""Curves on Weights & Biases beside the CSV files, for those who set MINIMIND_WANDB."""

from collections.abc import Mapping
from typing import Any

from minimind.compute.settings import RuntimeSettings
from minimind.errors import UserError
from minimind.params import Section


def start_tracker(
    settings: RuntimeSettings, stage: str, fingerprint: str, sections: Mapping[str, Section]
) -> Any:
    """A wandb run; one that is resumed has the same id, since its fingerprint is the same."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"MINIMIND_WANDB is {settings.wandb!r}, but wandb is not installed: "
            "pip install 'minimind-dvc[wandb]'."
        ) from None
    return wandb.init(
        project=settings.wandb_project,
        id=f"{stage}-{fingerprint}",
        name=stage,
        mode="offline" if settings.wandb == "offline" else "online",
        resume="allow",
        dir=str(settings.root),
        config={name: section.model_dump(mode="json") for name, section in sections.items()},
        settings=wandb.Settings(silent=True),
    )
