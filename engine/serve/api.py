"""The HTTP interface: routes over the store. Nothing here computes a picture."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import io
import json
import shutil
import sqlite3
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Annotated, Any, BinaryIO, TypeVar

from fastapi import Depends, FastAPI, File, Form, Header, Path, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from pydantic import StringConstraints
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from engine import __version__
from engine.export.commands import choice

from . import problems
from .decoder import DECODERS, Decoders
from .guard import Guard
from .metrics import Metrics
from .page import FILES
from .problems import Problem
from .settings import Settings
from .store import UNFINISHED, ConflictError, FullError, Row, Store
from .supervisor import Supervisor

_T = TypeVar("_T")
_PICTURES = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
_LOOK = 0.15  # seconds between two looks of an event stream at the store
_ALIVE = 15.0  # seconds of silence after which an event stream sends a comment
_STREAMS = 256  # event streams at the same time
_WAIT = 30.0  # seconds that an upload may wait for others to be looked at
_LOSSES = 2000  # in one event: more come in the next
_PIECE = 2**16  # bytes of a picture that are sent at a time
_JOB = {
    "id": "7f0a3c52d1f94a0e8f5e1c0b9d2a6e41", "state": "running", "reason": None, "place": None, "scale": 256,
    "iteration": 40, "total": 141, "loss": 0.0312, "eta": 9.5, "preview": 3, "seconds": 4.1, "priority": 0,
    "options": {"size": 256}, "created": 1764000000.0, "started": 1764000001.0, "finished": None,
    "image": "/v1/jobs/7f0a3c52d1f94a0e8f5e1c0b9d2a6e41/image",
    "events": "/v1/jobs/7f0a3c52d1f94a0e8f5e1c0b9d2a6e41/events",
}  # fmt: skip
_PAINTED: dict[int | str, dict[str, Any]] = {200: {"description": "", "content": {media: {} for media in _PICTURES}}}
_OPTIONS = {
    "small": {"summary": "A quick look", "value": '{"size": 256, "iterations": 40}'},
    "strong": {"summary": "Much style", "value": '{"size": 512, "style_weight": 100000}'},
    "default": {"summary": "The defaults", "value": "{}"},
}

JobId = Annotated[str, Path(pattern="^[0-9a-f]{32}$", examples=[_JOB["id"]])]
_HASH = "^[0-9a-f]{64}$"
StyleId = Annotated[str, Path(pattern=_HASH)]
StyleIds = list[Annotated[str, StringConstraints(pattern=_HASH)]]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problem documents of a route, for OpenAPI."""
    schema = {
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
        },
    }
    content = {"application/problem+json": {"schema": schema}}
    texts = {401: "No token", 403: "Another site", 404: "Not here", 406: "No such format", 408: "Too slow"}
    return {code: {"description": texts.get(code, "Refused"), "content": content} for code in (401, 403, *statuses)}


def _ok(code: int, text: str, example: Any, media: str = "application/json") -> dict[int | str, dict[str, Any]]:
    return {code: {"description": text, "content": {media: {"example": example}}}}


def _only(*names: str) -> Any:
    """Refuse form fields of other names: what is meant by them would be left out in silence."""

    async def check(request: Request) -> None:
        try:
            for name in await request.form():
                choice("field", name[:80], names)
        except ValueError as error:
            raise Problem(422, str(error)) from error

    return Depends(check)


def view(store: Store, row: Row) -> Row:
    """A job as clients see it."""
    names = ("id", "state", "reason", "scale", "iteration", "total", "loss", "eta", "preview", "seconds", "priority",
             "created", "started", "finished")  # fmt: skip
    place = store.place(row) if row["state"] == "queued" else None
    url = f"/v1/jobs/{row['id']}"
    links = {"image": f"{url}/image", "events": f"{url}/events"}
    return {**{name: row[name] for name in names}, "place": place, "options": json.loads(row["options"]), **links}


