"""The command ``mmtok``. Exit codes: 0 done, 2 bad input (one clear line), 130 stopped, 1 anything else."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Sequence
from typing import Any

import typer

from mmtok.cli import dataset, decode, encode, evaluate, generate, import_, migrate, roundtrip, vocab
from mmtok.errors import MmtokError

_WRONG_USAGE: Any = typer.BadParameter.__mro__[1]  # click's UsageError, under whichever name typer carries it

_STOPPED = 130

app = typer.Typer(
    help="One vocabulary for text, images and audio.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("generate", no_args_is_help=True)(generate.generate)
app.command("roundtrip", no_args_is_help=True)(roundtrip.roundtrip)
app.command("evaluate", no_args_is_help=True)(evaluate.evaluate)
app.command("import", no_args_is_help=True)(import_.import_)
vocab.app.command("migrate", no_args_is_help=True)(migrate.migrate)
app.add_typer(vocab.app, name="vocab")
app.add_typer(dataset.app, name="dataset")
app.command("encode", no_args_is_help=True)(encode.encode)
app.command("decode", no_args_is_help=True)(decode.decode)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: without the program's name; None takes them from ``sys.argv``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # the name of a file may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        code = app(args=arguments, prog_name="mmtok", obj=arguments, standalone_mode=False)
        sys.exit(_complain("stopped", code) if code == _STOPPED else code)
    except _WRONG_USAGE as error:
        # Empty where the help was shown instead.
        message = error.format_message().strip().removesuffix(".").replace("Value error, ", "")
        sys.exit(_complain(f"{message}; see {error.ctx.command_path} --help", 2) if message else 2)
    except typer.Abort:
        sys.exit(_complain("stopped", _STOPPED))
    except MmtokError as error:
        sys.exit(_complain(str(error), 2))
    except OSError as error:
        sys.exit(_complain(f"{error.filename or 'the system'}: {error.strerror or error}", 1))
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(*_: object) -> None:
    """What SIGTERM does: the same as Ctrl-C, so that workers end and temporary files go."""
    raise KeyboardInterrupt


def _complain(text: str, code: int) -> int:
    print("mmtok: " + " ".join(text.split()), file=sys.stderr)
    return code
