"""The command line. Errors of commands are caught here: one message and an exit code.

torch is imported inside the commands, so that `--help` is fast.
"""

import errno
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer

from cspnet import __version__
from cspnet.cli.datasets import check_command, index_command, pack_command, prepare_command
from cspnet.cli.hints import CommandGroup, HintCommand, RecipeCommand
from cspnet.cli.options import is_rank_zero, max_restarts
from cspnet.cli.planning import plan_command, status_command
from cspnet.cli.reports import compare_command, report_command
from cspnet.cli.results import eval_command, export_command, predict_command
from cspnet.cli.training import preview_command, train_command
from cspnet.console import ensure_utf8_mode, escape_unencodable_output
from cspnet.errors import CspnetError, StoppedError
from cspnet.text import printable

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train_command,
    "eval": eval_command,
    "predict": predict_command,
    "prepare": prepare_command,
    "check": check_command,
    "index": index_command,
    "pack": pack_command,
    "plan": plan_command,
    "status": status_command,
    "preview": preview_command,
    "export": export_command,
    "report": report_command,
    "compare": compare_command,
}
WITH_RECIPE = ("train", "plan", "preview")  # commands that accept recipe overrides


def _app(*names: str) -> typer.Typer:
    app = typer.Typer(
        cls=CommandGroup,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name in names:
        kind = RecipeCommand if name in WITH_RECIPE else HintCommand
        app.command(name, cls=kind, no_args_is_help=True)(COMMANDS[name])
    return app


def _version(requested: bool) -> None:
    if requested:
        import torch  # unlike package metadata, torch.__version__ names the build (+cu132, +cpu)

        others = ", ".join(f"{name} {version(name)}" for name in ("torchvision", "timm"))
        python = platform.python_version()
        print(f"cspnet {__version__} (torch {torch.__version__}, {others}, Python {python})")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print versions and exit."
        ),
    ] = False,
) -> None:
    """Train CSPDarknet53 from a YAML recipe, evaluate it and export its weights."""


def _run(app: typer.Typer) -> None:
    """Run the command line. A CspnetError becomes one message on stderr and its exit code.

    With several processes, rank 0 prints errors that all ranks raise. An error of another rank
    alone is printed with its rank.
    """
    ensure_utf8_mode()
    escape_unencodable_output()
    streams = sys.stdout, sys.stderr
    try:
        app()
    except StoppedError as stopped:
        if is_rank_zero():
            print(stopped, file=sys.stderr)
        sys.exit(0 if max_restarts() else stopped.exit_code)  # torchrun restarts on any other code
    except CspnetError as error:
        rank = "" if is_rank_zero() else f"rank {os.environ['RANK']}: "
        if is_rank_zero() or error.exit_code != 2 or os.environ.get("LOCAL_RANK") == "0":
            print(f"error: {rank}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `cspnet … | head`
        _discard_output()
        sys.exit(1)
    except PermissionError as error:
        if error.filename is None:
            raise
        what = printable(str(error.filename))
        print(f"error: {what}: {error.strerror}. Check its owner and mode", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            raise
        _discard_output()
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        # Flush now: a closed pipe at interpreter exit would print a traceback.
        try:
            sys.stdout.flush()
        except OSError as error:
            _discard_output()
            if error.errno != errno.EPIPE:
                print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
            sys.exit(end.code or 1)
        raise
    finally:
        sys.stdout, sys.stderr = streams  # undo `tolerate_lost_output`


def _discard_output() -> None:
    """Redirect stdout to /dev/null, so that the flush at interpreter exit cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point of `cspnet`."""
    app = _app(*COMMANDS)
    app.callback()(_options)
    _run(app)


def main_train() -> None:
    """Entry point of `cspnet-train`."""
    _run(_app("train"))


def main_eval() -> None:
    """Entry point of `cspnet-eval`."""
    _run(_app("eval"))
