"""The page of sample.py --serve: drop or record a clip, ask about it, see where the model listened.

A clip is heard once, for all questions about it. Questions of all visitors wait in one line, one is answered
at a time. Nothing is fetched from elsewhere, and nothing is sent there.
"""
import html
import os
import threading

from data import unheard_note
from tools import listening
from tools.asking import growing, hear_clips, load_clips

LINE = 64  # questions that may wait
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
        raise ModuleNotFoundError(f"--serve needs {error.name}: {line}") from error
    return gradio


def shown(text):
    """As characters, never markup."""
    return html.escape(text.strip(), quote=False)


class Clip:
    """What is kept of a visitor's clip: windows, and the keys and values that all questions share."""

    def __init__(self, path, model, c):
        try:
            self.windows, n_windows, (unheard,) = load_clips([path], model)
        except (ValueError, FileNotFoundError) as error:  # the name as the visitor knows it
            raise ValueError(str(error).replace(os.path.dirname(path) + os.sep, "")) from error
        length, overlap = model.hearing["window_length"], model.hearing["window_overlap"]
        seconds = unheard + len(self.windows) * (length - overlap) + overlap
        if seconds > c.upload_seconds:
            name = os.path.basename(path)
            raise ValueError(f"{name}: {seconds:.0f} s, expected at most {c.upload_seconds}")
        self.path, self.n_windows = path, n_windows.tolist()
        self.heard = hear_clips(self.windows, n_windows, model)
        self.note = unheard_note(1, int(unheard > 0), unheard, model.hearing) or ""


def build(model, c):
    """-> the page, a gradio Blocks."""
    gr = gradio()
    turn = threading.Lock()  # also where somebody leaves while his answer is made

    def ask(path, prompt, chat, clip):
        """-> chat, clip, picture, note, what is left in the question's field; again and again."""
        chat, prompt = list(chat or []), (prompt or "").strip()
        if not path or not prompt:
            missing = "Ask a question." if path else "Record a clip or drop a file first."
            yield chat, clip, gr.skip(), missing, prompt
            return
        new = clip is None or clip.path != path
        chat = [] if new else chat
        said = {"role": "assistant", "content": "…"}
        before, chat = chat, [*chat, {"role": "user", "content": shown(prompt)}, said]
        yield chat, None if new else clip, None, "listening" if new else "", ""
        try:
            with turn:
                clip = Clip(path, model, c) if new else clip
                for text in growing(model, (prompt, clip.windows, clip.n_windows), clip.heard, c):
                    said["content"] = shown(text) or "…"
                    yield chat, clip, gr.skip(), clip.note, ""
                told = listening.timeline(model, prompt, text, clip.windows, clip.heard)
            said["content"] = shown(text) or "(no answer)"
            yield chat, clip, listening.picture(told, clip.windows), clip.note, ""
        except (ValueError, FileNotFoundError) as error:
            yield before, None if new else clip, None, str(error), prompt

    with gr.Blocks(title="Audio Flamingo", delete_cache=(600, 3600)) as page:
        clip = gr.State(None, time_to_live=3600)
        gr.Markdown("### Ask about a sound")
        with gr.Row():
            with gr.Column(scale=2):
                path = gr.Audio(type="filepath", sources=["upload", "microphone"], label="Clip",
                                elem_id="clip", editable=False, buttons=["download"])
                prompt = gr.Textbox(label="Question", elem_id="question", lines=2, submit_btn=True,
                                    placeholder="What do you want to know about it?")
                gr.Examples(QUESTIONS, prompt, label="Questions, for example")
                note = gr.Textbox(label="Note", elem_id="note", interactive=False, lines=1)
            with gr.Column(scale=3):
                chat = gr.Chatbot(label="Answers", elem_id="answers", render_markdown=False, height=300,
                                  buttons=[])
                picture = gr.Plot(show_label=False, elem_id="picture", format="png")
                gr.Markdown("The sound, and under it where each word of the last answer listened.")
        prompt.submit(ask, [path, prompt, chat, clip], [chat, clip, picture, note, prompt],
                      api_name="ask", concurrency_limit=1, show_progress="minimal")
    return page.queue(max_size=LINE, default_concurrency_limit=1)


def serve(model, c):
    page, theme = build(model, c), gradio().themes.Default(font=["sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = page.launch(
            server_name=c.host, server_port=c.port or None, max_file_size=c.upload_mb * 2 ** 20, share=False,
            theme=theme, css=CSS, footer_links=[], ssr_mode=False, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise ValueError(f"port = {c.port}, host = {c.host}: {error}") from error
    print(address, flush=True)
    page.block_thread()
