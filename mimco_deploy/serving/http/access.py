"""Who may ask, and what a browser may do with the answers.

- **Token.** Where one is set, everything but the page's own files, health and readiness needs it: as a bearer, or as
  the cookie that `POST /v1/session` gives a browser in exchange, since pictures in a page cannot carry a header. The
  cookie holds a key made of the token, is out of reach of scripts and of other sites, and ends with the browser.
- **Host.** Without a token the service trusts the machine it runs on. A page from elsewhere can make a browser ask it
  under a name of its own (DNS rebinding), so only names of this machine are answered.
- **Origin.** No request from a page of another site is answered, and no page of another site may show what is here.
- **Headers.** A content security policy under which only the service's own files run; no sniffing, no framing.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

from starlette.datastructures import Headers

MIN_TOKEN = 16
"""Letters."""
COOKIE = "mimco_session"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)
"""Of every answer."""


class Access:
    """Decides who is answered.

    Args:
        token: that is asked for; None where the machine is trusted.
        hosts: names that the service answers to where there is no token.
        open_paths: answered without a token.
    """

    def __init__(self, token: str | None, hosts: Collection[str], open_paths: Collection[str]) -> None:
        self._token = None if token is None else token.encode()
        self._hosts = {host.lower() for host in hosts}
        self._open = frozenset(open_paths)
        self.cookie = "" if token is None else hmac.digest(token.encode(), b"mimco session", hashlib.sha256).hex()
        """What a browser that has shown the token carries."""

    def refusal(self, path: str, headers: Headers) -> tuple[int, str] | None:
        """Why a request is not answered: a status of HTTP and words; None where it is.

        Args:
            path: of the request.
            headers: the same.
        """
        host = headers.get("host", "")
        if self._token is None and _name(host) not in self._hosts:
            return 421, "this service answers to names of its own machine only; with a token it answers to others"
        linked = headers.get("sec-fetch-mode") == "navigate" and path == "/"  # somebody followed a link to the page
        foreign = headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not linked
        origin = headers.get("origin")
        if foreign or (origin is not None and origin.partition("://")[2].lower() != host.lower()):
            return 403, "requests from pages of other sites are not answered"
        if self._token is None or path in self._open or self.has_token(headers) or self._has_cookie(headers):
            return None
        return 401, "a token is needed: Authorization: Bearer TOKEN"

    def has_token(self, headers: Headers) -> bool:
        """Whether a request carries the token itself."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        return self._token is not None and kind.lower() == "bearer" and hmac.compare_digest(given.encode(), self._token)

    def _has_cookie(self, headers: Headers) -> bool:
        # Not by the standard library, which takes quadratic time and stops at what other programs set.
        pairs = (pair.strip().partition("=") for pair in headers.get("cookie", "").split(";"))
        return any(
            name == COOKIE and hmac.compare_digest(value.encode(), self.cookie.encode()) for name, _, value in pairs
        )


def _name(host: str) -> str:
    """Of a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
