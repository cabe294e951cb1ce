"""How things are computed: read from MINIMIND_* environment variables, tracked by nobody.

Nothing here may change what a stage computes beyond rounding; what does belongs in params.yaml.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from minimind.errors import UserError, complaint

RENAMED = {
    "MINIMIND_WANDB": "MINIMIND_TRACKER=wandb; WANDB_MODE is wandb's own `offline` or `online`",
    "MINIMIND_WANDB_PROJECT": "MINIMIND_TRACKER_PROJECT",
}


class RuntimeSettings(BaseSettings):
    """One field a variable: `device` is MINIMIND_DEVICE, and so on."""

    model_config = SettingsConfigDict(env_prefix="MINIMIND_", frozen=True, env_ignore_empty=True)

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int = Field(
        default=0, ge=0, le=1024, description="CPU threads; 0 leaves PyTorch's choice"
    )
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    cpu_matmuls: Literal["auto", "native", "float32"] = Field(
        default="auto", description="of 16-bit values: auto asks whether the CPU has instructions"
    )
    compile: bool = Field(default=False, description="torch.compile; costs 10-60 s at the start")
    processes: int = Field(default=1, ge=1, description="of this machine, that train one model")
    shard: bool = Field(default=False, description="divide the weights among the processes")
    launcher: str = Field(default="", description="template that starts stages elsewhere")
    tracker: Annotated[
        tuple[Literal["wandb", "tensorboard", "swanlab", "trackio"], ...], NoDecode
    ] = Field(default=(), description="that get the history too, with commas")
    tracker_project: str = "minimind"
    save_seconds: float = Field(
        default=60.0, ge=0, description="between two resume checkpoints; 0: every step"
    )
    log_seconds: float = Field(default=10.0, ge=0, description="between two lines of progress")
    root: Path = Field(
        default=Path("."), validation_alias="DVC_ROOT", description="where runs/ and .resume/ are"
    )
    dvc_stage: str = Field(default="", validation_alias="DVC_STAGE")

    @field_validator("tracker", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    def variables(self) -> dict[str, str]:
        """Those that are set, as they are written, by name."""
        return {name: os.environ[name] for name in map(_variable, self.model_fields_set)}


def load_settings() -> RuntimeSettings:
    """Raises UserError for a value that is not allowed, and for a variable of earlier versions."""
    if old := next((name for name in RENAMED if os.environ.get(name)), None):
        raise UserError(f"{old} is no more; unset it, and set {RENAMED[old]}.")
    try:
        return RuntimeSettings()
    except ValidationError as error:
        detail = error.errors()[0]
        variable = _variable(str(detail["loc"][0]))
        raise UserError(f"{variable} is {detail['input']!r}; {complaint(detail)}.") from None


def _variable(field: str) -> str:
    """Of a field, or of the alias that pydantic calls it by."""
    of_dvc = {"root": "DVC_ROOT", "dvc_stage": "DVC_STAGE"}
    return field if field in of_dvc.values() else of_dvc.get(field, f"MINIMIND_{field.upper()}")
