"""What may be asked of `/v1/chat/completions`; what would be left out in silence is refused."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from minimind.chat.template import Message
from minimind.chat.tokenizer import ChatTokenizer


def _joined(content: Any) -> Any:
    """Text, also where it comes in parts."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise ValueError('it should be text, or parts {"type": "text", "text": ...}; no images')
    return "".join(part["text"] for part in parts)


def _listed(stop: Any) -> Any:
    if isinstance(stop, str):
        return [stop]
    if stop is not None and not isinstance(stop, list):
        raise ValueError("it should be a text, or a list of texts")
    return stop or []


Text = Annotated[str, BeforeValidator(_joined)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Function(_Strict):
    name: str
    arguments: str


class _Call(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "_Message":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role} needs content")
        return self

    def as_ours(self) -> dict[str, Any]:
        said = self.model_dump(exclude_none=True)
        return said | {"role": "system"} if self.role == "developer" else said


class _Tool(BaseModel):
    type: Literal["function"]
    function: dict[str, Any]


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _TemplateOptions(_Strict):
    open_thinking: bool | None = None
    enable_thinking: bool | None = None


class ChatRequest(_Strict):
    """The body of a request."""

    messages: list[_Message] = Field(min_length=1)
    model: str | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(_listed),
    ] = []
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: _TemplateOptions = _TemplateOptions()
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    # Asked for what is done anyway, or of no concern to one model on one machine.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    parallel_tool_calls: Literal[True] | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> "ChatRequest":
        if self.messages[-1].role == "assistant":
            raise ValueError("the last message is the assistant's; it must be another's")
        return self

    @model_validator(mode="after")
    def _results_are_of_calls(self) -> "ChatRequest":
        called = False
        for place, message in enumerate(self.messages):
            if message.role == "tool" and not called:
                raise ValueError(
                    f"messages.{place} is the result of a tool; before it should stand the "
                    "assistant's message with its tool_calls"
                )
            called = message.role == "tool" or bool(message.tool_calls)
        return self

    def begun(self) -> str:
        """What the prompt already has of the answer."""
        options = self.chat_template_kwargs
        if options.open_thinking:
            return "<think>\n"
        is_off = False in (options.open_thinking, options.enable_thinking)
        return "<think>\n\n</think>\n\n" if is_off or self.reasoning_effort == "none" else ""

    def prompt(self, tokenizer: ChatTokenizer) -> list[int]:
        """Ids of the chat so far, and of the beginning of the answer.

        What people write in it never becomes a control token.
        """
        messages: Sequence[Message] = [message.as_ours() for message in self.messages]
        if self.tools and self.tool_choice != "none":
            tools = [tool.model_dump() for tool in self.tools]
            first = messages[0] if messages[0]["role"] == "system" else {"role": "system"}
            others = messages[1:] if first is messages[0] else messages
            messages = [{**first, "tools": tools}, *others]
        ids, _ = tokenizer.encode_chat([*messages, {"role": "assistant", "content": self.begun()}])
        return ids[: -1 - ids[::-1].index(tokenizer.end_id)]
