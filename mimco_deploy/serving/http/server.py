"""The server: where it listens, what it needs there, and how it ends."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from mimco_deploy.errors import ConfigError
from mimco_deploy.serving.http.access import LOOPBACK, MIN_TOKEN
from mimco_deploy.serving.http.app import create_app
from mimco_deploy.serving.http.connections import PatientProtocol
from mimco_deploy.serving.http.service import ServeSettings

TOKEN_VARIABLE = "MIMCO_TOKEN"
_GRACE_S = 30
_KEEP_ALIVE_S = 15
_BACKLOG = 512
_ACCEPTED_AT_ONCE = 64
"""asyncio tries to accept as many in one go as its backlog, and logs each try for which no descriptor is free."""


def token_for(host: str) -> tuple[str | None, bool]:
    """The token that a service on a host asks for.

    Args:
        host: to listen on.

    Returns:
        From the environment where it is set, else a new one beyond this machine, else None; and whether it is new.

    Raises:
        ConfigError: the one of the environment is too short.
    """
    given = os.environ.get(TOKEN_VARIABLE, "")
    if given:
        if len(given) < MIN_TOKEN or not given.isascii() or not given.isprintable():
            raise ConfigError(f"{TOKEN_VARIABLE} is too weak", expected=f"{MIN_TOKEN} letters of ASCII or more")
        return given, False
    return (None, False) if is_loopback(host) else (secrets.token_urlsafe(32), True)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Open the socket, so that what is wrong with it is told in one line.

    Raises:
        ConfigError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it each answer takes 40 ms more.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({error.strerror})", expected="another --host or --port"
        ) from error
    return listening


def serve(
    index: Path,
    workspace_encoder: Path,
    settings: ServeSettings,
    listening: socket.socket,
    token: str | None,
    host: str,
    announce: Callable[[], None],
) -> None:
    """Serve until a signal ends it: then no new request is taken, and those begun are answered.

    Args:
        index: the index folder.
        workspace_encoder: the bundle where nothing names another.
        settings: how.
        listening: where.
        token: that is asked for.
        host: name that it listens on.
        announce: called when it is about to answer.

    Raises:
        MimcoError: it cannot begin.
    """
    server: uvicorn.Server | None = None
    app = create_app(
        index,
        workspace_encoder,
        settings,
        token=token,
        hosts=(*LOOPBACK, host),
        stopping=lambda: server is not None and server.should_exit,
    )
    app.state.context.service.prepare()
    announce()
    _log_to_stderr()
    config = uvicorn.Config(
        app,
        backlog=_ACCEPTED_AT_ONCE,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
    )
    server = _Server(config)
    server.run(sockets=[listening])


class _Server(uvicorn.Server):
    """Ends with 0 on a signal: uvicorn itself sends the signal once more when all is done."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept; more may wait for that than are accepted in one go."""
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(_BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        handlers = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _log_to_stderr() -> None:
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("mimco_deploy.access")
    log.handlers, log.propagate = [lines], False
    log.setLevel(logging.INFO)
