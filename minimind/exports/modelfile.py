"""What Ollama needs beside a GGUF file: a Modelfile, whose template gives what ours does.

Two things Ollama decides itself: it joins turns of one role, and writes tools and the arguments of
calls as JSON without spaces.
"""

import json
from pathlib import Path

from minimind.chat.template import turns
from minimind.chat.tokenizer import END, START

_BEFORE_TOOLS, _AFTER_TOOLS = turns([{"role": "system", "tools": ["|"]}])[0].text.split('"|"\n')
# Go's: "{{-" and "-}}" take white space away. Ollama finds the tags of thoughts and calls in the
# text, so these are not strings in it. Results of tools in a row are one turn of the user, closed
# by what follows them.
TEMPLATE = (
    r"""
{{- $results := false -}}
{{- if or .System .Tools -}}
START_system{{ "\n" }}
{{- .System -}}
{{- if .Tools -}}
{{- if .System }}{{ "\n\n" }}{{ end -}}
{{ BEFORE_TOOLS }}
{{- range .Tools }}{{ . }}{{ "\n" }}{{ end -}}
{{ AFTER_TOOLS }}
{{- end -}}
END_{{ "\n" }}
{{- end -}}
{{- range $i, $message := .Messages -}}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{- if and $results (ne .Role "tool") -}}
END_{{ "\n" }}
{{- $results = false -}}
{{- end -}}
{{- if eq .Role "user" -}}
START_user{{ "\n" }}{{ .Content }}END_{{ "\n" }}
{{- else if eq .Role "tool" -}}
{{- if not $results }}START_user{{ end -}}
{{- $results = true -}}
{{ "\n" }}<tool_response>{{ "\n" }}{{ .Content }}{{ "\n" }}</tool_response>
{{- else if eq .Role "assistant" -}}
START_assistant{{ "\n" }}
{{- if .Thinking -}}
<think>
{{ .Thinking }}
</think>{{ "\n\n" }}
{{- end -}}
{{ .Content }}
{{- range $j, $call := .ToolCalls -}}
{{- if or $j $message.Content }}{{ "\n" }}{{ end -}}
<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>
{{- end -}}
{{- if not $last }}END_{{ "\n" }}{{ end -}}
{{- end -}}
{{- if and $last (ne .Role "assistant") -}}
{{- if $results }}END_{{ "\n" }}{{ end -}}
START_assistant{{ "\n" }}
{{- if and $.IsThinkSet (not $.Think) }}{{ "<think>\n\n</think>\n\n" }}{{ end -}}
{{- end -}}
{{- end -}}
""".strip()
    .replace("START_", START)
    .replace("END_", END)
    .replace("BEFORE_TOOLS", json.dumps(_BEFORE_TOOLS))
    .replace("AFTER_TOOLS", json.dumps(_AFTER_TOOLS))
)


def write_modelfile(file: Path, model: Path, num_positions: int) -> None:
    """For `ollama create NAME -f FILE`. Answers are the likeliest, as in the model card's table."""
    text = f'''FROM ./{model.name}
TEMPLATE """{TEMPLATE}"""
PARAMETER stop "{END}"
PARAMETER num_ctx {num_positions}
PARAMETER temperature 0
PARAMETER repeat_penalty 1
'''
    file.write_text(text, encoding="utf-8")
