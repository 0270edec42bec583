"""The command line: one module per command, and the only room of pyksm that prints.

``pyksm --help`` loads click and nothing else; a command's module, rich and numpy come with the
command that needs them.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from pyksm.host import Host

__all__ = ["COMMANDS", "Exit", "main"]

COMMANDS = {
    "demo": "Start workers that load one model, merge it, and prove what that saved.",
    "doctor": "Say what keeps this host or a process from merging, and what mends it.",
    "settle": "Merge now, say when it is done, and put the knobs back.",
    "status": "Show what is merged, what it saves and what it costs.",
    "tune": "Show KSM's knobs, set them, or put them back.",
}
"""Name and first line of each command; ``pyksm.cli.NAME`` holds it as ``command``."""


class Exit:
    """What the exit status of ``pyksm`` means."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NO_KSM = 3
    KSM_OFF = 4
    TIME_UP = 5
    INTERRUPTED = 128 + signal.SIGINT
    BROKEN_PIPE = 128 + signal.SIGPIPE
    TERMINATED = 128 + signal.SIGTERM


EXIT_STATUS = """\
\b
Exit status:
  0    done
  1    it failed, or a check did not hold
  2    wrong usage
  3    this kernel has no KSM, or not what was asked of it
  4    KSM is there but off, or you have no permission
  5    the time ran out before merging had ended
  130  interrupted (Ctrl-C); the knobs are back
  143  terminated; the knobs are back
"""


class _PipeBroken(Exception):  # noqa: N818 - no error
    """Nobody reads standard output any more."""


class _Commands(click.Group):
    """The commands, each loaded only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"pyksm.cli.{cmd_name}").command
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse; ``--help`` prints here."""
        try:
            return super().make_context(*args, **kwargs)
        except BrokenPipeError:
            raise _PipeBroken from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> int:
        """Run the command; turn whatever ends it early into words and a status."""
        debug: bool = ctx.params["debug"]
        try:
            status = super().invoke(ctx)
        except BrokenPipeError:
            raise _PipeBroken from None  # which click would take for a failure
        except KeyboardInterrupt:
            click.echo("pyksm: interrupted", err=True)
            return Exit.INTERRUPTED
        except (OSError, ValueError, TypeError, MemoryError, _ksm_error()) as error:
            if debug:
                raise
            complain(error)
            return exit_status(error)
        return status if isinstance(status, int) else Exit.OK


@click.group(cls=_Commands, epilog=EXIT_STATUS, context_settings={"max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="pyksm", message="%(prog)s %(version)s")
def pyksm(debug: bool) -> None:
    """Share duplicate memory through Linux KSM, and prove what it saved."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; ``argv`` is without the program's name."""
    arguments = None if argv is None else list(argv)
    with _signals():
        try:
            status = pyksm.main(arguments, prog_name="pyksm", standalone_mode=False)
            sys.stdout.flush()
        except (_PipeBroken, BrokenPipeError):  # `pyksm status | head`
            _close_stdout()
            return Exit.BROKEN_PIPE
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except click.Abort:
            return Exit.INTERRUPTED
        except SystemExit as leaving:
            return leaving.code if isinstance(leaving.code, int) else Exit.FAILURE
    return status if isinstance(status, int) else Exit.OK


def complain(error: BaseException) -> None:
    """Print one sentence on standard error, and below it what to do about it."""
    hint = getattr(error, "hint", "")
    sentence = str(error)
    if hint:
        sentence = sentence.removesuffix(f". {hint}")
    elif isinstance(error, OSError) and error.strerror:
        sentence = error.strerror + (f": {error.filename}" if error.filename else "")
    click.echo(f"pyksm: {sentence or type(error).__name__}", err=True)
    if hint:
        click.echo(f"  {hint}", err=True)


def exit_status(error: BaseException, host: Host | None = None) -> int:
    """Choose the exit status that tells what kind of error it was."""
    from pyksm.errors import NotSupported

    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Exit.KSM_OFF
    if not isinstance(error, NotSupported):
        return Exit.FAILURE
    from pyksm.host import Host

    host = Host() if host is None else host
    off = host.exists and not host.writable and not host.running
    return Exit.KSM_OFF if off else Exit.NO_KSM


def _ksm_error() -> type[Exception]:
    from pyksm.errors import KsmError

    return KsmError


def _close_stdout() -> None:
    """Keep the interpreter's last flush from failing on the broken pipe, too."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Have SIGTERM unwind as Ctrl-C does, so that knobs return, and take only the first of them."""

    def unwind(number: int, frame: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(Exit.TERMINATED)

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a shell's background job
                before[number] = signal.signal(number, unwind)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
