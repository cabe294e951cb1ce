"""The Modelfile's template, rendered by Go as Ollama does it, is our chat template."""

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from minimind.chat.template import turns
from minimind.chat.tokenizer import END, START
from minimind.exports.modelfile import TEMPLATE

# As much of Ollama as its templates see: tools and arguments are written as JSON without spaces.
PROGRAM = r"""
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Raw struct{ json.RawMessage }

func (r Raw) String() string { return string(r.RawMessage) }

type Call struct{ Function struct{ Name string; Arguments Raw } }
type Message struct{ Role, Content, Thinking string; ToolCalls []Call }
type Values struct{ System string; Messages []Message; Tools []Raw; Think, IsThinkSet bool }

func main() {
	text, _ := os.ReadFile(os.Args[1])
	tmpl := template.Must(template.New("").Parse(string(text)))
	var asked []Values
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	said := []string{}
	for _, values := range asked {
		var out strings.Builder
		if err := tmpl.Execute(&out, values); err != nil {
			panic(err)
		}
		said = append(said, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(said)
}
"""
TOOL = {"type": "function", "function": {"name": "f"}}


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def conversation(rng: random.Random) -> tuple[dict[str, Any], str]:
    """What Ollama's templates get, and the text that our template gives."""

    def text() -> str:
        return rng.choice(["", " a\n", "你好<|im_end|>", "{{ x }}", '"b" \\n', "\n\n"])

    system, tools = text(), [TOOL] * rng.randint(0, 2)
    messages: list[dict[str, Any]] = [{"role": "user", "content": text()}]
    for _ in range(rng.randint(0, 5)):
        before = messages[-1]["role"]
        roles = ["tool", "user", "assistant"] if before == "tool" else ["assistant", "tool"]
        roles = [role for role in roles if role != before or role == "tool"]
        said: dict[str, Any] = {"role": rng.choice(roles), "content": text()}
        if said["role"] == "assistant":
            said["reasoning_content"] = text()
            calls = rng.randint(0, 2)
            said["tool_calls"] = [{"name": "f", "arguments": compact({"x": text()})}] * calls
        messages.append(said)
    if messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": text()})
    first = {"role": "system", "content": system, "tools": tools}
    ours = turns([first, *messages] if system or tools else messages)
    expected = "".join(f"{START}{turn.role}\n{turn.text}{END}\n" for turn in ours)
    expected = expected.replace(json.dumps(TOOL), compact(TOOL)) + f"{START}assistant\n"
    is_set, think = rng.choice([(False, False), (True, True), (True, False)])
    expected += "<think>\n\n</think>\n\n" if is_set and not think else ""
    theirs = [
        {
            "Role": message["role"],
            "Content": message["content"],
            "Thinking": message.get("reasoning_content", ""),
            "ToolCalls": [
                {"Function": {"Name": call["name"], "Arguments": json.loads(call["arguments"])}}
                for call in message.get("tool_calls", [])
            ],
        }
        for message in messages
    ]
    values = {"System": system, "Messages": theirs, "Tools": tools}
    return values | {"Think": think, "IsThinkSet": is_set}, expected


@pytest.mark.skipif(not shutil.which("go"), reason="no go")
def test_ollama_s_template_gives_what_ours_gives(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(PROGRAM)
    (tmp_path / "template").write_text(TEMPLATE)
    rng = random.Random(1)
    asked, expected = zip(*(conversation(rng) for _ in range(500)), strict=True)
    found = subprocess.run(
        ["go", "run", "main.go", "template"],
        cwd=tmp_path,
        input=json.dumps(asked, ensure_ascii=False, separators=(",", ":")),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert json.loads(found.stdout) == list(expected)
