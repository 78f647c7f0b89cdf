"""A relay from handoffs to an OpenAI-compatible API, written with asyncio and aiohttp: one process, one session.

usage: aiohttp_relay.py SOCKET API_BASE
"""

import asyncio
import json
import os
import socket
import sys
from typing import Any

import aiohttp

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Connection: close\r\nX-Accel-Buffering: no\r\n\r\n"
)
BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Relay:
    """Takes clients in at a Unix socket and streams an answer to each."""

    def __init__(self, session: aiohttp.ClientSession, api_base: str) -> None:
        self._session = session
        self._url = f"{api_base}/chat/completions"
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self, path: str) -> None:
        """Take handoffs from now on."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.setblocking(False)
        listener.bind(path)
        listener.listen(4096)
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except BlockingIOError:
                return
            with connection:
                data, fds, _, _ = socket.recv_fds(connection, 131072, 1)
            if fds:
                task = asyncio.create_task(self._serve(socket.socket(fileno=fds[0]), json.loads(data)))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: socket.socket, data: dict[str, Any]) -> None:
        _, writer = await asyncio.open_connection(sock=client)
        started = False
        try:
            request = {
                "model": data.get("model", "gpt-4o"),
                "messages": [{"role": "user", "content": data["prompt"]}],
                "stream": True,
            }
            async with self._session.post(self._url, json=request) as response:
                response.raise_for_status()
                writer.write(HEAD)
                started = True
                async for line in response.content:
                    if not line.startswith(b"data:"):
                        continue
                    event = line[5:].strip()
                    if event == b"[DONE]":
                        break
                    for choice in json.loads(event)["choices"]:
                        if content := choice["delta"].get("content"):
                            writer.write(f"data: {json.dumps({'content': content})}\n\n".encode())
                            await writer.drain()
                writer.write(b"data: [DONE]\n\nevent: done\ndata: {}\n\n")
                await writer.drain()
        except aiohttp.ClientError:
            if not started:
                writer.write(BAD_GATEWAY)
        except ConnectionError:
            pass
        finally:
            writer.close()


async def main(path: str, api_base: str) -> None:
    """Serve until ended."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=120),
        headers={"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'dummy')}"},
    ) as session:
        Relay(session, api_base).listen(path)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
