"""The chat in a browser: several checkpoints side by side, on the same questions."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from html import escape
from typing import Any

from minimind.errors import UserError
from minimind.talk.conversation import Conversation, Reply, Settings, advance, summary
from minimind.talk.parts import Kind, Part
from minimind.talk.speaker import Speaker

MOST_COLUMNS = 4
REFRESH_SECONDS = 0.1
# Each in English and Chinese.
TITLES: dict[Kind, tuple[str, str]] = {  # of what can be folded
    "thought": ("Thought", "思考"),
    "call": ("Call", "调用工具"),
    "result": ("Result", "工具结果"),
}
LABELS = {
    "question": ("Question", "问题"),
    "checkpoints": ("Checkpoints, side by side", "并排比较的检查点"),
    "again": ("Another reply", "重新回答"),
    "reset": ("New conversation", "新对话"),
    "settings": ("Settings", "设置"),
    "system": ("System prompt", "系统提示词"),
    "temperature": ("Temperature; 0: the likeliest token", "温度；0 表示取概率最大的 token"),
    "top_p": ("Top p", "Top p"),
    "seed": ("Seed", "随机种子"),
    "max_new_tokens": ("Tokens of a reply, at most", "回复最多的 token 数"),
    "think": ("Thinking", "思考"),
    "tools": ("Tools", "工具"),
    "tokens": ("Tokens: point at one for what was likely instead", "token：指向一个可看其他可能"),
    "about": ("Scores and ancestry", "得分与来历"),
}
UNKNOWN = "No stage of this project made it.", "不是本项目的任何阶段生成的。"
NONE_CHOSEN = "Choose a checkpoint first.", "请先勾选检查点。"
TOO_MANY = f"At most {MOST_COLUMNS} side by side.", f"最多并排 {MOST_COLUMNS} 个。"
NO_SEED = "The seed is 0 or more.", "随机种子不能小于 0。"
# 3*4*5 stays as it is. No button copies: it would copy `&lt;` where < is shown.
CHATBOT = {"render_markdown": False, "height": 380, "buttons": []}
# Of the box, and of what says so, where its question is being answered.
EMPTIED = "(typed, answered) => [typed === answered ? '' : typed, '']"
CSS = """
footer, .chat .top-panel { display: none !important }
div:has(.tokens) { overflow: visible !important }
.chat .md { white-space: pre-wrap }
.tokens { line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere }
.token { position: relative; border-radius: 3px; padding: 1px 0; cursor: help;
  background: rgb(220 60 40 / calc(.75 - .75 * var(--p))) }
