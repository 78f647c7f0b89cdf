#!/usr/bin/env python3
"""The endpoint as a CGI script: checks the request, says where it is to be streamed, and is done.

The data is printed as the body, since Apache takes header lines of 8 KB at most from a CGI script. FORKD_SOCKET is set
by `SetEnv FORKD_SOCKET /path` in Apache's configuration.
"""

import json
import os
import sys
from urllib.parse import parse_qs


def fail(status: str, code: str, error: str) -> None:
    """An error of our own: with a status that is not 2xx nothing is handed off."""
    body = json.dumps({"error": error, "code": code})
    print(f"Status: {status}\nContent-Type: application/json\nCache-Control: no-store\n\n{body}")
    sys.exit()


def main() -> None:
    # AUTHENTICATION GOES HERE, before anything that costs money: a session's cookie (HTTP_COOKIE), REMOTE_USER, …
    user = os.environ.get("REMOTE_USER", "anonymous")
    if os.environ["REQUEST_METHOD"] == "POST":
        form = sys.stdin.buffer.read(int(os.environ.get("CONTENT_LENGTH") or 0)).decode(errors="replace")
    else:
        form = os.environ["QUERY_STRING"]
    prompt = parse_qs(form, errors="replace").get("prompt", [""])[0]
    if not prompt.strip():
        fail("400 Bad Request", "no_prompt", "Please enter a prompt")
    print("X-Socket-Handoff:", os.environ.get("FORKD_SOCKET", "/run/forkd/forkd.sock"))
    print("X-Handoff-Data-Source: body")
    print("Set-Cookie: seen=1; Path=/; HttpOnly; SameSite=Lax")  # goes to the browser with forkd's answer
    print("Content-Type: application/json\n")
    print(json.dumps({"prompt": prompt, "user_id": user}))


main()
