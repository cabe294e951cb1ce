"""What a model says next in a chat."""

from collections.abc import Sequence

from minimind.chat.template import Message
from minimind.chat.tokenizer import ChatTokenizer
from minimind.compute.precision import DType
from minimind.errors import UserError
from minimind.model.generate import Sampling, generate
from minimind.model.transformer import Transformer


def reply(
    model: Transformer,
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 1,
    dtype: DType = "float32",
) -> str:
    """The next turn of the assistant: the likeliest token each time, or drawn above temperature 0.

    messages: [{"role": "user", "content": "..."}, ...].

    Raises:
        UserError: the messages fill the model's positions.
    """
    ids = tokenizer.encode_prompt(messages)
    if len(ids) >= model.config.max_positions:
        raise UserError(
            f"the messages have {len(ids)} tokens; the model has {model.config.max_positions} "
            "positions for them and its answer: leave the oldest out."
        )
    sampling = Sampling(temperature, top_p, seed, keys=[0]) if temperature else None
    was_training = model.training
    model.eval()
    completions = generate(
        model,
        [ids],
        max_new_tokens=max_new_tokens,
        end_id=tokenizer.end_id,
        dtype=dtype,
        sampling=sampling,
    )
    model.train(was_training)
    return tokenizer.decode(completions.ids[0])
