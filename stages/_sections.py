"""Which class checks which section of params.yaml, and all of them checked before anything runs.

Each stage reads its own sections when it starts, which may be hours after the first one has.
"""

from pathlib import Path
from typing import Annotated

import typer

from minimind.chat.tokenizer_training import TokenizerConfig
from minimind.datasets.encode import ChatEncodeConfig, DataConfig, EncodeConfig
from minimind.distillation.outputs import TeacherOutputsConfig
from minimind.errors import UserError
from minimind.evaluation.evaluate import EvaluateConfig
from minimind.mini_world.rows import MiniWorldConfig
from minimind.model.transformer import ModelShape
from minimind.params import Section, load_section, read_params
from minimind.reinforcement.group_relative import GrpoConfig
from minimind.reinforcement.single_stream import SpoConfig
from minimind.terminal.command import stage_app
from minimind.thinking.quality import ThinkingConfig
from minimind.thinking.rejection_sampling import RejectionSamplingConfig
from stages.distill import DistillConfig, DistillLossConfig
from stages.dpo import DpoConfig
from stages.lora import LoraStageConfig
from stages.pretrain import PretrainConfig
from stages.reason import ReasonConfig
from stages.reward import RewardConfig
from stages.sft import SftConfig

SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "mini_world": MiniWorldConfig,
    "tokenizer": TokenizerConfig,
    "encode.pretrain": EncodeConfig,
    "encode.sft": ChatEncodeConfig,
    "encode.dpo": EncodeConfig,
    "encode.reason": ChatEncodeConfig,
    "encode.distill": ChatEncodeConfig,
    "encode.lora": ChatEncodeConfig,
    "model": ModelShape,
    "pretrain": PretrainConfig,
    "sft": SftConfig,
    "dpo": DpoConfig,
    "reason": ReasonConfig,
    "rejection_sampling": RejectionSamplingConfig,
    "teacher_outputs": TeacherOutputsConfig,
    "distill": DistillConfig,
    "distill_loss": DistillLossConfig,
    "lora": LoraStageConfig,
    "reward": RewardConfig,
    "grpo": GrpoConfig,
    "spo": SpoConfig,
    "evaluate": EvaluateConfig,
    "thinking": ThinkingConfig,
}

app = stage_app("params")


@app.command()
def main(
    keys: Annotated[list[str], typer.Argument(help="Of stages, as in dvc.yaml: `dpo`, `seed`.")],
    params: Annotated[Path, typer.Option(help="Parameters.")] = Path("params.yaml"),
) -> None:
    """Check those of these parameters that are sections; all that is wrong, in one line."""
    values, wrong = read_params(params), []
    for name, section in SECTIONS.items():
        top, _, below = name.partition(".")
        is_there = below in values.get(top, ()) if below else top in values
        if is_there and {name, top} & {*keys}:
            try:
                load_section(params, name, section)
            except UserError as error:
                wrong.append(str(error).removeprefix(f"{params}: "))
    if wrong:
        raise UserError(f"{params}: {'; '.join(wrong)}")


if __name__ == "__main__":
    app()
