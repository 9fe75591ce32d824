"""What stands before the service: identity of a request, who may ask, how much may arrive, what the answer promises."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .page import FILES
from .problems import Problem
from .settings import Settings, is_loopback

log = logging.getLogger(__name__)

_OPEN = [f"/{name}" for name in FILES]  # these, samples and health need no token: they hold nothing of anybody
_UPLOADS = 64  # requests with a body at the same time: each may hold memory or a file
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """ASGI middleware: request ids, log lines, token, origin, limits of bytes and time, security headers.

    `refuse` makes the answer of a problem, here as behind it.
    """

    def __init__(self, app: ASGIApp, settings: Settings, token: str, refuse: Callable[[Problem], Response]) -> None:
        self._app, self._settings, self._token, self._refuse = app, settings, token.encode(), refuse
        self._uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, start = uuid.uuid4().hex[:16], time.monotonic()
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request
                headers.setdefault("cache-control", "no-store")
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        uploads = scope["method"] == "POST"
        self._uploads += uploads
        try:
            self._check(scope)
            if uploads and self._uploads > _UPLOADS:
                raise Problem(503, f"{_UPLOADS} uploads are under way", retry_after=1)
            # An answer to HEAD is that to GET, whose body the server leaves out; events never end by themselves.
            head = scope["method"] == "HEAD" and not scope["path"].endswith("/events")
            await self._app({**scope, "method": "GET"} if head else scope, self._limited(scope, receive), answer)
        except Problem as problem:  # also those that reading the body raises
            if status:
                raise
            await self._refuse(problem)(scope, receive, answer)
        finally:
            self._uploads -= uploads
            seconds = round(time.monotonic() - start, 4)
            fields = {"request": request, "method": scope["method"], "path": scope["path"][:200], "status": status}
            log.info("request", extra={**fields, "seconds": seconds})

    def _check(self, scope: Scope) -> None:
        """Raise Problem for a request that may not be served."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        origin = headers.get("origin")
        try:
            name, foreign = urlsplit(f"//{host}").hostname, bool(origin and urlsplit(origin).netloc != host)
        except ValueError as error:
            raise Problem(403, "Host or Origin is no address") from error
        link = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        if (headers.get("sec-fetch-site") == "cross-site" and not link) or foreign:
            raise Problem(403, "requests of other sites are not served")
        if not self._token and not is_loopback(name or ""):
            raise Problem(403, f"without a token this server answers to localhost, not to {host[:100]!r}")
        path = scope["path"]
        if self._token and not (path in _OPEN or path.startswith(("/samples/", "/health/"))):
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
                raise Problem(401, "send the token: Authorization: Bearer ...")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise Problem(400, "Content-Length is not a number")
        if int(length) > self._settings.max_bytes:
            raise Problem(413, f"a request may have {self._settings.max_bytes} bytes")

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """`receive`, which raises Problem for a body that is too long or too slow."""
        end = time.monotonic() + self._settings.upload_seconds
        taken, complete = 0, False

        async def limited() -> Message:
            nonlocal taken, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, end - time.monotonic())):
                    message = await receive()
            except TimeoutError as error:
                raise Problem(408, f"the request took over {self._settings.upload_seconds:g} s to arrive") from error
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > self._settings.max_bytes:
                raise Problem(413, f"a request may have {self._settings.max_bytes} bytes")
            return message

        return limited
