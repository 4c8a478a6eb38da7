"""sample.py --serve: the page in a browser, and what visitors do to it."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile

from tests.helpers import ROOT

pytestmark = pytest.mark.slow

gradio_client = pytest.importorskip("gradio_client", reason="no gradio: pip install -r requirements-page.txt")
httpx = pytest.importorskip("httpx", reason="no httpx: pip install -r requirements-page.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips: a tone, another, two hours of nothing, a text."""
    folder = tmp_path_factory.mktemp("clips")
    tone = np.sin(np.arange(40000) / 8) * 0.3
    soundfile.write(folder / "tone.wav", tone, 16000)
    soundfile.write(folder / "other.flac", tone[::-1][:20000], 16000)
    soundfile.write(folder / "long.flac", np.zeros(7200 * 8000, np.int16), 8000)
    (folder / "text.wav").write_text("no sound at all\n" * 50)
    return folder


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory):
    """A page of that model, at a free port."""
    out = tmp_path_factory.mktemp("page")
    command = [sys.executable, "sample.py", "--serve", "--port=0", f"--init_from={trained}/tiny",
               "--max_new_tokens=40", "--temperature=1", "--upload_mb=20"]
    with open(out / "log", "w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
                                  env=os.environ | {"GRADIO_TEMP_DIR": str(out / "uploads")})
    address = server.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), (out / "log").read_text()[-3000:]
    yield address.rstrip("/")
    assert server.poll() is None, (out / "log").read_text()[-3000:]  # whatever was done to it, it is there
    server.kill()


def ask(address, path, prompt):
    """-> the chat, as [(role, text)], and the note."""
    visitor = gradio_client.Client(address, verbose=False)
    path = path and gradio_client.handle_file(str(path))
    chat, _, note, _ = visitor.predict(path, prompt, [], api_name="/ask")
    texts = []
    for message in chat:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        texts.append((message["role"], text))
    return texts, note


def test_clips_and_questions_of_all_kinds(address, folder):
    chat, note = ask(address, folder / "tone.wav", "What <b>is</b> it?")
    assert chat[0] == ("user", "What &lt;b&gt;is&lt;/b&gt; it?")
    assert chat[1][1] not in ("", "…") and note == ""
    chat, note = ask(address, folder / "long.flac", "¿Qué es? 何?")
    assert chat[1][1] and "max_num_window" in note  # two hours, of which the model takes some seconds
    for name, prompt, word in (("text.wav", "What?", "text.wav"), ("tone.wav", "what " * 20000, "tokens"),
                               ("tone.wav", "  ", "question"), (None, "What?", "clip")):
        chat, note = ask(address, name and folder / name, prompt)
        assert word in note and "\n" not in note and str(folder) not in note and not chat


def test_twenty_at_once(address, folder):
    def visit(i):
        return ask(address, folder / ("tone.wav" if i % 2 else "text.wav"), f"Question {i}?")

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(visit, range(20)))
    for i, (chat, note) in enumerate(results):
        if i % 2:
            assert chat[0] == ("user", f"Question {i}?") and chat[1][1]
        else:
            assert "text.wav" in note and not chat


def events(address, clip, prompt):
    """The server's messages about a question, as a browser gets them; closing it cuts the connection."""
    api, session = f"{address}/gradio_api", {"session_hash": uuid.uuid4().hex}
    functions = httpx.get(f"{address}/config").json()["dependencies"]
    (ask,) = [function["id"] for function in functions if function["api_name"] == "ask"]
    clip = {"path": clip, "meta": {"_type": "gradio.FileData"}}
    question = json.dumps(session | {"data": [clip, prompt, [], None], "fn_index": ask})
    headers = {"content-type": "application/json"}
    httpx.post(f"{api}/queue/join", content=question, headers=headers).raise_for_status()
    with httpx.stream("GET", f"{api}/queue/data", params=session, timeout=60) as stream:
        for line in stream.iter_lines():
            event = json.loads(line[5:]) if line.startswith("data:") else {"msg": ""}
            yield event
            if event["msg"] == "process_completed":
                return


def upload(address, path):
    with open(path, "rb") as f:
        (name,) = httpx.post(f"{address}/gradio_api/upload", files={"files": f}).json()
    return name


def test_the_answer_streams_and_a_cut_connection_frees_the_queue(address, folder):
    clip = upload(address, folder / "tone.wav")
    whole = [event["msg"] for event in events(address, clip, "A long one?")]
    assert whole.count("process_generating") > 10  # 40 tokens, as they come
    for _ in range(3):
        leaver = events(address, clip, "A long one?")
        for _ in range(2):  # in the middle of the answer
            while next(leaver)["msg"] != "process_generating":
                pass
        leaver.close()
    start = time.time()
    chat, _ = ask(address, folder / "other.flac", "And now?")
    assert chat[1][1] and time.time() - start < 60


def test_half_a_surrogate_pair_gets_a_note(address, folder):
    """Sent as JSON spells it: no text that a server can send back."""
    *_, last = events(address, upload(address, folder / "tone.wav"), "What \ud83d?")
    *_, note, _ = last["output"]["data"]
    assert last["success"] and "surrogate" in note


def test_only_uploads_are_readable(address, folder):
    """Neither through the file route nor as the clip of a question."""
    outside = str(folder / "tone.wav")
    for file in (outside, "/etc/passwd", f"{ROOT}/sample.py"):
        assert httpx.get(f"{address}/gradio_api/file={file}").status_code in (403, 404)
    *_, last = events(address, outside, "What?")
    assert not last["success"]


def test_the_page_names_no_other_host(address):
    assert not re.search("(src|href)=[\"'](https?:)?//", httpx.get(address).text)


def test_a_file_beyond_the_limit(address, folder, tmp_path):
    (tmp_path / "large.wav").write_bytes(bytes(21 * 2 ** 20))
    with pytest.raises(Exception, match="(?i)large|413|size|exceed"):
        ask(address, tmp_path / "large.wav", "What?")


@pytest.fixture
def browser():
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def test_in_a_browser(address, folder, browser):
    from selenium.common.exceptions import ElementClickInterceptedException
    from selenium.webdriver.support.ui import WebDriverWait
    covered = [ElementClickInterceptedException]  # while the page is being laid out

    def find(selector):
        return browser.find_elements("css selector", selector)

    def wait(condition):
        return WebDriverWait(browser, 60, 0.1, covered).until(lambda _: condition())

    def messages():
        return [one.text for one in find("#answers [data-testid=user], #answers [data-testid=bot]")]

    def drop(name):
        wait(lambda: find("#clip input[type=file]"))[0].send_keys(str(folder / name))
        wait(lambda: find("#clip button[aria-label='Clear']"))

    def put(question):
        field = wait(lambda: find("#question textarea"))[0]
        field.clear()
        field.send_keys(question)
        wait(lambda: find("#question button")[-1].click() or True)

    browser.get(address)
    drop("tone.wav")
    put("A <i>tone</i>?")
    wait(lambda: any("A <i>tone</i>?" in text for text in messages()))  # as characters
    wait(lambda: find("#picture img"))
    assert len(messages()) == 2 and all(messages())
    put("And then?")
    wait(lambda: len(messages()) == 4)
    browser.get(address)  # in the middle of the answer: an empty page that works
    drop("other.flac")
    put("Still there?")
    wait(lambda: find("#picture img"))
    assert len(messages()) == 2
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert fetched and all(name.startswith((address, "blob:", "data:")) for name in fetched), fetched
