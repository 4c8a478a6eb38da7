"""The page of sample.py --serve: drop or record a clip, ask about it, see its cross-attention over time.

The audio keys and values of the last few clips are kept for further questions. Questions of all visitors wait
in one queue and are answered one at a time. Nothing is fetched from elsewhere, and nothing is sent there.
"""
import html
import os
import threading
from functools import lru_cache, partial

from tools.common import UserError, optional_import
from tools.sample.asking import load_clips, sampling_of
from tools.sample.attention_map import attention_timeline, timeline_figure
from tools.sample.decoding import check_text, stream_text

MAX_QUEUE = 64  # questions that may wait
CACHED_CLIPS = 4  # half a gigabyte each, of a 3B model and 5 minutes
CSS = "footer {display: none} #note textarea {color: #b45309}"


def import_gradio():
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    optional_import("matplotlib", "--serve", "page")  # for the picture
    return optional_import("gradio", "--serve", "page")


def as_text(text):
    """Characters, never markup."""
    return html.escape(text.strip(), quote=False)


def load_clip(path, model):
    """load_clips of a visitor's file."""
    try:
        return load_clips([path], model)
    except (UserError, FileNotFoundError) as error:
        folder = os.path.dirname(path) + os.sep  # the visitor knows the name alone
        raise UserError(str(error).replace(folder, "")) from error


def build_page(model, c):
    """-> gradio.Blocks."""
    gr = import_gradio()
    lock = threading.Lock()  # held even when a visitor leaves while his answer is generated
    cached_clip = lru_cache(CACHED_CLIPS)(partial(load_clip, model=model))  # paths hold a hash

    def ask(path, prompt, chat, about):
        """Yield chat, the path it is about, picture, note and the question's field, again as words come."""
        prompt = (prompt or "").strip()
        try:
            check_text(prompt)
        except UserError as error:
            yield chat, about, gr.skip(), str(error), ""
            return
        if not path or not prompt:
            yield chat, about, gr.skip(), "Record or drop a clip, and ask a question.", prompt
            return
        before = list(chat or []) if path == about else []
        reply = {"role": "assistant", "content": "…"}
        chat = [*before, {"role": "user", "content": as_text(prompt)}, reply]
        yield chat, path, None, "" if before else "listening", ""
        try:
            with lock:
                windows, counts, audio_kv, note = cached_clip(path)
                texts = stream_text(model, (prompt, windows, counts), audio_kv, sampling_of(c))
                for text in texts:
                    reply["content"] = as_text(text) or "…"
                    yield chat, path, gr.skip(), note, gr.skip()  # the next question may be typed by now
                timeline = attention_timeline(model, prompt, text, windows, audio_kv)
            yield chat, path, timeline_figure(timeline, windows), note, gr.skip()
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
                                    submit_btn=True, placeholder="What happens in this clip?")
                note = gr.Textbox(label="Note", elem_id="note", interactive=False, lines=1)
            with gr.Column(scale=3):
                chat = gr.Chatbot(label="Answers", elem_id="answers", render_markdown=False, height=300,
                                  buttons=[])
                picture = gr.Plot(show_label=False, elem_id="picture", format="png")
                gr.Markdown("The sound, and under it the cross-attention of each token of the last answer.")
        prompt.submit(ask, [path, prompt, chat, about], [chat, about, picture, note, prompt],
                      api_name="ask", concurrency_limit=1, show_progress="minimal")
    return page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)


def serve_page(model, c):
    page = build_page(model, c)
    themes = import_gradio().themes
    theme = themes.Default(font=["sans-serif"], font_mono=["monospace"])  # others are fetched
    _, address, _ = page.launch(
        server_name=c.host,
        server_port=c.port or None,
        max_file_size=c.upload_mb * 2 ** 20,
        theme=theme,
        css=CSS,
        footer_links=[],
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True)
    print(address, flush=True)
    page.block_thread()
