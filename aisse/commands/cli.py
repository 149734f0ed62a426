"""The commands: the only place with arguments, environment and signals."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import os
import resource
import select
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import structlog
from pydantic import ValidationError

import aisse
from aisse import app, deploy
from aisse.errors import ConfigError
from aisse.service.systemd import Notifier, inherited_sockets
from aisse.settings import ENV_PREFIX, MASK, SECRETS, Loaded, Settings, is_loopback, load, shown
from aisse.simulator import Script, Simulator
from aisse.simulator.script import first_error
from aisse.telemetry import log
from aisse.telemetry.logwriter import LogWriter
from aisse.upstream.keys import PROVIDER_KEYS, key_for

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from pydantic import BaseModel

EX_CONFIG = 78  # sysexits.h: something was found unconfigured or misconfigured
EX_IOERR = 74  # sysexits.h: an error on some file

# How long the last lines are waited for where nobody seems to read them; at a second signal, which is to end the
# process at once.
_LAST_LINES_S = 1.0
_LAST_LINES_AT_ONCE_S = 0.2

# What lies below sys.stdout and sys.stderr, for writing that must not wait.
_STDOUT, _STDERR = 1, 2

# More than the longest of our own words.
_WORDS_BYTES = 1 << 20

# What a process needs besides two descriptors a stream: the log, the loop, the listener, spare ones for probes.
_SPARE_DESCRIPTORS = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 when it went well, 78 with one line for a wrong name or value.

    74 where standard output cannot be written and that is what the command is for, 141 where nobody reads it any more.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        file = _config_file(arguments)
        known, unknown = _parser(file).parse_known_args(arguments)
        options = vars(known)
        command: Callable[[dict[str, Any], Path | None], None] = options.pop("command")
        options.pop("config", None)
        if unknown:
            raise ConfigError(_unknown(unknown[0]))
        command(options, file)
    except ConfigError as error:
        _refuse(str(error))


def _unknown(argument: str) -> str:
    # No more than a flag's name: what stands after it may be a key.
    flag = argument.partition("=")[0]
    name = flag.removeprefix("--").replace("-", "_")
    if name in SECRETS:
        return f"{flag}: other users of this machine can read flags; set {ENV_PREFIX}{name.upper()} instead"
    return (
        f"{flag}: there is no such flag; --help lists them" if flag.startswith("-") else "there is an argument too many"
    )


def _refuse(message: str) -> NoReturn:
    _note(message)
    sys.exit(EX_CONFIG)


def _note(text: str) -> None:
    """One line on standard error, if that takes it within a second."""
    poll = select.poll()
    poll.register(_STDERR, select.POLLOUT)
    if not poll.poll(_LAST_LINES_S * 1000):
        return
    try:
        print(f"aisse: {text}", file=sys.stderr, flush=True)
    except OSError:
        _into_nowhere(_STDERR)


def _into_nowhere(descriptor: int) -> None:
    """The interpreter would try once more to write at its exit, and change the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _print(text: str) -> None:
    """Lines on standard output, at once. Ends the process where they cannot be written."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        print(text, flush=True)
    except UnicodeEncodeError as error:
        # What is printed may be a file that others read: no character is put in place of another.
        _note(f"standard output: {error.encoding} lacks a character; set PYTHONIOENCODING=utf-8")
        sys.exit(EX_IOERR)
    except OSError as error:
        _into_nowhere(_STDOUT)
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)  # as other programs end of it: `| head` has what it wanted
        _note(f"standard output: {error.strerror}")
        sys.exit(EX_IOERR)


# --- commands -------------------------------------------------------------------------------------------------


def _serve(flags: dict[str, Any], file: Path | None) -> None:
    settings = load(flags, os.environ, file).settings
    with _logging(settings) as writer:
        _serve_logged(settings, writer)


def _serve_logged(settings: Settings, writer: LogWriter) -> None:
    _raise_descriptor_limit(settings.max_streams)
    # Whoever does not read it must not keep the server from its work.
    output = LogWriter(_STDOUT, _WORDS_BYTES)

    def key(base_url: str) -> str | None:
        found = key_for(base_url, settings, os.environ)
        return found[0] if found is not None else None

    def announce(url: str, upstream: str) -> None:
        explained = {
            "simulator": " (built in: no key, no network, scripted answers)",
            "local": " (a small model on this machine: no key, no network)",
        }.get(upstream, "")
        output.put(f"aisse {aisse.__version__} on {url}\nupstream: {upstream}{explained}\n".encode())

    def progress(streams: int, readers: int, left_s: float) -> None:
        """One line of the terminal that is written anew each second: two hundred would bury what else was said."""
        text = f"draining: {streams} streams, {readers} readers, {left_s:.0f} s left" if streams or readers else ""
        if writer.idle:  # what is out of date once it can be written is not worth it
            writer.put((log.CLEAR_LINE + text).encode())

    notifier = Notifier.from_environment(os.environ)
    sockets = inherited_sockets(os.environ)
    if not settings.open and not settings.access_tokens:
        for inherited in sockets:
            # What the settings require of `host`, which these stand in for.
            if not is_loopback(inherited.getsockname()[0]):
                raise ConfigError(
                    "LISTEN_FDS: beyond loopback anybody could start streams; set AISSE_ACCESS_TOKENS, or say --open"
                )

    async def run() -> None:
        await app.serve(
            settings,
            _stop_on_signals(writer),
            key_for=key,
            announce=announce,
            notifier=notifier,
            sockets=sockets,
            report=progress if sys.stderr.isatty() else None,
            log_lines_dropped=lambda: writer.dropped,
        )

    try:
        with contextlib.closing(notifier):
            _run(run())
    finally:
        output.close(_LAST_LINES_AT_ONCE_S)


@contextlib.contextmanager
def _logging(settings: Settings) -> Iterator[LogWriter]:
    """Logs through a thread as long as the block runs, also what Python would print by itself, which may never return.

    In the end what was said last is written: why the block failed, too. It waits for that a second at most.
    """
    writer = LogWriter(_STDERR, int(settings.log_buffer_bytes), log.dropped_line(settings.log_format))
    log.configure(settings.log_format, settings.log_level, writer.put)
    hooks = sys.unraisablehook, threading.excepthook
    sys.unraisablehook, threading.excepthook = log.unraisable, log.thread_failed
    try:
        yield writer
    except ConfigError:
        raise
    except Exception:
        writer.put(traceback.format_exc().encode(errors="backslashreplace"))
        sys.exit(1)
    finally:
        sys.unraisablehook, threading.excepthook = hooks
        writer.close(_LAST_LINES_S)


def _config(flags: dict[str, Any], file: Path | None) -> None:
    loaded = load(flags, os.environ, file)
    rows = [(name, shown(name, getattr(loaded.settings, name)), loaded.origins[name]) for name in Settings.model_fields]
    # A mask is no value: as a comment it cannot be taken for one when this is kept as a file.
    rows = [(f"# {name}" if MASK in value else name, value, origin) for name, value, origin in rows]
    if loaded.settings.upstream not in {"simulator", "local"}:
        found = key_for(loaded.settings.upstream, loaded.settings, os.environ)
        rows.append(("# key for upstream", MASK if found else "none", found[1] if found else ""))
    name_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    _print(
        "\n".join(
            f"{name:<{name_width}} = {value:<{value_width}}  # {origin}".rstrip(" #") for name, value, origin in rows
        )
    )


def _unit(options: dict[str, Any], file: Path | None) -> None:
    settings = load({}, os.environ, file).settings
    python = Path(sys.executable)
    name: str | None = options["unit"]
    text = deploy.unit(name, settings, python, file) if name else deploy.all_units(settings, python, file)
    _print(text.rstrip("\n"))
    if name is not None and name.endswith(".socket"):
        return  # it starts nothing by itself
    needed = [Path(sys.prefix), Path(sys.base_prefix), Path(aisse.__file__).parent]
    hidden = deploy.hidden(needed if file is None else [*needed, file])
    for line in hidden:
        _note(line)
    if hidden:
        _note(
            "install where services can read, with a Python that lies in no home either: "
            "/usr/bin/python3 -m venv /opt/aisse, /opt/aisse/bin/pip install ..., and run this command from there"
        )
    variables = sorted(name for name in os.environ if name.startswith(ENV_PREFIX))
    if variables:
        _note(f"services do not get this environment; put into /etc/aisse/aisse.env: {', '.join(variables)}")


def _simulate(flags: dict[str, Any], _file: Path | None) -> None:
    host, port = flags.pop("host"), flags.pop("port")
    try:
        script = Script.model_validate(flags)
    except ValidationError as error:
        name, _, message = first_error(error).partition(": ")
        _refuse(f"--{name.replace('_', '-')}: {message}")

    async def run() -> None:
        stop = _stop_on_signals()
        simulator = Simulator(script, host=host, port=port)
        try:
            try:
                url = await simulator.start()
            except (OSError, UnicodeError) as error:
                why = getattr(error, "strerror", None) or "that is no host name"
                raise ConfigError(f"--host, --port: cannot listen on {host}:{port}: {why}") from None
            _print(f"aisse {aisse.__version__} simulator on {url}")
            await stop.wait()
        finally:
            await simulator.close()

    _run(run())


# --- the process ----------------------------------------------------------------------------------------------


def _run(main_coroutine: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop  # noqa: PLC0415 - it does not exist everywhere
    except ImportError:
        run = asyncio.run
    else:
        run = uvloop.run
    before = signal.getsignal(signal.SIGINT)
    try:
        run(main_coroutine)
    finally:
        # A loop that closes leaves Python's own, which would print a traceback of the process's last milliseconds.
        signal.signal(signal.SIGINT, before)


def _stop_on_signals(writer: LogWriter | None = None) -> asyncio.Event:
    """An event that the first SIGTERM, SIGINT or SIGHUP sets; after it SIGTERM or SIGINT ends the process at once.

    Not SIGHUP: a terminal that closes sends two, its own and its shell's. One that is ignored (nohup) stays so.
    `writer` gets a moment to write what it has.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            if writer is not None:
                writer.close(_LAST_LINES_AT_ONCE_S)
            os._exit(128 + number)
        stop.set()
        # To the end of the process: a loop that closes would have SIGHUP end it in its last milliseconds.
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal, number)
    return stop


