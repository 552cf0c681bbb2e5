"""Runs scripts in forked processes, which skip the time for imports.

Every one is a fork of a server that has made them and nothing else: no thread runs in it and no array was computed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from places import SUPPORT

SECONDS = 120.0  # that a script may take


class Server:
    """The server process, which forks for each script."""

    def __init__(self) -> None:
        self._socket, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            command = [sys.executable, __file__, str(there.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[there.fileno()])

    def ended(self, code: str, folder: str, outputs: Sequence[int]) -> int:
        """Run a script in a folder, with the environment of this process, to its end. Returns as `Popen.returncode`."""
        with tempfile.TemporaryFile() as script:
            script.write(json.dumps([code, folder, dict(os.environ)]).encode())
            script.flush()
            socket.send_fds(self._socket, [b"run"], [script.fileno(), *outputs])
        for output in outputs:
            os.close(output)
        pid = int(self._socket.recv(100))
        self._socket.settimeout(SECONDS)
        try:
            return int(self._socket.recv(100))
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            self._socket.recv(100)
            raise
        finally:
            self._socket.settimeout(None)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(30)


_servers: list[Server] = []


def ended(code: str, folder: object) -> subprocess.CompletedProcess[str]:
    """The result of `python -c code` in that folder, as from `subprocess.run`."""
    if not _servers:
        _servers.append(Server())
    pipes = [os.pipe() for _ in range(2)]
    with ThreadPoolExecutor(2) as readers:
        texts = [readers.submit(_all_of, reading) for reading, _ in pipes]
        status = _servers[0].ended(code, str(folder), [writing for _, writing in pipes])
    return subprocess.CompletedProcess(["-c", code], status, *(text.result() for text in texts))


def _all_of(pipe: int) -> str:
    with open(pipe) as file:
        return file.read()


def close() -> None:
    """End the server if it is running."""
    while _servers:
        _servers.pop().close()


def _serve(connection: socket.socket) -> str | None:
    """Fork for every request. Returns the script to run in a fork, and None in the server at the end."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, 100, 3)
        if not message:
            return None
        script, *outputs = files
        if (pid := os.fork()) == 0:
            connection.close()
            for descriptor, output in enumerate(outputs, 1):
                os.dup2(output, descriptor)
            with open(script, "rb") as file:
                file.seek(0)
                code, folder, environment = json.loads(file.read())
            for output in outputs:
                os.close(output)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            return code
        for file in files:
            os.close(file)
        connection.send(str(pid).encode())
        connection.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


if __name__ == "__main__":
    sys.path.insert(0, str(SUPPORT))
    with contextlib.redirect_stdout(sys.stderr):
        import transformers  # noqa: F401

        import mlx_nb  # noqa: F401
        import runs  # noqa: F401
    if (code := _serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        sys.argv = ["-c"]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
