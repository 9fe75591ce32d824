"""The HTTP protocol of uvicorn, which waits for ever for the head of a request, and for a client to read its answer."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS = 10.0  # from the first moment of a connection, or the first byte of a later request, to the end of its headers
FLUSH = 30.0  # that a client may leave a piece of its answer unread: 64 KiB, or what came at once


class Protocol(H11Protocol):
    """Closes connections whose client does not say what it wants, or does not take it: a thousand would be all there
    are."""

    _clock: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there: the clock runs."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # writing pauses as long as anything is unread: a close waits for that
        self._look()

    def data_received(self, data: bytes) -> None:
        """Bytes have come, which may complete the headers."""
        super().data_received(data)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        super().connection_lost(exc)
        self._stop()
        self._taken()

    def pause_writing(self) -> None:
        """The client has not taken all that was written: its clock runs."""
        super().pause_writing()
        self._unread = self.loop.call_later(FLUSH, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken everything."""
        super().resume_writing()
        self._taken()

    def send_400_response(self, msg: str) -> None:
        """The bytes are no HTTP: if that shows in a body, whoever reads it must not answer once more."""
        super().send_400_response(msg)
        if self.cycle is not None:
            self.cycle.disconnected = True

    def _look(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if not waits:
            self._stop()
        elif self._clock is None:
            self._clock = self.loop.call_later(SECONDS, self.transport.abort)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _taken(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
