"""The format of chats, in its two forms: turns for our own encoder, a template for all others.

It is ChatML: each turn is ``<|im_start|>role\\n``, its text, ``<|im_end|>`` and ``\\n``. Tags are
Qwen3's and MiniMind 3's. A test compares what the two forms give.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``, with more keys in some roles.

assistant: ``reasoning_content``, the thought before the content, and ``tool_calls``, a list of
``{"name", "arguments"}`` or ``{"function": {"name", "arguments"}}``, arguments an object or JSON.
system, as the first message: ``tools``, a list of what can be called.
Both lists may be JSON text too, as in MiniMind's data; content may be None beside them.
"""

_BEFORE_TOOLS = "# Tools\n\nThese functions can be called:\n<tools>\n"
_AFTER_TOOLS = (
    "</tools>\n\nA call is one JSON object between tags:\n"
    '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
)
THOUGHT_BEGUN = {None: "", True: "<think>\n", False: "<think>\n\n</think>\n\n"}
"""What the template's ``open_thinking`` writes of the assistant's turn."""


class Turn(NamedTuple):
    """One message, or several results of tools in a row."""

    role: str  # in its header
    text: str  # between header and end token
    position: int  # of its last message


def turns(messages: Sequence[Message]) -> list[Turn]:
    """The turns of a chat, their text exactly as :data:`CHAT_TEMPLATE` renders it.

    Raises:
        ValueError: tools or calls are text that is not JSON.
        KeyError: a call has no name.
    """
    found: list[Turn] = []
    for position, message in enumerate(messages):
        role, text = message["role"], message.get("content")
        text = text if isinstance(text, str) else ""
        if role == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
            if position and messages[position - 1]["role"] == "tool":
                text = f"{found.pop().text}\n{text}"
            role = "user"
        elif role == "assistant":
            text = _spoken(message, text)
        elif role == "system" and position == 0 and (tools := _parsed(message.get("tools"))):
            listed = "".join(f"{_json(tool)}\n" for tool in tools)
            text = (text and f"{text}\n\n") + _BEFORE_TOOLS + listed + _AFTER_TOOLS
        found.append(Turn(role, text, position))
    return found


def _spoken(message: Message, content: str) -> str:
    """An assistant's turn: thought, content and calls, those that there are."""
    text = content
    if thought := message.get("reasoning_content"):
        text = f"<think>\n{thought}\n</think>\n\n{text}"
    for number, call in enumerate(_parsed(message.get("tool_calls"))):
        call = call.get("function") or call
        arguments = call.get("arguments") or {}
        if not isinstance(arguments, str):
            arguments = _json(arguments)
        text += "\n" if content or number else ""
        text += f'<tool_call>\n{{"name": {_json(call["name"])}, "arguments": {arguments}}}'
        text += "\n</tool_call>"
    return text


def _parsed(listed: Any) -> list[Any]:
    return (json.loads(listed) if isinstance(listed, str) and listed else listed) or []


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# Plain jinja2, whitespace control everywhere: so it gives the same under any settings. Hence the
# macro: `tojson` escapes characters and sorts keys in plain jinja2, not in transformers. (Control
# characters that have no letter in JSON it leaves as they are: other engines cannot name them.)
# There are no {% generation %} marks: they are transformers' own, and our encoder knows the mask.
CHAT_TEMPLATE = (
    r"""
{%- macro json(value) -%}
    {%- if value is string -%}
        {{- '"' -}}
        {{- value | replace('\\', '\\\\') | replace('"', '\\"') | replace('\n', '\\n')
            | replace('\r', '\\r') | replace('\t', '\\t') | replace('\b', '\\b')
            | replace('\f', '\\f') -}}
        {{- '"' -}}
    {%- elif value is mapping -%}
        {{- '{' -}}
        {%- for key, item in value | items -%}
            {{- '' if loop.first else ', ' -}}
            {{- json(key) -}}
            {{- ': ' -}}
            {{- json(item) -}}
        {%- endfor -%}
        {{- '}' -}}
    {%- elif value is none -%}
        {{- 'null' -}}
    {%- elif value is boolean -%}
        {{- 'true' if value else 'false' -}}
    {%- elif value is sequence -%}
        {{- '[' -}}
        {%- for item in value -%}
            {{- '' if loop.first else ', ' -}}
            {{- json(item) -}}
        {%- endfor -%}
        {{- ']' -}}
    {%- else -%}
        {{- value -}}
    {%- endif -%}
{%- endmacro -%}

{%- if tools -%}
    {{- '<|im_start|>system\n' -}}
    {%- if messages[0].role == 'system' and messages[0].content -%}
        {{- messages[0].content + '\n\n' -}}
    {%- endif -%}
    {{- BEFORE_TOOLS -}}
    {%- for tool in tools -%}
        {{- json(tool) -}}
        {{- '\n' -}}
    {%- endfor -%}
    {{- AFTER_TOOLS -}}
    {{- '<|im_end|>\n' -}}
{%- endif -%}

{%- for message in messages -%}
    {%- set content = message.content if message.content is string else '' -%}
    {%- if message.role == 'tool' -%}
        {{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' else '' -}}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' -}}
        {{- '<|im_end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- if message.reasoning_content -%}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' -}}
        {%- endif -%}
        {{- content -}}
        {%- if message.tool_calls and message.tool_calls is string -%}
            {{- raise_exception('tool_calls must be a list, not its JSON text') -}}
        {%- endif -%}
        {%- for tool_call in message.tool_calls or [] -%}
            {%- set call = tool_call.function or tool_call -%}
            {%- set arguments = call.arguments or {} -%}
            {{- '\n' if content or not loop.first else '' -}}
            {{- '<tool_call>\n{"name": ' -}}
            {{- json(call.name) -}}
            {{- ', "arguments": ' -}}
            {{- arguments if arguments is string else json(arguments) -}}
            {{- '}\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- elif not (message.role == 'system' and loop.first and tools) -%}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}

{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if open_thinking -%}
        {{- '<think>\n' -}}
    {%- elif open_thinking is defined or (enable_thinking is defined and not enable_thinking) -%}
        {{- '<think>\n\n</think>\n\n' -}}
    {%- endif -%}
{%- endif -%}
""".strip()
    .replace("BEFORE_TOOLS", repr(_BEFORE_TOOLS))
    .replace("AFTER_TOOLS", repr(_AFTER_TOOLS))
)
"""Variables: ``messages`` as above but their calls parsed, ``tools`` (a list), and
``add_generation_prompt``; with that ``open_thinking`` (MiniMind's name: true begins a thought,
false writes an empty one) or ``enable_thinking`` (Qwen's: false writes an empty one). Without
these the assistant decides.
"""
