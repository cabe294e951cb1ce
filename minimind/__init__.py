"""Train small chat models from nothing: the library beneath the graph.

Names are loaded when they are asked for, so that importing the package takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimind.chat.tokenizer import ChatTokenizer as ChatTokenizer
    from minimind.chat.tokenizer_training import save_tokenizer as save_tokenizer
    from minimind.chat.tokenizer_training import train_tokenizer as train_tokenizer
    from minimind.datasets.encoded import EncodedDataset as EncodedDataset
    from minimind.errors import UserError as UserError
    from minimind.evaluation.evaluate import EvaluateConfig as EvaluateConfig
    from minimind.evaluation.evaluate import evaluate as evaluate
    from minimind.model.checkpoint import load_model as load_model
    from minimind.model.checkpoint import save_checkpoint as save_checkpoint
    from minimind.model.generate import generate as generate
    from minimind.model.lora import AdapterShape as AdapterShape
    from minimind.model.lora import add_adapter as add_adapter
    from minimind.model.lora import merge_adapter as merge_adapter
    from minimind.model.reply import reply as reply
    from minimind.model.transformer import ModelConfig as ModelConfig
    from minimind.model.transformer import Transformer as Transformer
    from minimind.objectives.distill import Distill as Distill
    from minimind.objectives.dpo import Dpo as Dpo
    from minimind.objectives.loss import Loss as Loss
    from minimind.objectives.loss import Objective as Objective
    from minimind.objectives.next_token import NextToken as NextToken
    from minimind.tasks.problem import read_problems as read_problems
    from minimind.training.fit import FitConfig as FitConfig
    from minimind.training.fit import fit as fit

_HOME = {
    "AdapterShape": "model.lora",
    "ChatTokenizer": "chat.tokenizer",
    "Distill": "objectives.distill",
    "Dpo": "objectives.dpo",
    "EncodedDataset": "datasets.encoded",
    "EvaluateConfig": "evaluation.evaluate",
    "FitConfig": "training.fit",
    "Loss": "objectives.loss",
    "ModelConfig": "model.transformer",
    "NextToken": "objectives.next_token",
    "Objective": "objectives.loss",
    "Transformer": "model.transformer",
    "UserError": "errors",
    "add_adapter": "model.lora",
    "evaluate": "evaluation.evaluate",
    "fit": "training.fit",
    "generate": "model.generate",
    "load_model": "model.checkpoint",
    "merge_adapter": "model.lora",
    "read_problems": "tasks.problem",
    "reply": "model.reply",
    "save_checkpoint": "model.checkpoint",
    "save_tokenizer": "chat.tokenizer_training",
    "train_tokenizer": "chat.tokenizer_training",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"minimind has no {name}; it has: {', '.join(__all__)}")
    return getattr(import_module(f"minimind.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
