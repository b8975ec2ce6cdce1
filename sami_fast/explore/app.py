"""The page's server: which requests there are, how large they may be, who may send them.

Images lie in memory and have random names there; of a request nothing becomes a path. What a person is to read, a file that is no image,
is an answer like any other, {"error": sentence}. A request that this page never sends is refused with a status.
"""

import asyncio
import io
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import UserError
from ..files import parse_json
from .explorer import MOST_BYTES, Cancelled, Event, Explorer, Watch

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
FILES = {"/": ("index.html", "text/html"), "/explore.css": ("explore.css", "text/css"), "/explore.js": ("explore.js", "text/javascript")}
MOST_JSON = 1 << 16  # bytes of any other request
MOST_WAITING = 16  # requests that wait for the model
MOST_UPLOADS = 2  # files that are in memory at a time
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Result = TypeVar("Result")


class Guard:
    """Sends the headers, and refuses what another page's script posts: browsers say by Origin where a post comes from."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in HEADERS.items())]
            await send(message)

        request = Request(scope)
        expected = f"{scope['scheme']}://{request.headers.get('host')}"
        if scope["method"] not in ("GET", "HEAD") and request.headers.get("origin") != expected:
            return await Response(f"expected a request from {expected} itself\n", 403)(scope, receive, with_headers)
        return await self.app(scope, receive, with_headers)


class Turns:
    """One request at a time uses the model, in a thread of its own.

    Args:
        stopping: Set when the server ends.
    """

    def __init__(self, stopping: threading.Event) -> None:
        self.stopping = stopping
        self._thread, self._waiting = ThreadPoolExecutor(1, "model"), 0

    async def take(self, work: Callable[[], Result]) -> Result:
        if self._waiting >= MOST_WAITING:
            raise UserError("too many requests wait for the model; try again")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._waiting -= 1

    async def events(self, work: Callable[[Watch], None]) -> AsyncIterator[str]:
        """What the work says, a line of JSON each. Whoever stops to listen ends it at its next step."""
        loop, queue, gone = asyncio.get_running_loop(), asyncio.Queue[Event | None](), threading.Event()

        def say(event: Event | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        watch = Watch(say, lambda: gone.is_set() or self.stopping.is_set())

        def run() -> None:
            try:
                watch.look()
                work(watch)
            except Cancelled:
                pass
            except UserError as error:
                say({"error": str(error)})
            except Exception:
                log.exception("a picture could not be drawn")
                say({"error": "that failed; the terminal says why"})
            finally:
                say(None)

        async def take() -> None:
            try:
                await self.take(run)
            except UserError as error:
                say({"error": str(error)})
                say(None)

        taken = asyncio.create_task(take())  # kept by what it waits for, also when nobody listens any more
        try:
            while (event := await queue.get()) is not None:
                yield json.dumps(event) + "\n"
            await taken
        finally:
            gone.set()

    def end(self) -> None:
        self.stopping.set()
        self._thread.shutdown(wait=True, cancel_futures=True)


async def _body(request: Request, most: int) -> bytes:
    """The request's body, unless it is, or claims to be, longer than that."""
    too_long = HTTPException(413, f"expected at most {most} bytes")
    claimed = request.headers.get("content-length", "0")
    if not claimed.isdecimal() or int(claimed[:20]) > most:
        raise too_long
    body = io.BytesIO()
    async for part in request.stream():
        body.write(part)
        if body.tell() > most:
            raise too_long
    return body.getvalue()  # without a copy


async def _fields(request: Request) -> dict[str, Any]:
    try:
        fields = parse_json(await _body(request, MOST_JSON))
    except ValueError:
        raise HTTPException(400, "expected JSON") from None
    if not isinstance(fields, dict):
        raise HTTPException(400, "expected a JSON object")
    return fields


def _number(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise HTTPException(400, f"{name}: expected a whole number from 0")
    return value


def build_app(explorer: Explorer, hosts: list[str], stopping: threading.Event | None = None) -> Starlette:
    """The application.

    Args:
        explorer: What it shows.
        hosts: Names that requests may call the server by: another one means that a stranger's name was made to lead here.
        stopping: Set it to end what is being drawn.
    """
    turns = Turns(stopping or threading.Event())
    uploads = asyncio.Semaphore(MOST_UPLOADS)
    files = {path: ((PAGE / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}

    async def file(request: Request) -> Response:
        content, kind = files[request.url.path]
        return Response(content, media_type=kind)

    async def thumbnail(request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(explorer.thumbnails):
            raise HTTPException(404)
        return Response(explorer.thumbnails[number], media_type="image/png")

    async def answer(work: Callable[[], Event]) -> Response:
        try:
            return JSONResponse(await turns.take(work))
        except UserError as error:
            return JSONResponse({"error": str(error)})

    def stream(work: Callable[[Watch], None]) -> Response:
        return StreamingResponse(turns.events(work), media_type="application/x-ndjson")

    async def run(request: Request) -> Response:
        return await answer(explorer.facts)

    async def image(request: Request) -> Response:
        key = request.path_params["key"]
        return await answer(lambda: explorer.image_facts(key))

    async def upload(request: Request) -> Response:
        async with uploads:
            data = await _body(request, MOST_BYTES)
            return await answer(lambda: explorer.upload(data))

    async def held_out(request: Request) -> Response:
        number = _number(await _fields(request), "number")
        return await answer(lambda: explorer.held_out(number))

    async def reconstruct(request: Request) -> Response:
        fields = await _fields(request)
        return stream(lambda watch: explorer.reconstruct(fields.get("image"), watch))

    async def edit(request: Request) -> Response:
        fields = await _fields(request)
        seed = None if fields.get("seed") is None else _number(fields, "seed")
        return stream(lambda watch: explorer.edit(fields.get("image"), fields.get("axes"), fields.get("values"), watch, seed=seed))

    async def between(request: Request) -> Response:
        fields = await _fields(request)
        count = _number(fields, "count")
        return stream(lambda watch: explorer.between(fields.get("first"), fields.get("second"), count, watch))

    async def find_axes(request: Request) -> Response:
        await _fields(request)
        return stream(explorer.find_axes)

    async def save_axes(request: Request) -> Response:
        fields = await _fields(request)
        return await answer(lambda: explorer.save_axes(fields.get("axes"), fields.get("names"), fields.get("replace") is True))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        turns.end()

    posts = {
        "upload": upload,
        "held-out": held_out,
        "reconstruct": reconstruct,
        "edit": edit,
        "between": between,
        "find-axes": find_axes,
        "save-axes": save_axes,
    }
    routes = [
        *(Route(path, file) for path in files),
        Route("/held-out/{number:int}.png", thumbnail),
        Route("/api/run", run),
        Route("/api/images/{key}", image),
        *(Route(f"/api/{name}", endpoint, methods=["POST"]) for name, endpoint in posts.items()),
    ]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    return Starlette(routes=routes, middleware=[trusted, Middleware(Guard)], lifespan=lifespan)
