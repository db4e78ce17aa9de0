"""`infinilm chat`: lines in, answers out, in a pipe and on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints_made import write_llama

from infinilm.cli import main
from infinilm.cli.chat import HELP

DEMO = Path(__file__).parent.parent.parent / "example_plugins" / "minimal"
COMMAND = ["-p", "no:minimal", "-p", str(DEMO / "infinilm_minimal.py"), "chat", str(DEMO / "model")]


def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, *words: str
) -> tuple[int, list[str], str]:
    """Return exit code, lines and errors of a chat whose input is `text`."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = main([*COMMAND, "--kv-cache-memory", "16M", *words])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_lines_of_a_pipe_are_answered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = "seven plus eight\n\nthree minus nine\n/exit\none plus one\n"
    assert chat(monkeypatch, capsys, text) == (0, [" fifteen", " minus six"], "")


def test_conversation_goes_on_until_it_is_reset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The template says what it was given, so what the model remembers is seen in its prompt."""
    prompts: list[str] = []
    from infinilm.processors._huggingface import HuggingFaceProcessor

    render = HuggingFaceProcessor.render_chat

    def rendering(self: HuggingFaceProcessor, messages: list[dict[str, str]]) -> str:
        prompts.append(" | ".join(f"{message['role']}: {message['content'].strip()}" for message in messages))
        return render(self, messages)

    monkeypatch.setattr(HuggingFaceProcessor, "render_chat", rendering)
    text = "one plus one\ntwo plus two\n/reset\none plus two\n/system count\nsix plus one\n/reset\nsix plus two\n"
    code, lines, _ = chat(monkeypatch, capsys, text, "--temperature", "0")
    assert code == 0
    assert lines == [" two", " four", " three", " seven", " eight"]
    assert prompts == [
        "user: one plus one",
        "user: one plus one | assistant: two | user: two plus two",
        "user: one plus two",
        "system: count | user: six plus one",
        "system: count | user: six plus two",
    ]


def test_unknown_command_shows_those_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, _ = chat(monkeypatch, capsys, "/rest\n/help\n")
    assert (code, lines) == (0, ["there is no /rest", *HELP.splitlines(), *HELP.splitlines()])


def test_answers_have_a_limit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(monkeypatch, capsys, "three minus nine\n", "--max-tokens", "1")[1] == [" minus"]


def test_model_without_a_template_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "m", tokenizer=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    assert main(["chat", str(model)]) == 2
    err = capsys.readouterr().err
    assert "this model has no chat template" in err
    assert err.count("\n") == 1


# Whoever started the tests in the background had interrupts ignored, and children inherit that.
RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from infinilm.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Terminal:
    """A chat on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.own, theirs = pty.openpty()
        words = [sys.executable, "-c", RUN, *command]
        self.process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.shown = ""

    def interrupt_until(self, pattern: str) -> None:
        """Interrupt until something matches: readline does not hear of a signal just before it begins to wait."""
        for _ in range(30):
            self.process.send_signal(signal.SIGINT)
            if self.shows(pattern, seconds=2):
                return
        raise AssertionError(f"interrupts do nothing; shown: {self.shown!r}")

    def write(self, text: str) -> None:
        os.write(self.own, text.encode())

    def wait_for(self, pattern: str) -> None:
        """Read until what was shown since the last time matches."""
        assert self.shows(pattern, seconds=60), self.shown

    def shows(self, pattern: str, seconds: float) -> bool:
        """Read for so long at most, and return whether what was shown since the last time matches."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            if time.monotonic() > deadline:
                return False
            if select.select([self.own], [], [], 0.1)[0]:
                self.shown += os.read(self.own, 65536).decode(errors="replace")
        self.shown = self.shown[found.end() :]
        return True


def test_interrupt_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    """A model of random bytes would talk for a hundred thousand tokens."""
    from tiny_checkpoint import TEMPLATE, write_model, write_tokenizer

    model = write_model(tmp_path / "m", max_position_embeddings=100_000)
    write_tokenizer(model, chat_template=TEMPLATE)
    terminal = Terminal(["chat", str(model), "--kv-cache-memory", "64M", "--temperature", "0"])
    try:
        terminal.wait_for("> ")
        terminal.write("hello\n")
        terminal.wait_for(r"hello\r\n[^\n]{40}")
        terminal.interrupt_until(r"\(stopped\)\r\n.*> ")
        terminal.interrupt_until(r"\r\n.*> ")
        terminal.write("/exit\n")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.own)
