"""Verbs of the command line as jobs: processes of their own, with a log, that die with us."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from worldloop.errors import UserError
from worldloop.files import disk_error

PREFIX = "worldloop: error: "  # how the command line begins its one line


def run_job(argv: Sequence[Any], log: Path, processes: int = 1) -> None:
    """Run `worldloop ARGV` to its end; output is appended to ``log``.

    processes: ranks of a data-parallel job on this machine, with torchrun's environment. Raises
    UserError with the job's own line where it fails, or saying how it died.
    """
    command = [sys.executable, "-m", "worldloop", *(str(word) for word in argv)]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = open(log, "ab")  # noqa: SIM115 - closed below
    except OSError as error:
        raise disk_error(log, error) or error from error
    with stream:
        begun = stream.tell()
        ranks = [
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment,
                preexec_fn=dies_with(os.getpid()),
            )
            for environment in _environments(processes)
        ]  # fmt: skip
        try:
            code = _first_failure(ranks)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.terminate()
    if code:
        raise UserError(f"{_reason(log, begun, code)} (log: {log})")


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; the code of the first that fails, at once: the others would wait for it."""
    if len(ranks) == 1:
        return ranks[0].wait()
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            return failed[0] if failed else 0
        time.sleep(0.2)


def _environments(processes: int) -> list[dict[str, str]]:
    if processes == 1:
        return [dict(os.environ)]
    with socket.socket() as probe:  # the port is free again when the ranks take it
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
    }  # fmt: skip
    return [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]


def _reason(log: Path, begun: int, code: int) -> str:
    with open(log, "rb") as stream:
        stream.seek(begun)
        lines = stream.read().decode("utf-8", "replace").splitlines()
    told = [line for line in lines if line.startswith(PREFIX)]
    if told:
        return told[-1].removeprefix(PREFIX)
    if code < 0:
        return f"its process was killed by signal {-code} ({signal.Signals(-code).name})"
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"its process ended with code {code}: {last.strip()}"


def dies_with(parent: int) -> Callable[[], None]:
    """What a job's process calls before its program starts: the kernel kills it with its parent.

    Linux only; elsewhere a job outlives a killed loop, and the next one finds its folder in use.
    """

    def prepare() -> None:
        if sys.platform == "linux":
            set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
            if os.getppid() != parent:  # it died in between
                os._exit(1)

    return prepare
