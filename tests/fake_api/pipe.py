"""The bytes to one client, and the ways a connection can end."""

import asyncio
import contextlib
import socket
import struct
from typing import Final

PIECE: Final = 65536


class Pipe:
    """A connection's writing side. What is written is on its way at once and in order; `drain` waits until the kernel
    took it all, under TLS but for 64 KB that wait below TLS.
    """

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._dripping: asyncio.Queue[bytes] | None = None
        self._drops: asyncio.Task[None] | None = None
        self.closed = False
        """By us."""
        writer.transport.set_write_buffer_limits(high=1, low=0)  # with high=0, asyncio's TLS pauses for good

    def write(self, data: bytes) -> None:
        if self.closed:
            return
        if self._dripping is None:
            self._writer.write(data)
        else:
            self._dripping.put_nowait(data)

    async def drain(self) -> None:
        """Raises OSError when the client is gone."""
        if self._dripping is not None:
            await self._dripping.join()
        await asyncio.sleep(0)  # asyncio's drain does not always let the loop turn, which must notice the client's end
        await self._writer.drain()

    def drip(self) -> None:
        """From now on every byte is a write of its own."""
        if self._dripping is None:
            self._dripping = asyncio.Queue()
            self._drops = asyncio.get_running_loop().create_task(self._drip(self._dripping))

    def reset(self) -> None:
        """End it by an RST, without TLS's goodbye. What was not yet sent is lost."""
        sock = self._writer.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._end()
        self._writer.transport.abort()

    def close(self) -> None:
        """End it in order: what was written arrives, then the end of the file."""
        self._end()
        self._writer.close()

    async def gone(self) -> None:
        """Wait until a connection that was closed or reset is no more. Raises OSError if it ended badly."""
        await self._writer.wait_closed()

    def _end(self) -> None:
        self.closed = True
        if self._drops is not None:
            self._drops.cancel()

    async def _drip(self, queue: "asyncio.Queue[bytes]") -> None:
        while True:
            data = await queue.get()
            for number in b"" if self._writer.is_closing() else data:
                self._writer.write(bytes((number,)))
                await asyncio.sleep(0)
            queue.task_done()
