"""What uvicorn leaves open: connections without number, heads that never end, answers that nobody takes."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import uuid

from uvicorn.protocols.http.h11_impl import H11Protocol

from mimco_deploy.serving.http.problems import MEDIA_TYPE

try:
    import resource
except ImportError:  # Windows has neither it nor the limit
    resource = None  # type: ignore[assignment]

HEAD_S = 10.0
"""For a request to say what it wants, from its first byte, or from the connection where there is none; and for what
still comes of a body that was answered before its end."""
UNREAD_S = 30.0
"""For a client to take anything of an answer that waits for it."""
_MOST = 512

_LINGER_S = 1.0
"""For a client that is one too many to read why."""


def most_connections() -> int:
    """Connections that are held at once: a third of the files that may be open, for a picture being sent takes two."""
    if resource is None:
        return _MOST
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else max(1, min(_MOST, soft // 3))


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with an end to patience; arguments are uvicorn's."""

    _patience: asyncio.TimerHandle | None = None
    _is_refused = False
    _since = 0.0
    _from = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Hold it, or say that there are too many."""
        super().connection_made(transport)
        self._since, self._from = self.loop.time(), _neighbourhood(self.client)
        self._is_refused = not self._has_room()
        if self._is_refused:
            transport.write(_refusal())
            with contextlib.suppress(OSError):  # it may be gone already
                transport.write_eof()
        self._wait(_LINGER_S if self._is_refused else HEAD_S)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        if self._is_refused:
            return
        super().data_received(data)
        at_work = self.cycle is not None and not self.cycle.response_complete  # whose body `requests.py` bounds
        if at_work:
            self._stop_waiting()
        elif self._patience is None:
            self._wait(HEAD_S)

    def pause_writing(self) -> None:
        """The other side takes nothing any more."""
        super().pause_writing()
        self._stop_waiting()
        self._wait(UNREAD_S)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _has_room(self) -> bool:
        """Whether one more can be held; where not, one of an address that holds more than this one's makes room.

        Those that do nothing come first, then those whose request is on its way, then those whose answer is; of each
        the oldest. What is at work is not ended.
        """
        if len(self.connections) <= most_connections():
            return True
        held: dict[str, list[PatientProtocol]] = {}
        for one in self.connections:
            assert isinstance(one, PatientProtocol)
            if not (one._is_refused or one.transport.is_closing()):
                held.setdefault(one._from, []).append(one)
        if sum(map(len, held.values())) <= most_connections():
            return True
        greediest = max(held.values(), key=len)
        idle = [one for one in greediest if one.idleness() is not None]
        if len(greediest) <= len(held[self._from]) or not idle:
            return False
        min(idle, key=lambda one: (one.idleness(), one._since)).transport.abort()
        return True

    def idleness(self) -> int | None:
        """0 where it does nothing, 1 where a request is on its way, 2 where an answer is not taken; None at work."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return 0
        if cycle.more_body:
            return 1
        return 2 if self._patience is not None else None

    def _wait(self, seconds: float) -> None:
        # An orderly close would wait until all that is written has been taken.
        self._patience = self.loop.call_later(seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def _neighbourhood(client: tuple[str, int] | None) -> str:
    """What counts as one address: of IPv6 the 64 bits that a provider gives to one customer."""
    try:
        address = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _refusal() -> bytes:
    document = {
        "type": "urn:mimco:busy",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "too many connections are open",
        "instance": f"urn:uuid:{uuid.uuid4()}",
    }
    body = json.dumps(document).encode()
    head = f"Content-Type: {MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    return b"HTTP/1.1 503 Service Unavailable\r\n" + head.encode() + body
