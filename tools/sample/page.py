"""The page of sample.py --serve: drop or record a clip, ask about it, see where the model listened.

A clip is heard once, for all questions about it, while it is among the last few. Questions of all visitors
wait in one line, one is answered at a time. Nothing is fetched from elsewhere, and nothing is sent there.
"""
import functools
import html
import os
import socket
import threading

from data import truncation_warning
from tools.common import UserError
from tools.sample import attention_map as listening
from tools.sample.asking import growing, hear_clips, load_clips

LINE = 64  # questions that may wait
KEPT = 4  # clips whose keys and values are kept: half a gigabyte each, of a 3B model that hears 5 minutes
QUESTIONS = ["What happens in this clip?", "Which sounds can be heard, and in which order?",
             "Describe the mood of this recording.", "Is anyone speaking?"]
CSS = "footer {display: none} #note textarea {color: #b45309}"


def gradio():
    """The package; ModuleNotFoundError says how to get it."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        import gradio
        import matplotlib  # noqa: F401 - for the picture
    except ModuleNotFoundError as error:
        line = "pip install -r requirements-page.txt"
        raise UserError(f"--serve needs {error.name}: {line}") from error
    return gradio


def check(c):
    """What would end the page, told before the model is loaded."""
    gradio()
    if min(c.upload_mb, c.upload_seconds) < 1:
        raise UserError(f"upload_mb = {c.upload_mb}, upload_seconds = {c.upload_seconds}: expected more")
    try:
        family = socket.AF_INET6 if ":" in c.host else socket.AF_INET
        socket.create_server((c.host, c.port), family=family).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"host = {c.host}, port = {c.port}: {error}") from error


def shown(text):
    """As characters, never markup."""
    return html.escape(text.strip(), quote=False)


class Clip:
    """What is kept of a clip: windows, and the keys and values that all questions share."""

    def __init__(self, path, model, c):
        try:
            self.windows, n_windows, (unheard,) = load_clips([path], model)
        except (UserError, FileNotFoundError) as error:  # the name as the visitor knows it
            raise UserError(str(error).replace(os.path.dirname(path) + os.sep, "")) from error
        length, overlap = model.audio_config["window_length"], model.audio_config["window_overlap"]
        seconds = unheard + len(self.windows) * (length - overlap) + overlap
        if seconds > c.upload_seconds:
            name = os.path.basename(path)
            raise UserError(f"{name}: {seconds:.0f} s, expected at most {c.upload_seconds}")
        self.n_windows = n_windows.tolist()
        self.heard = hear_clips(self.windows, n_windows, model)
        self.note = truncation_warning(1, int(unheard > 0), unheard, model.audio_config) or ""


def build(model, c):
    """-> the page, a gradio Blocks."""
    gr = gradio()
    turn = threading.Lock()  # also where somebody leaves while his answer is made
    clip_at = functools.lru_cache(KEPT)(lambda path: Clip(path, model, c))  # a path holds its file's hash

    def ask(path, prompt, chat, about):
        """-> chat, the clip it is about, picture, note, the question's field; again as words come."""
        chat, prompt = list(chat or []), (prompt or "").strip()
        if not path or not prompt:
            missing = "Ask a question." if path else "Record a clip or drop a file first."
            yield chat, about, gr.skip(), missing, prompt
            return
        before = chat if path == about else []
        said = {"role": "assistant", "content": "…"}
        chat = [*before, {"role": "user", "content": shown(prompt)}, said]
        yield chat, path, None, "" if before else "listening", ""
        try:
            with turn:
                clip = clip_at(path)
                for text in growing(model, (prompt, clip.windows, clip.n_windows), clip.heard, c):
                    said["content"] = shown(text) or "…"
                    yield chat, path, gr.skip(), clip.note, gr.skip()  # the next question may be typed by now
                told = listening.timeline(model, prompt, text, clip.windows, clip.heard)
            said["content"] = shown(text) or "(no answer)"
            yield chat, path, listening.picture(told, clip.windows), clip.note, gr.skip()
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
    return page.queue(max_size=LINE, default_concurrency_limit=1)


def serve(model, c):
    page, theme = build(model, c), gradio().themes.Default(font=["sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = page.launch(
            server_name=c.host, server_port=c.port or None, max_file_size=c.upload_mb * 2 ** 20, share=False,
            theme=theme, css=CSS, footer_links=[], ssr_mode=False, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"port = {c.port}, host = {c.host}: {error}") from error
    print(address, flush=True)
    page.block_thread()
