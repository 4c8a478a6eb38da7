"""The page of sample.py --serve: drop or record a clip, ask about it, see where the model listened.

The audio keys and values of the last few clips are kept for further questions. Questions of all visitors wait in
one queue and are answered one at a time. Nothing is fetched from elsewhere, and nothing is sent there.
"""
import functools
import html
import os
import threading

import torch

from data import window_counts
from tools.common import UserError, optional_import
from tools.sample.asking import load_clips, sampling_of, truncation_note
from tools.sample.attention_map import attention_timeline, timeline_figure
from tools.sample.decoding import encode_audio_kv, stream_text

MAX_QUEUE = 64  # questions that may wait
CACHED_CLIPS = 4  # half a gigabyte each, of a 3B model and 5 minutes
QUESTIONS = ["What happens in this clip?", "Which sounds can be heard, and in which order?",
             "Describe the mood of this recording.", "Is anyone speaking?"]
CSS = "footer {display: none} #note textarea {color: #b45309}"


def import_gradio():
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    optional_import("matplotlib", "--serve", "page")  # for the picture
    return optional_import("gradio", "--serve", "page")


def as_text(text):
    """Characters, never markup."""
    return html.escape(text.strip(), quote=False)


class Clip:
    """A clip of a visitor: its windows, its audio keys and values, a note if it was truncated."""

    def __init__(self, path, model):
        try:
            self.windows, self.n_windows, truncated = load_clips([path], model)
        except (UserError, FileNotFoundError) as error:  # the name as the visitor knows it
            raise UserError(str(error).replace(os.path.dirname(path) + os.sep, "")) from error
        with torch.no_grad():
            self.audio_kv = encode_audio_kv(model.eval(), self.windows, window_counts([self.n_windows]))
        self.note = truncation_note(truncated, model)


def build_page(model, c):
    """-> gradio.Blocks."""
    gr = import_gradio()
    lock = threading.Lock()  # held even when a visitor leaves while his answer is generated
    load_clip = functools.lru_cache(CACHED_CLIPS)(lambda path: Clip(path, model))  # uploads are named by their hash

    def ask(path, prompt, chat, about):
        """Yield chat, the path it is about, picture, note and the question's field, again as words come."""
        prompt = (prompt or "").strip()
        if not path or not prompt:
            yield chat, about, gr.skip(), "Ask a question." if path else "Record a clip or drop a file first.", prompt
            return
        before = list(chat or []) if path == about else []
        reply = {"role": "assistant", "content": "…"}
        chat = [*before, {"role": "user", "content": as_text(prompt)}, reply]
        yield chat, path, None, "" if before else "listening", ""
        try:
            with lock:
                clip = load_clip(path)
                item = prompt, clip.windows, clip.n_windows
                for text in stream_text(model, item, clip.audio_kv, sampling_of(c), c.reasoning):
                    reply["content"] = as_text(text) or "…"
                    yield chat, path, gr.skip(), clip.note, gr.skip()  # the next question may be typed by now
                timeline = attention_timeline(model, prompt, text, clip.windows, clip.audio_kv)
            yield chat, path, timeline_figure(timeline, clip.windows), clip.note, gr.skip()
        except (UserError, FileNotFoundError) as error:
            yield before, path, None, str(error), prompt

    with gr.Blocks(title="Audio Flamingo", delete_cache=(600, 3600)) as page:
        about = gr.State(None)  # path of the clip that the chat is about
        gr.Markdown("### Ask about a sound")
        with gr.Row():
            with gr.Column(scale=2):
                path = gr.Audio(type="filepath", sources=["upload", "microphone"], label="Clip",
                                elem_id="clip", editable=False, buttons=["download"])
                prompt = gr.Textbox(label="Question", elem_id="question", lines=2, max_lines=6,
                                    submit_btn=True, placeholder="What do you want to know about it?")
                gr.Examples(QUESTIONS, prompt, label="Questions, for example")
                note = gr.Textbox(label="Note", elem_id="note", interactive=False, lines=1)
            with gr.Column(scale=3):
                chat = gr.Chatbot(label="Answers", elem_id="answers", render_markdown=False, height=300,
                                  buttons=[])
                picture = gr.Plot(show_label=False, elem_id="picture", format="png")
                gr.Markdown("The sound, and under it where each word of the last answer listened.")
        prompt.submit(ask, [path, prompt, chat, about], [chat, about, picture, note, prompt],
                      api_name="ask", concurrency_limit=1, show_progress="minimal")
    return page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)


def serve_page(model, c):
    page, theme = build_page(model, c), import_gradio().themes.Default(font=["sans-serif"], font_mono=["monospace"])
    _, address, _ = page.launch(
        server_name=c.host, server_port=c.port or None, max_file_size=c.upload_mb * 2 ** 20, share=False,
        theme=theme, css=CSS, footer_links=[], ssr_mode=False, quiet=True, prevent_thread_lock=True)
    print(address, flush=True)
    page.block_thread()
