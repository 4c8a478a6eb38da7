"""A metric or tokenizer of pycocoevalcap in a process of its own, which ends with the Java program that it
starts when its time is over. captions.py runs it.

stdin: [seconds, class, method, arguments] in JSON; the last line of stdout: {"result"} or {"failed": reason}.
"""
import json
import os
import pydoc
import signal
import sys


def end(*_):
    os.killpg(0, signal.SIGKILL)  # METEOR's __del__ would wait for its lock for ever


def main():
    os.setsid()
    seconds, name, method, arguments = json.load(sys.stdin)
    signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        tool = pydoc.locate(name)()
        outcome = {"result": getattr(tool, method)(*arguments)}
    except Exception as error:  # the library checks neither its Java program nor what that prints
        outcome = {"failed": f"the library or its Java program failed ({error!r})"}
    print("\n" + json.dumps(outcome, default=lambda array: array.tolist()), flush=True)
    end()


if __name__ == "__main__":
    main()