.token > span { display: none; position: absolute; z-index: 9; left: 0; top: 1.7em;
  padding: .4em .7em; border: 1px solid #888; border-radius: 6px; font-size: .85em;
  color: #fff; background: #222; white-space: pre }
.token:hover > span, .token:focus > span { display: block }
@media (max-width: 640px), (max-height: 500px) {
  .chat { height: min(250px, 60vh) !important }
  .tokens { max-height: 40vh; overflow-y: auto }
  .token > span { position: fixed; left: 1em; bottom: 1em; top: auto }
}
"""


@dataclass
class Visit:
    """What one window of a browser talks about; its settings hold for all its conversations."""

    is_chinese: bool = False
    settings: Settings = field(default_factory=Settings)
    conversations: dict[str, Conversation] = field(default_factory=dict)


def page(
    names: list[str],
    shown: int,
    open_speaker: Callable[[str], Speaker],
    about: Callable[[str, bool], str],
) -> Any:
    """The page as Gradio's Blocks.

    names: of checkpoints that may be talked to, of which the first `shown` are at the start.
    about: Markdown of one, in Chinese or English.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr  # an extra, and takes seconds

    open_once, known_of = cache(open_speaker), cache(about)
    i18n = words()

    def is_chinese(request: gr.Request) -> bool:
        """Of the browser's first language, as Gradio's labels, the only thing it translates."""
        return request.headers.get("accept-language", "").lower().startswith("zh")

    def talking(
        visit: Visit | None, chosen: list[str], request: gr.Request
    ) -> tuple[Visit, list[Conversation]]:
        visit = visit or Visit()
        visit.is_chinese = is_chinese(request)
        for name in chosen:
            if name not in visit.conversations:
                try:
                    visit.conversations[name] = Conversation(open_once(name), visit.settings)
                except UserError as error:
                    raise gr.Error(escape(str(error)), print_exception=False) from None
        return visit, [visit.conversations[name] for name in chosen]

    def show(request: gr.Request, visit: Visit | None, chosen: list[str]) -> list[Any]:
        """Other checkpoints in the columns."""
        is_more = len(chosen) > MOST_COLUMNS
        if is_more:
            gr.Warning(TOO_MANY[is_chinese(request)])
            chosen = chosen[:MOST_COLUMNS]
        visit, chats = talking(visit, chosen, request)
        # What is set is a change, too, and would be shown again without end.
        columns: list[Any] = [visit, chosen if is_more else gr.skip()]
        for number in range(MOST_COLUMNS):
            if number < len(chats):
                chat = chats[number]
                chatbot = gr.Chatbot(messages(chat, visit.is_chinese), label=chosen[number])
                columns += [gr.Column(visible=True), chatbot, gr.Column(visible=True)]
                columns.append(tokens_html(chat))
            else:
                columns += [gr.Column(visible=False), [], gr.Column(visible=False), ""]
        return columns

    def describe(request: gr.Request, chosen: list[str]) -> list[str]:
        """Apart from `show`: DVC takes seconds, in which somebody may ask and be answered."""
        chinese = is_chinese(request)
        known = [
            f"**{name}**\n\n{known_of(name, chinese) or UNKNOWN[chinese]}"
            for name in chosen[:MOST_COLUMNS]
        ]
        return known + [""] * (MOST_COLUMNS - len(known))

    def respond(
        request: gr.Request,
        visit: Visit | None,
        chosen: list[str],
        question: str | None,
        *said: Any,
    ) -> Iterator[list[Any]]:
        """Replies as they grow, to a question or, where that is None, to the last one again."""
        visit, chats = talking(visit, chosen[:MOST_COLUMNS], request)
        is_empty = question is not None and not question.strip()
        seed = int(said[3] or 0)
        if not chats or is_empty or seed < 0:
            if not is_empty:
                gr.Warning((NO_SEED if chats else NONE_CHOSEN)[visit.is_chinese])
            yield [visit, gr.skip(), *columns(visit, chosen, request)]
            return
        settings = visit.settings
        settings.system, settings.temperature, settings.top_p = said[:3]
        settings.seed, settings.max_new_tokens = seed, said[4]
        settings.think, settings.tools = said[5:]
        growing: dict[Conversation, Iterator[Reply]] = {
            chat: chat.regenerate() if question is None else chat.ask(question.strip())
            for chat in chats
        }
        replies = list(growing.values())
        last = 0.0
        try:
            while growing:
                for chat, error in advance(growing).items():
                    gr.Warning(escape(f"{chat.speaker.name}: {error}"))
                if growing and time.monotonic() - last > REFRESH_SECONDS:
                    yield [
                        visit,
                        gr.skip() if last else question or "",
                        *columns(visit, chosen, request),
                    ]
                    last = time.monotonic()
            yield [visit, gr.skip(), *columns(visit, chosen, request)]
        finally:
            for reply in replies:
                reply.close()  # type: ignore[attr-defined]

    def columns(visit: Visit, chosen: list[str], request: gr.Request) -> list[Any]:
        """As the visit has it now: an answer may outlive its conversation."""
        _, chats = talking(visit, chosen[:MOST_COLUMNS], request)
        values: list[Any] = []
        for chat in chats:
            values += [messages(chat, visit.is_chinese), tokens_html(chat)]
        return values + [gr.skip()] * (2 * MOST_COLUMNS - len(values))

    def again(
        request: gr.Request, visit: Visit | None, chosen: list[str], _: str, *said: Any
    ) -> Iterator[list[Any]]:
        yield from respond(request, visit, chosen, None, *said)

    def reset(request: gr.Request, visit: Visit | None, chosen: list[str]) -> list[Any]:
        visit, _ = talking(visit, [], request)
        visit.conversations = {}  # an answer that has yet to end has the old ones
        return [visit, *columns(visit, chosen, request)]

    with gr.Blocks(title="minimind", analytics_enabled=False, fill_width=True) as blocks:
        visit = gr.State(Visit(), time_to_live=3600)  # a copy for each window
        chosen = gr.CheckboxGroup(names, value=names[:shown], label=i18n("checkpoints"))
        slots: list[list[Any]] = []
        with gr.Row():
            for number in range(MOST_COLUMNS):
                with gr.Column(visible=number < shown, min_width=300) as column:
                    label = names[number] if number < shown else ""
                    chatbot = gr.Chatbot(**CHATBOT, label=label, elem_classes="chat")
                    slots.append([column, chatbot])
        box = gr.Textbox(label=i18n("question"), submit_btn=True, stop_btn=True, max_lines=8)
        answered = gr.Textbox(visible="hidden")  # the question, from its first token on
        with gr.Row():
            regenerate = gr.Button(i18n("again"), size="sm", min_width=120)
            anew = gr.Button(i18n("reset"), size="sm", min_width=120)
        with gr.Row():
            for number, slot in enumerate(slots):
                with gr.Column(visible=number < shown, min_width=300) as column:
                    with gr.Accordion(i18n("tokens"), open=False):
                        tokens = gr.HTML()
                    with gr.Accordion(i18n("about"), open=False):
                        slot += [column, tokens, gr.Markdown()]
        with gr.Accordion(i18n("settings"), open=False):
            inputs = [
                gr.Textbox(label=i18n("system")),
                gr.Slider(0, 2, 0, step=0.05, label=i18n("temperature")),
                gr.Slider(0.05, 1, 1, step=0.05, label=i18n("top_p")),
                gr.Number(1, precision=0, label=i18n("seed")),
                gr.Slider(1, 2048, 512, step=1, label=i18n("max_new_tokens")),
                gr.Checkbox(True, label=i18n("think")),
                gr.Checkbox(False, label=i18n("tools")),
            ]
        both = [part for slot in slots for part in (slot[1], slot[3])]
        asked = [visit, chosen, box, *inputs]
        grown = [visit, answered, *both]
        answering = [  # one after the other: a conversation has one reply that grows
            box.submit(respond, asked, grown, concurrency_id="answers"),
            regenerate.click(again, asked, grown, concurrency_id="answers"),
        ]
        # What was typed meanwhile, or sent in vain, stays in the box.
        boxes = [box, answered]
        answered.change(None, boxes, boxes, js=EMPTIED)
        box.stop(lambda: None, cancels=answering)
        every = [visit, chosen, *[part for slot in slots for part in slot[:4]]]
        for event in (anew.click, chosen.change):  # at first: Gradio waits for each before the next
            event(None, cancels=answering)
        # One after the other, or what one of them has read before the other ended would be shown.
        turns = {"concurrency_id": "columns"}
        anew.click(reset, [visit, chosen], [visit, *both], **turns)
        chatbots = [slot[1] for slot in slots]
        chosen.change(show, [visit, chosen], every, show_progress_on=chatbots, **turns)
        for event in (blocks.load, chosen.change):
            event(describe, chosen, [slot[4] for slot in slots])
    return blocks


def words() -> Any:
    """Labels in the language of the browser."""
    import gradio as gr

    english, chinese = ({key: of[n] for key, of in LABELS.items()} for n in (0, 1))
    return gr.I18n(**{"en": english, "zh-CN": chinese, "zh": chinese, "zh-TW": chinese})


def messages(chat: Conversation, is_chinese: bool = False) -> list[dict[str, Any]]:
    """A conversation as Gradio's Chatbot shows it, thoughts and calls of tools foldable.

    As HTML, which it takes text for without Markdown, too: a model's <img> would load a picture.
    """
    shown: list[dict[str, Any]] = []
    for said in chat.history:
        if said["role"] == "user":
            shown.append({"role": "user", "content": escape(said["content"], quote=False)})
            continue
        reply = Reply(messages=[said])
        for part in reply.parts or [Part("answer", "—")]:
            text = escape(part.text, quote=False)
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if title := TITLES.get(part.kind):
                message["metadata"] = {"title": title[is_chinese]}
            shown.append(message)
    return shown


def tokens_html(chat: Conversation) -> str:
    """The last reply's tokens, the less likely the redder; each with what was likely instead."""
    if not chat.reply:
        return ""

    def text(id_: int) -> str:
        return escape(chat.speaker.token_text(id_))

    spans = []
    for token in chat.reply.tokens:
        likely = {**dict(token.alternatives), token.id: token.logprob}
        lines = [f"{100 * math.exp(value):5.1f} %  {text(id_)!r}" for id_, value in likely.items()]
        style = f"--p:{math.exp(token.logprob):.2f}"
        spans.append(
            f'<span class="token" tabindex="0" style="{style}">{text(token.id)}'
            f"<span>{chr(10).join(lines)}</span></span>"
        )
    note = escape(" ".join(filter(None, (chat.reply.note, summary(chat.reply)))))
    name = escape(chat.speaker.name)
    return f'<b>{name}</b><div class="tokens">{"".join(spans)}</div><p>{note}</p>'


def serve(blocks: Any, host: str, port: int | None, password: str | None, **options: Any) -> None:
    """Serve the page until Ctrl-C.

    port: None for any that is free.
    options: of Gradio's `launch`.
    """
    import gradio as gr

    blocks.launch(
        server_name=host,
        server_port=port,
        auth=("minimind", password) if password else None,
        i18n=words(),
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
        share=False,
        quiet=True,
        **options,
        footer_links=[],
    )
