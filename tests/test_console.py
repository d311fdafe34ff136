import errno
import io
import logging
import sys
import warnings

import pytest
from rich.table import Table

from emogen import console
from emogen.errors import InputError, ModelError
from emogen.task.recipe import RecipeError


@pytest.fixture(autouse=True)
def logging_as_before():
    loggers = [logging.getLogger(name) for name in ("emogen", "bitsandbytes.backends.cpu.ops")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad.csv:3: wrong"), 2),
        (RecipeError(["r.yaml:1: wrong", "r.yaml:2: worse"]), 2),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "new.csv"), 2),
        (ModelError("the model cannot be loaded"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (PermissionError(errno.EACCES, "Permission denied", "out.csv"), 1),
        (ConnectionError("the network is unreachable"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_an_error_that_a_user_can_fix_becomes_a_message_and_an_exit_code(capsys, error, code):
    with pytest.raises(SystemExit) as ended:
        console.run_command(raising(error))
    assert ended.value.code == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error {error}\n"


def test_an_interrupt_exits_with_130_and_no_message(capsys):
    with pytest.raises(SystemExit) as ended:
        console.run_command(raising(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_success_does_not_exit(capsys):
    calls = []
    console.run_command(lambda: calls.append("done"))
    assert calls == ["done"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        console.run_command(raising(error))


def test_the_exit_code_of_a_command_is_kept():
    with pytest.raises(SystemExit) as ended:
        console.run_command(lambda: sys.exit(3))
    assert ended.value.code == 3


def test_a_message_is_printed_as_it_is(capsys):
    """Without wrapping, and without taking [brackets] for markup."""
    message = "a[red].csv: " + "long " * 100 + "end"
    with pytest.raises(SystemExit):
        console.run_command(raising(InputError(message)))
    assert capsys.readouterr().err == f"error {message}\n"


@pytest.mark.parametrize(("rank", "level"), [("0", logging.INFO), ("1", logging.ERROR)])
def test_only_the_main_process_logs_more_than_errors(monkeypatch, rank, level):
    monkeypatch.setenv("RANK", rank)
    console.set_up_logging()
    assert logging.getLogger("emogen").level == level


def test_a_progress_bar_counts_to_its_total(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with console.progress_bar("Answers", 5, "text") as advance:
        for n in (2, 3):
            advance(n)
    assert stream.getvalue().rpartition("\r")[2].startswith("Answers: 100%")
    assert "5/5" in stream.getvalue()
    assert "text/s" in stream.getvalue()


def test_several_processes_show_one_bar_for_all(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, last in (("0", "5/5"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        with console.progress_bar("Answers", 5) as advance:
            advance(2)  # so 4 of both
            advance(1)  # the other process has none left
        assert last in stream.getvalue()
        assert bool(stream.getvalue()) == (rank == "0")


def test_names_of_others_are_neither_markup_nor_emoji_nor_control_characters(capsys):
    """A folder may be called [/x], a label :joy:, and a text may hold the codes that clear a terminal."""
    view = Table(":joy: [red]", "\x1b[2J")
    view.add_row("[/x]", "\x9b31m\x07")
    console.out.print(view)
    console.out.print("runs/[/x] :joy: \x1b[2J\ttab")
    console.out.print(console.message("note", "yellow", ":joy: [red] \x1b]0;title"))
    shown = capsys.readouterr().out
    assert console.CONTROL.search(shown) is None
    assert all(part in shown for part in (":joy: [red]", "[/x]", r"runs/[/x] :joy: \x1b[2J"))
    assert r"note :joy: [red] \x1b]0;title" in shown


def test_messages_are_logged_with_control_characters_as_escapes(monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    console.set_up_logging()
    record = logging.LogRecord("emogen", logging.WARNING, "", 0, "file \x1b[2J.csv", (), None)
    assert logging.getLogger().handlers[0].format(record).endswith(r"file \x1b[2J.csv")
