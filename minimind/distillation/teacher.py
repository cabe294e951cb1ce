"""A teacher: any Hugging Face model that shares the student's tokenizer."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minimind.chat.tokenizer import ChatTokenizer
from minimind.compute.precision import DType, autocast
from minimind.datasets.encoded import EncodedDataset
from minimind.errors import UserError
from minimind.model.checkpoint import load_config, load_model
from minimind.model.stock import load_stock
from minimind.model.transformer import Output, PackedTokens, Transformer


class Teacher(nn.Module):
    """A frozen model, computed in its own number format, over the tokenizer's vocabulary."""

    def __init__(self, model: nn.Module, vocab_size: int, dtype: DType) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.vocab_size, self.dtype = vocab_size, dtype

    def forward(self, tokens: PackedTokens, predict_at: Tensor) -> Output:
        """Called as a student is; some models have more logits than their tokenizer has tokens."""
        with torch.no_grad(), autocast(tokens.ids.device, self.dtype):
            logits = self.model(tokens, predict_at).logits
        if logits.shape[1] < self.vocab_size:
            raise UserError(
                f"the teacher knows {logits.shape[1]} tokens, its tokenizer {self.vocab_size}; "
                "take a teacher whose parts belong together."
            )
        return Output(logits[:, : self.vocab_size])


class PaddedModel(nn.Module):
    """A causal model of transformers, called as ours are: samples are padded for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: PackedTokens, predict_at: Tensor) -> Output:
        lengths = tokens.boundaries.diff().long()
        ids = pad_sequence(list(tokens.ids.split(lengths.tolist())), batch_first=True)
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        logits = self.model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
        return Output(logits[real][predict_at].float())


def load_teacher(directory: Path, dataset: EncodedDataset, dtype: DType) -> Teacher:
    """Load any Hugging Face directory whose tokenizer is the one that encoded `dataset`.

    Raises:
        UserError: it has another tokenizer, fewer positions than rows have tokens, or is not a
            model that can be loaded.
    """
    tokenizer = ChatTokenizer.load(directory)
    if tokenizer.fingerprint != dataset.tokenizer:
        raise UserError(
            f"the teacher {directory} has another tokenizer than {dataset.directory}; student and "
            "teacher must share one: take another teacher, or adopt its by data.tokenizer."
        )
    dataset.check_tokenizer_of(directory)
    model: Transformer | PaddedModel
    if _is_ours(directory):
        model = load_model(directory)
        positions: int | None = model.config.max_positions
    else:
        model = _load_foreign(directory)
        positions = getattr(model.model.config, "max_position_embeddings", None)
    if positions is not None:
        dataset.check_positions(positions, f"the teacher {directory}")
    return Teacher(model, tokenizer.vocab_size, dtype)


def _is_ours(directory: Path) -> bool:
    """Whether our model computes what its config.json says: faster, and without padding."""
    try:
        load_config(directory)
    except UserError:
        return False
    return True


def _load_foreign(directory: Path) -> PaddedModel:
    # Imported here: it takes seconds, and only foreign architectures need it.
    from transformers import AutoModelForCausalLM

    return PaddedModel(
        load_stock(
            AutoModelForCausalLM,
            str(directory),
            f"the teacher {directory}",
            local_files_only=True,
            trust_remote_code=False,
        )
    )
