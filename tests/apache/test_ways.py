"""Each way in which the header may arrive, and the module's answer: the table of docs/any-language.md.

headers_out: what a handler sets, and `Header set`. err_headers_out: `Header always set`, which outlives errors.
"""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from harness import Apache, public_dir
from receiver import Receiver

TIMEOUT = 30
OURS = ("X-Socket-Handoff", "X-Handoff-Data", "X-Handoff-Data-Source")
# Each says status, path and text as its query asks.
SCRIPT_PHP = """<?php
if (isset($_GET['status'])) http_response_code((int)$_GET['status']);
foreach ((array)($_GET['path'] ?? []) as $path) header('X-Socket-Handoff: ' . $path, false);
header('X-Handoff-Data: php data');
echo 'php page';
"""
SCRIPT_CGI = r"""#!/bin/sh
status=$(printf %s "$QUERY_STRING" | sed -n 's/.*status=\([0-9]*\).*/\1/p')
path=$(printf %s "$QUERY_STRING" | sed -n 's/.*path=\([^&]*\).*/\1/p' | sed 's/%2F/\//g')
[ -z "$status" ] || printf 'Status: %s Some\n' "$status"
printf 'X-Socket-Handoff: %s\nX-Handoff-Data: cgi data\nContent-Type: text/plain\n\ncgi page' "$path"
"""


class Application(BaseHTTPRequestHandler):
    """Behind mod_proxy_http."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        self.send_response(int(asked.get("status", "200")))
        for name, value in zip(OURS, (asked.get("path", ""), "app data"), strict=False):
            self.send_header(name, value)
        body = b"app page" if self.command == "GET" and asked.get("status") not in ("204", "304") else b""
        if asked.get("status") != "204":
            self.send_header("Content-Length", "8")
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


class Site(NamedTuple):
    apache: Apache
    sock: Path

    def ask(self, where: str, method: str = "GET", headers: dict[str, str] | None = None, **query: object) -> str:
        """ "handed off", or the status and the page that the client gets."""
        with Receiver(self.sock) as daemon:
            response = requests.request(
                method, self.apache.url + where, params=query, headers=headers, timeout=TIMEOUT, allow_redirects=False
            )
            assert not {*OURS} & {*response.headers}
            if (response.status_code, response.text) == (200, "from the daemon"):
                return f"handed off: {daemon.get().data.decode()}"
            assert daemon.nothing_came()
            return f"{response.status_code} {response.text.strip()}".strip()


@pytest.fixture(scope="module", params=["prefork", "event"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with public_dir() as docroot, public_dir() as prefix, ThreadingHTTPServer(("127.0.0.1", 0), Application) as app:
        threading.Thread(target=app.serve_forever, args=(0.01,), daemon=True).start()
        (docroot / "script.php").write_text(SCRIPT_PHP)
        (docroot / "script.cgi").write_text(SCRIPT_CGI)
        (docroot / "script.cgi").chmod(0o755)
        for name in ("static", "always", "both", "empty", "json"):
            (docroot / f"{name}.txt").write_text("static page")
            os.utime(docroot / f"{name}.txt", (1e9, 1e9))
        sock = prefix / "s"
        conf = f"""
AddHandler cgi-script .cgi
<Directory {docroot}>
    Options +ExecCGI
</Directory>
ProxyPass "/app" "http://127.0.0.1:{app.server_port}"
AliasMatch "^/(?:php|cgi)-always/(.+)$" "{docroot}/$1"
<Location "/static.txt">
    Header set X-Socket-Handoff "{sock}"
    Header set X-Handoff-Data "static data"
</Location>
<LocationMatch "^/(?:always.txt|(?:php|cgi)-always/|refused)">
    Header always set X-Socket-Handoff "{sock}"
</LocationMatch>
<Location "/both.txt">
    Header always set X-Socket-Handoff "{prefix}/elsewhere"
    Header set X-Socket-Handoff "{sock}"
