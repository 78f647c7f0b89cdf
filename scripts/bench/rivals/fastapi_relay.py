"""A relay to an OpenAI-compatible API, written with FastAPI and httpx: the usual sidecar behind a web server.

usage: OPENAI_API_BASE=… uvicorn --app-dir … fastapi_relay:app --uds SOCKET
"""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse

client: httpx.AsyncClient


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for all requests, with as many connections as there are streams."""
    global client
    async with httpx.AsyncClient(
        base_url=os.environ["OPENAI_API_BASE"],
        headers={"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'dummy')}"},
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        timeout=httpx.Timeout(30, read=120),
    ) as client:
        yield


app = FastAPI(lifespan=lifespan)


async def relay(response: httpx.Response) -> AsyncIterator[str]:
    """The API's events, made into ours."""
    try:
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            event = line[5:].strip()
            if event == "[DONE]":
                break
            for choice in json.loads(event)["choices"]:
                if content := choice["delta"].get("content"):
                    yield f"data: {json.dumps({'content': content})}\n\n"
        yield "data: [DONE]\n\nevent: done\ndata: {}\n\n"
    finally:
        await response.aclose()


@app.get("/stream")
async def stream(prompt: str, model: str = "gpt-4o") -> StreamingResponse:
    """Answer a prompt."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "stream": True}
    try:
        response = await client.send(client.build_request("POST", "/chat/completions", json=body), stream=True)
    except httpx.HTTPError as error:
        raise HTTPException(502) from error
    if response.status_code != 200:
        await response.aclose()
        raise HTTPException(502)
    return StreamingResponse(relay(response), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
