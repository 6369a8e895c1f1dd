"""The command line: `tierkv COMMAND …`. What is wrong with a user's input is one line on stderr, never a traceback.

Exit codes: 0; 1, it could not be done; 2, it was asked wrongly (options, configuration); 130, interrupted.
Whatever is slow to import is imported by the command that needs it.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Final

import typer

from tierkv import __version__
from tierkv.cli_bench import bench
from tierkv.cli_daemon import daemon
from tierkv.cli_demo import demo
from tierkv.cli_explain import explain, stats
from tierkv.cli_generate import generate
from tierkv.cli_pack import pack
from tierkv.cli_show import config, inspect, size
from tierkv.cli_simulate import simulate
from tierkv.cli_top import top
from tierkv.cli_warm import warm
from tierkv.errors import ConfigError, TierKVError

FAILED: Final = 1
MISUSED: Final = 2
INTERRUPTED: Final = 130
EXTRAS: Final = {"obstore": "object", "cryptography": "sign", "zmq": "events", "matplotlib": "plot"}
"""What to install for a package that is missing."""

app = typer.Typer(
    name="tierkv",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Keep the KV cache of language models in device, host, disk and Redis memory, so that it is computed once.\n\n"
    "Begin with [bold]tierkv demo[/bold]. Options come from tierkv.toml, TIERKV_* variables and --set; "
    "[bold]tierkv config[/bold] lists them all.",
)
for command in (demo, generate, config, inspect, size, simulate, explain, stats, top, warm):
    app.command()(command)
app.add_typer(bench, name="bench")
app.add_typer(daemon, name="daemon")
app.add_typer(pack, name="pack")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"tierkv {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stdout.write(f"{context.get_help()}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    # The root of typer's own errors: not exported, and no longer click's in newer versions.
    misuse = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="tierkv", standalone_mode=False)
        sys.stdout.flush()
    except ConfigError as error:
        return _error(str(error), MISUSED)
    except TierKVError as error:
        return _error(str(error), FAILED)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "tierkv":
            raise
        extra = EXTRAS.get(error.name.split(".")[0], "engine,redis")
        return _error(f"this command needs the package {error.name}: pip install 'tierkv[{extra}]'", FAILED)
    except BrokenPipeError:
        # The reader has gone (`| head`). What is still buffered must not be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Exception as error:
        if not isinstance(error, misuse):
            raise
        return _error(f"{error.format_message()} (see tierkv --help)", MISUSED)  # type: ignore[attr-defined]  # see misuse
    if code == INTERRUPTED:
        return _interrupted()
    return code if isinstance(code, int) else 0


def _error(message: str, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return code


def _interrupted() -> int:
    sys.stderr.write("interrupted\n")
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
