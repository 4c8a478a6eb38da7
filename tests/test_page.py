"""sample.py --serve: the page in a browser, and what visitors do to it."""
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile

from tests.helpers import ROOT, run

gradio_client = pytest.importorskip("gradio_client", reason="no gradio: pip install -r requirements-page.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips: a tone, another, two hours of nothing, silence, a text."""
    folder = tmp_path_factory.mktemp("clips")
    tone = np.sin(np.arange(40000) / 8) * 0.3
    soundfile.write(folder / "tone.wav", tone, 16000)
    soundfile.write(folder / "other.flac", tone[::-1][:20000], 16000)
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    with soundfile.SoundFile(folder / "long.flac", "w", 8000, 1) as f:
        for _ in range(120):
            f.write(np.zeros(60 * 8000, np.int16))
    (folder / "text.wav").write_text("no sound at all\n" * 50)
    return folder


@pytest.fixture(scope="module")
def address(tiny_config, tmp_path_factory):
    """A page of a tiny model, at a free port."""
    out = tmp_path_factory.mktemp("exp")
    run("train.py", tiny_config, f"--expdir={out}", "--run_name=tiny", "--num_epochs=1")
    command = [sys.executable, "sample.py", "--serve", "--port=0", f"--init_from={out}/tiny",
               "--max_new_tokens=40", "--temperature=1", "--upload_mb=20"]
    with open(out / "log", "w") as log:
        page = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
                                env=os.environ | {"GRADIO_TEMP_DIR": str(out / "uploads")})
    address = page.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), (out / "log").read_text()[-3000:]
    yield address
    assert page.poll() is None, (out / "log").read_text()[-3000:]  # whatever was done to it, it is there
    page.kill()


def client(address):
    return gradio_client.Client(address, verbose=False)


def ask(visitor, path, prompt):
    """-> the chat, as [(role, text)], and the note."""
    path = path and gradio_client.handle_file(str(path))
    chat, _, note, _ = visitor.predict(path, prompt, [], api_name="/ask")
    text = lambda content: content if isinstance(content, str) else "".join(part["text"] for part in content)
    return [(said["role"], text(said["content"])) for said in chat], note


def test_clips_and_questions_of_all_kinds(address, folder):
    visitor = client(address)
    for name in ("tone.wav", "silent.wav"):
        chat, note = ask(visitor, folder / name, "What <b>is</b> it?")
        assert chat[0] == ("user", "What &lt;b&gt;is&lt;/b&gt; it?")
        assert chat[1][1] not in ("", "…") and note == ""
    chat, note = ask(visitor, folder / "long.flac", "¿Qué es? 何?")
    assert chat[1][1] and "are left out" in note  # two hours, of which some are heard
    for name, prompt, saying in (("text.wav", "What?", "text.wav: not readable as audio"),
                                 ("tone.wav", "what " * 20000, "the language model was made for"),
                                 ("tone.wav", "  ", "Ask a question"), (None, "What?", "drop a file")):
        path = name and folder / name
        chat, note = ask(visitor, path, prompt)
        assert saying in note and "\n" not in note and str(folder) not in note and not chat


def test_twenty_at_once(address, folder):
    def visit(i):
        return ask(client(address), folder / ("tone.wav" if i % 2 else "text.wav"), f"Question {i}?")

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(visit, range(20)))
    for i, (chat, note) in enumerate(results):
        if i % 2:
            assert chat[0] == ("user", f"Question {i}?") and chat[1][1]
        else:
            assert "text.wav" in note and not chat


def test_who_leaves_does_not_hold_up_the_next(address, folder):
    import httpx
    path, = httpx.post(f"{address}gradio_api/upload", files={"files": open(folder / "tone.wav", "rb")}).json()
    clip = {"path": path, "meta": {"_type": "gradio.FileData"}}
    for _ in range(3):
        call = f"{address}gradio_api/call/ask"
        event = httpx.post(call, json={"data": [clip, "A long one?", []]}).json()["event_id"]
        with httpx.stream("GET", f"{call}/{event}", timeout=60) as answer:
            assert "event: generating" in next(answer.iter_lines())  # and the line is cut
    start = time.time()
    chat, _ = ask(client(address), folder / "other.flac", "And now?")
    assert chat[1][1] and time.time() - start < 60


def test_a_file_beyond_the_limit(address, folder, tmp_path):
    (tmp_path / "large.wav").write_bytes(bytes(21 * 2 ** 20))
    with pytest.raises(Exception, match="(?i)large|413|size|exceed"):
        ask(client(address), tmp_path / "large.wav", "What?")


MESSAGES = "#answers [data-testid=user], #answers [data-testid=bot]"
BROWSER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture
def browser():
    if None in BROWSER:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(BROWSER[1]))
    yield driver
    driver.quit()


def test_in_a_browser(address, folder, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    find = lambda selector: browser.find_elements(By.CSS_SELECTOR, selector)
    wait = lambda what: WebDriverWait(browser, 60, 0.1).until(lambda _: what())
    texts = lambda selector: [one.text for one in find(selector)]
    note = lambda: (find("#note textarea") or [None])[0] and find("#note textarea")[0].get_attribute("value")

    def drop(name):
        if removal := find("#clip button[aria-label='Clear']"):
            removal[0].click()
        wait(lambda: find("#clip input[type=file]"))[0].send_keys(str(folder / name))

    def put(question):
        field = wait(lambda: find("#question textarea"))[0]
        field.clear()
        field.send_keys(question)
        find("#question button")[-1].click()

    browser.get(address)
    put("Is anybody there?")
    wait(lambda: "drop a file" in (note() or ""))
    drop("tone.wav")
    wait(lambda: find("#clip button[aria-label='Clear']"))
    put("A <i>tone</i>?")
    wait(lambda: any("A <i>tone</i>?" in text for text in texts(MESSAGES)))  # as characters
    wait(lambda: find("#picture img"))
    assert len(texts(MESSAGES)) == 2 and all(texts(MESSAGES))
    first = find("#picture img")[0].get_attribute("src")
    put("And then?")
    wait(lambda: len(texts(MESSAGES)) == 4)
    wait(lambda: find("#picture img") and find("#picture img")[0].get_attribute("src") != first)
    drop("text.wav")
    time.sleep(1)  # the player says nothing of what it can't play
    put("What is this?")
    wait(lambda: "text.wav: not readable as audio" in (note() or ""))
    browser.get(address)  # again: an empty page that works
    drop("other.flac")
    wait(lambda: find("#clip button[aria-label='Clear']"))
    put("Still there?")
    wait(lambda: find("#picture img"))
    assert len(texts(MESSAGES)) == 2
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert asked and all(name.startswith((address, "blob:", "data:")) for name in asked), asked
