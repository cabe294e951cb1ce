"""torch.compile, for those who ask for it."""

from pathlib import Path
from typing import cast

import torch
from torch import nn

from minimind.compute.settings import RuntimeSettings
from minimind.errors import UserError


def compiled(model: nn.Module, settings: RuntimeSettings) -> nn.Module:
    """The model, or a compiled form of it that shares its parameters.

    Raises:
        UserError: PyTorch cannot compile from where it is installed.
    """
    if not settings.compile:
        return model
    if not can_compile():
        raise UserError(
            "MINIMIND_COMPILE is true, but PyTorch cannot compile from "
            f"{Path(torch.__file__).parent}, a path with spaces; set it to false, or move the "
            "project to a path without any."
        )
    # Every batch has another number of tokens: one dynamic graph, not one for each.
    return cast(nn.Module, torch.compile(model, dynamic=True))


def can_compile() -> bool:
    """Whether the C++ compiler finds PyTorch: inductor gives it paths unquoted."""
    return not any(character.isspace() for character in torch.__file__)