def _raise_descriptor_limit(max_streams: int) -> None:
    """A stream needs two: its reader's and its upstream's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < 2 * max_streams + _SPARE_DESCRIPTORS:
        structlog.get_logger("aisse.cli").warning(
            "too few open files for max_streams; raise the limit (LimitNOFILE, ulimit -n) or lower max_streams",
            open_files=hard,
            needed=2 * max_streams + _SPARE_DESCRIPTORS,
        )


# --- arguments ------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else here does, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        # What follows is what was typed; it may be a secret in the wrong place.
        where, unknown, _ = message.removeprefix("argument ").partition("invalid choice")
        raise ConfigError(f"{where}{'there is no such command' if unknown else ''}; --help shows how")

    def _print_message(self, message: str, _file: object = None) -> None:
        # Help and version. argparse's own goes on, and exits with 0, where it cannot write them.
        _print(message.removesuffix("\n"))


def _config_file(arguments: Sequence[str]) -> Path | None:
    """`--config` ahead of everything else: the help texts show what the file says."""
    early = _Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    found: Path | None = early.parse_known_args(arguments)[0].config
    return found


def _parser(file: Path | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="aisse",
        description="Relays AI token streams to browsers as Server-Sent Events.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"aisse {aisse.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    keys = ", ".join(variable for variable, _, _ in PROVIDER_KEYS)
    epilog = (
        f"Each setting is also an environment variable ({ENV_PREFIX}HEARTBEAT_S) and a name in the TOML file. "
        f"Secrets are no flags: {', '.join(ENV_PREFIX + name.upper() for name in sorted(SECRETS))}, "
        f"{keys} (by environment, each sent to its own host alone), or the systemd credential upstream_key."
    )
    loaded = _loaded_for_help(file)
    for name, command, text in (
        ("serve", _serve, "run the server"),
        ("config", _config, "show every setting, its value and where it came from"),
    ):
        sub = commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
        sub.set_defaults(command=command)
        sub.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
        _add_flags(sub, Settings, loaded)

    sub = commands.add_parser(
        "unit",
        help="print the systemd units with this machine's paths",
        description="Prints a systemd unit for the interpreter that runs this command and for the settings of the "
        "TOML file and the environment; without a name all of them, and the commands to install them. "
        "It says on standard error what a service could not read where it is.",
        allow_abbrev=False,
    )
    sub.set_defaults(command=_unit)
    sub.add_argument("unit", nargs="?", metavar="UNIT", help=f"one of {', '.join(deploy.UNITS)}")
    sub.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings, which the service reads")

    sub = commands.add_parser(
        "simulate",
        help="run the built-in upstream alone",
        description="Runs an Anthropic-format API that needs no key and answers from a script, faults included. "
        "`[[name=value ...]]` in a prompt overrides a flag for its own answer; GET /stats counts.",
        allow_abbrev=False,
    )
    sub.set_defaults(command=_simulate)
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    sub.add_argument("--port", type=_port, default=0, help="TCP port (default: a free one)")
    _add_flags(sub, Script, None)
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:  # uvloop would take it modulo 65536
        raise argparse.ArgumentTypeError("must be 0 to 65535")
    return int(text)


def _loaded_for_help(file: Path | None) -> Loaded | None:
    try:
        return load({}, os.environ, file)
    except ConfigError:
        return None  # the command itself will say it


def _add_flags(parser: argparse.ArgumentParser, model: type[BaseModel], loaded: Loaded | None) -> None:
    """A flag for each field. Values stay strings: the model checks them, whichever source they come from."""
    for name, field in model.model_fields.items():
        if name in SECRETS:
            continue
        if loaded is not None:
            now = f"{shown(name, getattr(loaded.settings, name))}, {loaded.origins[name]}"
        else:
            now = f"default: {'none' if field.default is None else shown(name, field.default)}"
        flag = "--" + name.replace("_", "-")
        help_text = f"{field.description} ({now})".replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text)
        else:
            unit = "SECONDS" if name.endswith("_s") else "BYTES" if name.endswith("_bytes") else name.upper()
            parser.add_argument(flag, default=argparse.SUPPRESS, metavar=unit, help=help_text)
