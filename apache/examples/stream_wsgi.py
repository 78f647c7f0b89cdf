"""The endpoint as a WSGI application: for Flask, Django and the like, the same three lines in a response of theirs.

It runs under any WSGI server behind mod_proxy_http (gunicorn, uWSGI, …), and under mod_wsgi. That server is to be
trusted: whoever answers through Apache may ask for a handoff.
"""

import json
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

SOCKET = os.environ.get("FORKD_SOCKET", "/run/forkd/forkd.sock")


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Check the request, say where it is to be streamed, and be done."""
    # AUTHENTICATION GOES HERE, before anything that costs money.
    user = environ.get("REMOTE_USER") or "anonymous"
    if environ["REQUEST_METHOD"] == "POST":
        form = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)).decode(errors="replace")
    else:
        form = environ.get("QUERY_STRING", "")
    prompt = parse_qs(form, errors="replace").get("prompt", [""])[0]
    if not prompt.strip():
        # An error of our own: with a status that is not 2xx nothing is handed off.
        body = json.dumps({"error": "Please enter a prompt", "code": "no_prompt"}).encode()
        start_response("400 Bad Request", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]
    data = json.dumps({"prompt": prompt, "user_id": user}).encode()
    fields = [
        ("X-Socket-Handoff", SOCKET),
        ("X-Handoff-Data-Source", "body"),  # a header line ends at 8 KB
        ("Set-Cookie", "seen=1; Path=/; HttpOnly; SameSite=Lax"),  # goes to the browser with forkd's answer
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(data))),
    ]
    start_response("200 OK", fields)
    return [data]
