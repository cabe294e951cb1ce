"""What stages that learn from an encoded data set have in common."""

from pathlib import Path

from minimind.chat.tokenizer import ChatTokenizer
from minimind.datasets.encoded import EncodedDataset
from minimind.metrics import Number
from minimind.params import UserPath
from minimind.training.bits import bits_per_byte
from minimind.training.fit import FitConfig, summary
from minimind.training.session import History


class SupervisedConfig(FitConfig):
    """Keys of every such stage's section."""

    init: UserPath  # the path of the checkpoint to start from


def open_dataset(directory: Path, init: Path, *formats: str) -> EncodedDataset:
    """A data set of one of these formats, or of any, encoded with the tokenizer of `init`."""
    dataset = EncodedDataset.open(directory)
    if formats:
        dataset.check_format(*formats)
    dataset.check_tokenizer_of(init)
    return dataset


def measured(
    trained: History, dataset: EncodedDataset, config: SupervisedConfig
) -> dict[str, Number]:
    """The metrics of a stage that learns text: its summary, and bits per byte of held-out rows."""
    tokenizer = ChatTokenizer.load(config.init)
    return summary(trained) | bits_per_byte(trained, dataset, config, tokenizer)