</Location>
<Location "/empty.txt">
    Header set X-Socket-Handoff ""
</Location>
<Location "/json.txt">
    Header set X-Socket-Handoff "{sock}"
    Header set X-Handoff-Data-Source body
</Location>
<LocationMatch "^/refused">
    Require all denied
</LocationMatch>
<LocationMatch "^/missing">
    ErrorDocument 404 /script.php?path={sock}
</LocationMatch>
<LocationMatch "^/missing-cgi">
    ErrorDocument 404 /script.cgi?path={sock}
</LocationMatch>
<LocationMatch "^/missing-static">
    ErrorDocument 404 /static.txt
</LocationMatch>
<LocationMatch "^/missing-cured">
    ErrorDocument 404 /script.php?path={sock}&status=200
</LocationMatch>
<LocationMatch "^/missing-cgi-cured">
    ErrorDocument 404 /script.cgi?path={sock}&status=200
</LocationMatch>
"""
        with Apache(request.param, docroot, prefix, conf, modules=("cgi", "proxy_http")) as apache:
            yield Site(apache, sock)
        app.shutdown()


WAYS = {"/script.php": "php", "/script.cgi": "cgi", "/app/": "app"}


@pytest.mark.parametrize("where", WAYS)
def test_by_a_handler(site: Site, where: str) -> None:
    page = WAYS[where]
    for status in (200, 201, 204):
        assert site.ask(where, path=site.sock, status=status) == f"handed off: {page} data"
    for status in (301, 304, 401, 404, 500, 503):
        said = site.ask(where, path=site.sock, status=status)
        assert said.startswith(str(status))
        assert "data" not in said
    assert site.ask(where, "HEAD", path=site.sock) == "200"


def test_by_header_set(site: Site) -> None:
    assert site.ask("/static.txt") == "handed off: static data"
    assert site.ask("/static.txt", "HEAD") == "200"
    assert site.ask("/static.txt", headers={"If-Modified-Since": "Wed, 01 Jan 2020 00:00:00 GMT"}) == "304"
    assert site.ask("/static.txt", headers={"Range": "bytes=0-2"}) == "handed off: static data"
    assert site.ask("/json.txt") == "handed off: static page"
    assert site.ask("/json.txt", headers={"Range": "bytes=0-2"}) == "handed off: static page"


def test_by_header_always_set(site: Site) -> None:
    assert site.ask("/always.txt") == "handed off: \0"
    assert site.ask("/always.txt", "HEAD") == "200"
    assert site.ask("/php-always/script.php") == "handed off: php data"
    assert site.ask("/php-always/script.php", status=404) == "404 php page"
    assert site.ask("/cgi-always/script.cgi", status=500).startswith("500")
    assert site.ask("/refused.txt").startswith("403")


def test_by_both_the_handlers_counts(site: Site) -> None:
    assert site.ask("/both.txt") == "handed off: \0"


def test_without_a_value_or_with_several(site: Site) -> None:
    assert site.ask("/empty.txt") == "200 static page"
    said = site.ask("/script.php", **{"path[]": [str(site.sock), "/elsewhere"]})
    if site.apache.mpm == "prefork":
        assert said == "handed off: php data"  # the first counts
    else:
        assert said.startswith("503 ")  # mod_proxy_fcgi has made one of them: "PATH, /elsewhere"


def test_by_an_error_document(site: Site) -> None:
    """The error stays what it is, whoever writes its page."""
    assert site.ask("/missing") == "404 php page"
    assert site.ask("/missing-cgi") == "404 cgi page"
    assert site.ask("/missing-static") == "404 static page"
    # Unless the script says that all is well. PHP-FPM has no way to say it: 200 is what it leaves out.
    assert site.ask("/missing-cgi-cured") == "handed off: cgi data"
    cured = "handed off: php data" if site.apache.mpm == "prefork" else "404 php page"
    assert site.ask("/missing-cured") == cured
