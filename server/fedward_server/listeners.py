"""HTTP listeners for the SuperLink: who is calling, which paths exist, and requests that wait for news.

Nothing here knows Flower. `OnlyPaths` answers 404 to all but one prefix; `PeerProtocol` hands the
client's certificate to the application, which uvicorn does not; `BoundedBody` refuses what is larger than
any message; `LongPoll` holds a request for messages until there is one, so that neither sites nor
ServerApp poll.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HOLD_S = 2.0  # how long an empty pull is held; also how long a stopping site may still wait
MAX_BODY = 64 * 2**20  # Flower sends tensors in pieces of 5 MiB; messages list at most some thousand
PEER = "fedward_peer"


class Listener(uvicorn.Server):
    """A uvicorn server that leaves signals to the process and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()
        self.port = 0

    def install_signal_handlers(self) -> None:
        """Signals belong to `serve`."""

    async def startup(self, sockets: Any = None) -> None:
        """Bind, and remember the port."""
        await super().startup(sockets)
        if self.started:
            self.port = self.servers[0].sockets[0].getsockname()[1]
            self.ready.set()


class PeerProtocol(HttpToolsProtocol):
    """Hands the client's certificate to the application, which uvicorn does not."""

    def on_message_begin(self) -> None:
        """Add the certificate (DER, or None without TLS) to the request's scope."""
        super().on_message_begin()
        tls = self.transport.get_extra_info("ssl_object")
        self.scope[PEER] = None if tls is None else tls.getpeercert(binary_form=True)  # type: ignore[literal-required]


class OnlyPaths:
    """404 for everything outside one prefix, without asking the application behind it."""

    def __init__(self, prefix: str, app: App) -> None:
        self._prefix = prefix
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            path = scope["path"]
            # Compare what the router will see: no dot segments, no doubled or encoded slashes.
            plain = path.startswith(self._prefix) and "//" not in path and ".." not in path
            if plain and scope["method"] == "POST":
                await self._app(scope, receive, send)
            else:
                await answer(send, 404)


class BoundedBody:
    """Reads a request's whole body, as the application would, but not more than `MAX_BODY`: 413.

    Args:
        app: what serves the request.
        permits: asked with the bytes of the body whether they may be taken; if not: 413.
    """

    def __init__(self, app: App, permits: Callable[[Scope, int], bool] = lambda _scope, _size: True) -> None:
        self._app = app
        self._permits = permits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = await _read_body(receive)
        if body is None or not self._permits(scope, len(body)):
            await answer(send, 413)
            return
        read = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


class News:
    """Wakes held pulls when something was pushed."""

    def __init__(self) -> None:
        self._event: asyncio.Event | None = None

    async def wait(self, seconds: float) -> None:
        """Until the next `tell`, or `seconds`."""
        if self._event is None:
            self._event = asyncio.Event()
        try:
            await asyncio.wait_for(asyncio.shield(self._event.wait()), seconds)
        except TimeoutError:
            return

    def tell(self) -> None:
        """Wake everyone who waits now."""
        event, self._event = self._event, None
        if event is not None:
            event.set()


class LongPoll:
    """Repeats an empty `pull-messages` until there is a message, or `HOLD_S` has passed."""

    def __init__(self, app: App, *, awaits: News, tells: News) -> None:
        self._app = app
        self._awaits = awaits
        self._tells = tells

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"].endswith("/pull-messages"):
            await self._held(scope, receive, send)
        else:
            await self._app(scope, receive, send)
            if scope["path"].endswith("/push-messages"):
                self._tells.tell()

    async def _held(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive()).get("body", b"")  # whole: see BoundedBody
        until = asyncio.get_running_loop().time() + HOLD_S
        while True:
            pause = self._awaits.wait(max(0.0, until - asyncio.get_running_loop().time()))
            waiting = asyncio.ensure_future(pause)  # from before the look, so that nothing is missed
            reply = await _ask(self._app, dict(scope), body)
            empty = reply[0]["status"] == 200 and not any(part.get("body") for part in reply[1:])
            if not empty or asyncio.get_running_loop().time() >= until:
                waiting.cancel()
                for part in reply:
                    await send(part)
                return
            await waiting


async def _ask(app: App, scope: Scope, body: bytes) -> list[MutableMapping[str, Any]]:
    """Call an ASGI application with a body already read; return the messages it sends."""
    parts: list[MutableMapping[str, Any]] = []
    asked = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal asked
        if asked:
            return {"type": "http.disconnect"}
        asked = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(part: MutableMapping[str, Any]) -> None:
        parts.append(part)

    scope["state"] = dict(scope.get("state", {}))
    await app(scope, receive, send)
    return parts


async def _read_body(receive: Receive) -> bytes | None:
    """The request's body, or None when it is larger than any message can be or was broken off."""
    body = bytearray()
    while True:
        part = await receive()
        if part["type"] == "http.disconnect":
            return None
        body += part.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not part.get("more_body"):
            return bytes(body)


async def answer(send: Send, status: int) -> None:
    """Answer with a status and nothing else, and end the connection: what follows is not read."""
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def header(scope: Scope, name: bytes) -> bytes | None:
    """The one value of a header; None when it is absent or repeated."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[0] if len(values) == 1 else None