class Service:
    """What the routes share."""

    def __init__(self, settings: Settings, token: str) -> None:
        self.settings, self.token = settings, token
        self.store = Store(settings.data)
        self.metrics = Metrics(self.store)
        self.stopping = False
        self.mistake = False  # why it stops: no worker could start
        self.streams = 0
        self.check_picture: Callable[[str, bytes], tuple[int, int]] = functools.partial(
            problems.check_picture, max_pixels=settings.max_pixels
        )
        # Threads of their own: uploads that wait for a decoder must not keep the others from answering.
        self.turns = ThreadPoolExecutor(2 * DECODERS, "turn")
        self.conversions = ThreadPoolExecutor(2, "conversion")
        self.looks = ThreadPoolExecutor(2, "look")  # of event streams; the store serves one at a time anyway

    def job(self, job: str) -> Row:
        """The row of a job. Raises Problem."""
        try:
            return self.store.job(job)
        except KeyError as error:
            raise Problem(404, "there is no such job, or it was removed") from error

    @staticmethod
    async def turn(pool: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
        """What work gives that takes its time: some is done at once, the rest waits for a while. Raises Problem."""
        task = pool.submit(work)
        answer = asyncio.wrap_future(task)
        done, _ = await asyncio.wait([answer], timeout=_WAIT)
        if not done and task.cancel():  # it has not begun
            raise Problem(503, "too much waits to be decoded", retry_after=5)
        return await answer

    def in_turn(self, route: Callable[..., Response]) -> Callable[..., Awaitable[Response]]:
        """A route that takes its time."""

        @functools.wraps(route)
        async def turned(**given: Any) -> Response:
            return await self.turn(self.turns, functools.partial(route, **given))

        return turned

    def painted(self, job: str) -> tuple[Row, BinaryIO]:
        """A job and the file of its picture, or of the picture so far. Raises Problem."""
        row = self.job(job)
        for name in ("result.png", "preview.png"):
            with contextlib.suppress(FileNotFoundError):
                return row, (self.store.folder(job) / name).open("rb")
        if row["state"] in UNFINISHED:
            raise Problem(409, f"there is no picture yet: the job is {row['state']}", retry_after=1)
        raise Problem(404, f"there is no picture: the job is {row['state']}")

    def refuse(self, problem: Problem) -> Response:
        """The problem document, counted."""
        self.metrics.rejected.labels(problem.status_code).inc()
        return problem.response()

    def check_open(self) -> None:
        """Raise Problem if nothing can be stored now."""
        if self.stopping:
            raise Problem(503, "the server is stopping", retry_after=10)
        if shutil.disk_usage(self.settings.data).free < self.settings.reserve:
            raise Problem(507, "the disk is full", retry_after=60)

    def check_room(self, client: str) -> None:
        """Raise Problem if the queue takes no job of this client; asked before an upload is decoded, too."""
        with self.full():
            self.store.check_room(client, self.settings.queue, self.settings.per_client)

    @contextlib.contextmanager
    def full(self) -> Any:
        """`FullError` as a Problem that says when to come again."""
        try:
            yield
        except FullError as error:
            wait = self.store.mean_seconds() * (1 if error.yours else max(1, self.settings.queue // 8))
            raise Problem(429 if error.yours else 503, str(error), retry_after=min(600, max(1, round(wait)))) from error


def create_app(settings: Settings, token: str = "") -> FastAPI:
    """The application, whose lifespan starts and stops the workers; `app.state.service` is what the routes share."""
    service = Service(settings, token)
    store = service.store

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(store.recover)
        supervisor, decoders = Supervisor(store, settings), Decoders(settings.max_pixels)
        service.check_picture = decoders.check
        supervisor.start()
        yield
        service.stopping = True
        decoders.close()
        await asyncio.to_thread(supervisor.stop)
        service.mistake = supervisor.mistake
        for pool in (service.turns, service.conversions, service.looks):
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)
        store.close()

    app = FastAPI(
        title="gatys-engine", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Style transfer by optimisation, as jobs.",
    )  # fmt: skip
    app.state.service = service
    app.add_middleware(Guard, settings=settings, token=token, refuse=service.refuse)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, OSError) and not isinstance(error, Problem):  # of a body, on its way to a file
            return await storage(request, error.__cause__)
        response = service.refuse(error if isinstance(error, Problem) else Problem(error.status_code, error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        text = "send a file, as curl's -F NAME=@FILE does" if "UploadFile" in first["msg"] else first["msg"]
        return service.refuse(Problem(422, f"{where}: {text}"))

    @app.exception_handler(OSError)
    @app.exception_handler(sqlite3.Error)
    async def storage(request: Request, error: Exception) -> Response:
        problem = problems.of_storage(error)
        if problem.status_code == 500:
            problems.log.error("store", exc_info=error)
        return service.refuse(problem)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return service.refuse(Problem(500, "something broke; the log has the rest"))

    @app.post(
        "/v1/jobs", status_code=202, response_model=None, summary="Ask for a picture",
        responses=_ok(202, "Accepted: it is on the disk", _JOB)
        | _errors(400, 404, 408, 409, 413, 415, 422, 429, 503, 507),
        dependencies=[_only("content", "style", "style_id", "options", "priority", "deadline")],
    )  # fmt: skip
    @service.in_turn
    def add_job(
        request: Request,
        content: Annotated[UploadFile, File(description="the picture to paint")],
        style: Annotated[list[UploadFile] | None, File(description="pictures whose style is taken")] = None,
        style_id: Annotated[StyleIds | None, Form(description="ids of stored styles")] = None,
        options: Annotated[str, Form(description="JSON of `Config`", openapi_examples=_OPTIONS)] = "{}",
        priority: Annotated[int, Form(ge=-9, le=9, description="higher goes first")] = 0,
        deadline: Annotated[float | None, Form(gt=0, le=1e7, description="seconds it may run")] = None,
        idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    ) -> Response:
        if len(style or []) + len(style_id or []) > 8:
            raise Problem(422, "style: at most 8 are mixed")
        data, *pictures = (each.file.read() for each in (content, *(style or [])))
        styles: list[bytes | str] = [*pictures, *(style_id or [])]
        digests = [each if isinstance(each, str) else hashlib.sha256(each).hexdigest() for each in (data, *styles)]
        asked = json.dumps([digests, options, priority, deadline])
        row: Row = {
            "id": uuid.uuid4().hex,
            "client": request.client.host if request.client else "unknown",
            "key": idempotency_key or None,
            "fingerprint": hashlib.sha256(asked.encode()).hexdigest(),
            "styles": len(styles),
            "priority": priority,
            "deadline": min(settings.deadline, deadline or settings.deadline),
        }
        full = None
        try:
            service.check_room(row["client"])  # before the next question: the same request may just take the room
        except Problem as error:
            full = error
        try:
            job = store.known(row)  # before anything is asked that may have changed since
            if job is None:
                service.check_open()
                if full:
                    raise full
                if not styles:
                    raise Problem(422, "style: send at least one picture, or style_id")
                size = service.check_picture("content", data)
                shapes = [service.check_picture("style", each) for each in pictures]
                row["options"] = problems.check_options(options, size, len(styles), settings)
                for shape in (*shapes, *map(store.style_size, style_id or [])):
                    problems.check_style(shape, settings)
                with service.full():
                    job = store.add(row, data, styles, (settings.queue, settings.per_client))
        except KeyError as error:
            raise Problem(404, "there is no such style") from error
        except ConflictError as error:
            raise Problem(409, str(error)) from error
        if job["id"] == row["id"]:
            service.metrics.accepted.inc()
        headers = {"location": f"/v1/jobs/{job['id']}"}
        return JSONResponse(view(store, job), 202, headers)

    @app.get(
        "/v1/jobs/{job}",
        response_model=None,
        summary="State of a job",
        responses=_ok(200, "", _JOB) | _errors(404, 422),
    )
    def get_job(job: JobId) -> Response:
        return JSONResponse(view(store, service.job(job)))

    @app.delete(
        "/v1/jobs/{job}", response_model=None, summary="Cancel a job; a finished one stays as it is",
        responses=_ok(200, "", _JOB) | _errors(404, 422),
    )  # fmt: skip
    def cancel_job(job: JobId) -> Response:
        service.job(job)
        return JSONResponse(view(store, store.cancel(job)))

    @app.get(
        "/v1/jobs/{job}/image", response_model=None, summary="The picture, or the picture so far",
        responses=_PAINTED
        | _errors(404, 406, 409, 422, 503),
    )  # fmt: skip
    async def image(job: JobId, accept: Annotated[str, Header()] = "*/*") -> Response:
        media = _negotiate(accept)
        row, file = await run_in_threadpool(service.painted, job)
        if _PICTURES[media] != "PNG":
            with file:
                work = functools.partial(_convert, file, _PICTURES[media])
                file = await service.turn(service.conversions, work)
        headers = {"vary": "accept", "x-job-state": row["state"], "content-length": str(file.seek(0, io.SEEK_END))}
        return StreamingResponse(_pieces(file), 200, headers, media)

    @app.get(
        "/v1/jobs/{job}/events", response_model=None, summary="Progress as server-sent events",
        responses=_ok(200, "progress, preview and end", "event: end\ndata: {}\n\n", "text/event-stream")
        | _errors(404, 422, 503),
    )  # fmt: skip
    async def events(job: JobId, last_event_id: Annotated[int, Header(ge=0, le=10**9)] = 0) -> Response:
        await asyncio.wrap_future(service.looks.submit(service.job, job))
        if service.streams >= _STREAMS:
            raise Problem(503, f"{_STREAMS} event streams are open", retry_after=5)
        headers = {"x-accel-buffering": "no"}  # nginx would hold events back
        return StreamingResponse(_events(service, job, last_event_id), 200, headers, "text/event-stream")

    @app.post(
        "/v1/styles", status_code=201, response_model=None, summary="Store a style",
        responses=_ok(201, "Stored", {"id": "5" * 64}) | _ok(200, "It was there", {"id": "5" * 64})
        | _errors(400, 408, 413, 415, 422, 503, 507), dependencies=[_only("style")],
    )  # fmt: skip
    @service.in_turn
    def add_style(style: Annotated[UploadFile, File(description="the picture")]) -> Response:
        service.check_open()
        data = style.file.read()
        size = service.check_picture("style", data)
        name = hashlib.sha256(data).hexdigest()
        stored = [row["id"] for row in store.styles()]
        if name not in stored and len(stored) >= settings.styles:
            raise Problem(503, f"{settings.styles} styles are stored, which is the limit", retry_after=600)
        new = store.add_style(name, size, data)
        return JSONResponse({"id": name}, 201 if new else 200, {"location": f"/v1/styles/{name}"})

    @app.get("/v1/styles", response_model=None, summary="Stored styles", responses=_ok(200, "", []) | _errors())
    def get_styles() -> Response:
        return JSONResponse(store.styles())

    @app.delete(
        "/v1/styles/{style}", status_code=204, response_model=None, summary="Forget a style; jobs that use it go on",
        responses=_errors(404, 422),
    )  # fmt: skip
    def remove_style(style: StyleId) -> Response:
        try:
            store.remove_style(style)
        except KeyError as error:
            raise Problem(404, "there is no such style") from error
        return Response(status_code=204)

    @app.get("/health/live", summary="The process answers")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready", summary="A worker is ready and jobs are taken", responses=_errors(503, 507))
    def ready() -> dict[str, Any]:
        service.check_open()
        workers = [{name: row[name] for name in ("device", "weights")} for row in store.workers()]
        if not workers:
            raise Problem(503, "no worker is ready yet", retry_after=2)
        return {"status": "ready", "workers": workers}

    @app.get("/metrics", response_model=None, summary="Prometheus metrics", responses=_ok(200, "", "", "text/plain"))
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/samples/{name}", include_in_schema=False)
    def sample(name: str) -> Response:
        if name not in ("content.jpg", "style.jpg"):
            raise Problem(404, "there is no such sample")
        return Response((resources.files("engine.samples") / name).read_bytes(), media_type="image/jpeg")

    @app.get("/", include_in_schema=False)
    @app.get("/{name}", include_in_schema=False)
    def page(name: str = "") -> Response:
        if name not in FILES:
            raise Problem(404, "there is nothing here")
        file = resources.files("engine.serve.page") / (name or "index.html")
        return Response(file.read_bytes(), media_type=FILES[name], headers={"cache-control": "no-cache"})

    return app


async def _events(service: Service, job: str, after: int) -> AsyncIterator[str]:
    """The events of a job from iteration `after` + 1 on, until it ends, the client goes or the server stops."""
    service.streams += 1
    last: Row | None = None
    more = False  # losses than the last event held

    def look() -> tuple[Row, list[Any]]:
        """The job, and what it lost since if it has moved; the store may be busy for seconds."""
        row = view(service.store, service.store.job(job))
        return row, service.store.losses(job, after, _LOSSES) if more or row != last else []

    try:
        preview, silent = 0, 0.0
        while not service.stopping:
            try:
                row, losses = await asyncio.wrap_future(service.looks.submit(look))
            except KeyError:  # removed
                return
            if more or row != last:
                after = losses[-1][0] if losses else after
                more = len(losses) == _LOSSES
                yield _event("progress", {**row, "losses": losses}, after)
                if row["preview"] > preview:
                    preview = row["preview"]
                    yield _event("preview", {"image": f"{row['image']}?v={preview}"}, after)
                last, silent = row, 0.0
            if more:
                continue
            if row["state"] not in UNFINISHED:
                yield _event("end", row, after)
                return
            if silent >= _ALIVE:
                yield ": alive\n\n"
                silent = 0.0
            await asyncio.sleep(_LOOK)
            silent += _LOOK
    finally:
        service.streams -= 1


def _event(name: str, data: Row, number: int) -> str:
    return f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n"


def _negotiate(accept: str) -> str:
    """The media type of the answer, by quality and then our order. Raises Problem."""
    given = {}
    for part in accept.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        given[name] = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                with contextlib.suppress(ValueError):
                    given[name] = float(parameter[2:])

    def quality(media: str) -> float:
        """That of what names it most closely."""
        return next((given[name] for name in (media, "image/*", "*/*") if name in given), 0.0)

    best = max(_PICTURES, key=quality)
    if not quality(best) > 0:
        raise Problem(406, f"choose from {', '.join(_PICTURES)}")
    return best


def _convert(file: BinaryIO, form: str) -> BinaryIO:
    """A PNG file in another format."""
    stream = io.BytesIO()
    image = Image.open(file)
    options = {"quality": 95, "icc_profile": image.info.get("icc_profile")}
    if form == "JPEG":
        image.convert("RGB").save(stream, form, subsampling=0, **options)
    else:
        image.save(stream, form, **options)
    return stream


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """What is in a file, bit by bit: of what a slow client does not read yet, little is in memory."""
    with file:
        file.seek(0)
        while piece := file.read(_PIECE):
            yield piece
