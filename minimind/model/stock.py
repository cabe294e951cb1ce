"""Models that transformers loads, of any architecture that it has."""

from typing import Any

import torch

from minimind.errors import UserError


def load_stock(auto_class: Any, source: str, name: str, **options: Any) -> Any:
    """A model on the CPU in float32; none of its weights is unpickled, or drawn at random.

    auto_class: of transformers, as AutoModelForCausalLM.
    source: a directory, or an id on the hub.
    name: of the model, in messages.
    options: of ``from_pretrained``.

    Raises:
        UserError: it cannot be loaded, or lacks weights.
    """
    from transformers.utils import logging  # takes seconds, and few need it

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is wrong is said in one line
    try:
        model, loaded = auto_class.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # transformers raises whatever its parts raise
        said = str(error).partition(". ")[0]
        if "ignore_mismatched_sizes" in said:
            said = "its weights have other shapes than its config.json says"
        raise UserError(f"{name} cannot be loaded: {type(error).__name__}: {said}.") from None
    if missing := sorted(loaded["missing_keys"]):  # they would be random
        raise UserError(
            f"{name} has no weights {', '.join(missing[:4])}; it is not whole, or of another kind."
        )
    return model
