"""The site that the Apache tests are run against: its script, its pages, its configuration."""

from pathlib import Path
from typing import NamedTuple

from harness import Apache

# What one request asks of the script, so that a test reads as one line.
HANDOFF_PHP = r"""<?php
// status, h[] (more headers), path, data or size (generated), source, early (print before), late (print after)
if (isset($_GET['status'])) http_response_code((int)$_GET['status']);
foreach ((array)($_GET['h'] ?? []) as $line) header($line, false);
if (isset($_GET['path'])) header('X-Socket-Handoff: ' . $_GET['path']);
$data = $_GET['data'] ?? null;
if (isset($_GET['size'])) {
    $data = '';
    for ($i = 0; strlen($data) < $_GET['size']; $i++) $data .= sprintf('%08x', $i);
    $data = substr($data, 0, (int)$_GET['size']);
}
if (isset($_GET['source'])) header('X-Handoff-Data-Source: ' . $_GET['source']);
if (($_GET['source'] ?? '') === 'body') { echo $data; exit; }
if ($data !== null) header('X-Handoff-Data: ' . $data);
if (isset($_GET['early'])) { echo 'printed early'; while (ob_get_level()) ob_end_flush(); flush(); }
if (isset($_GET['late'])) {
    ignore_user_abort(true);
    for ($i = 0; $i < 100; $i++) {
        echo str_repeat('printed late ', 1000);
        while (ob_get_level()) ob_end_flush();
        flush();
    }
}
if (isset($_GET['print'])) echo $_GET['print'];
"""


def generated(size: int) -> bytes:
    """What the script makes of `size`: no part of it looks like another."""
    return "".join(f"{i:08x}" for i in range(size // 8 + 1)).encode()[:size]


class Site(NamedTuple):
    """A running server, and the directory that the daemon's sockets must be in."""

    apache: Apache
    prefix: Path
    docroot: Path

    @property
    def sock(self) -> Path:
        return self.prefix / "s"


def make_docroot(docroot: Path) -> None:
    (docroot / "handoff.php").write_text(HANDOFF_PHP)
    (docroot / "plain.html").write_text("plain page\n")
    (docroot / "static.html").write_text("static page\n")
    (docroot / "json.html").write_text('{"prompt":"static body"}')
    (docroot / "front").mkdir()
    (docroot / "front" / ".htaccess").write_text("RewriteEngine On\nRewriteRule ^chat$ /env/handoff.php [QSA,L]\n")
    script = docroot / "redirect.cgi"
    script.write_text('#!/bin/sh\nprintf "X-Socket-Handoff: %s\\nLocation: /plain.html\\n\\n" "$QUERY_STRING"\n')
    script.chmod(0o755)
    (docroot / "bad").mkdir()
    (docroot / "bad" / ".htaccess").write_text("SocketHandoffEnabled On\n")
    (docroot / "bad" / "index.html").write_text("never seen")


def site_conf(prefix: Path) -> str:
    """Variants of one site by the first part of the path; DEFLATE everywhere, as many sites have it."""
    return f"""
SetOutputFilter DEFLATE
RemoteIPHeader X-Forwarded-For
RemoteIPInternalProxy 127.0.0.1
<Directory />
    AllowOverride All
    Options +FollowSymLinks +Includes +ExecCGI
</Directory>
AddHandler cgi-script .cgi
AddOutputFilter INCLUDES .shtml
SocketHandoffConnectTimeoutMs 10000
AliasMatch "^/(?:raw|env|some|none|off|small|fast|patient|unread|cors|denied)/(.+)$" "${{DOCROOT}}/$1"
<LocationMatch "^/(?:env|cors|front|some|none)/">
    SocketHandoffFormat envelope
</LocationMatch>
<Location /some>
    SocketHandoffResponseHeaders Set-Cookie
    SocketHandoffRequestHeaders X-Wanted
</Location>
<Location /none>
    SocketHandoffResponseHeaders none
    SocketHandoffRequestHeaders none
</Location>
<Location /off>
    SocketHandoffEnabled Off
</Location>
<Location /small>
    SocketHandoffMaxData 1000
</Location>
<Location /fast>
    SocketHandoffConnectTimeoutMs 20
    SocketHandoffSendTimeoutMs 20
    SocketHandoffMaxRetries 0
</Location>
<Location /patient>
    SocketHandoffMaxRetries 10
</Location>
<IfModule php_module>
    <Location /unread>
        php_flag enable_post_data_reading off
    </Location>
</IfModule>
<Location /cors>
    Header set Access-Control-Allow-Origin "https://app.example"
    Header always set X-Always "yes"
</Location>
<Location /static.html>
    Header set X-Socket-Handoff "{prefix}/s"
    Header set X-Handoff-Data "static data"
</Location>
<Location /json.html>
    SetEnv no-gzip
    Header set X-Socket-Handoff "{prefix}/s"
    Header set X-Handoff-Data-Source body
</Location>
<Location /plain.html>
    Header set X-Handoff-Data "stray"
</Location>
<LocationMatch "^/(?:always|denied|missing)">
    Header always set X-Socket-Handoff "{prefix}/s"
    Header always set X-Handoff-Data "always data"
</LocationMatch>
Alias /always.html "${{DOCROOT}}/plain.html"
<Location /denied>
    Require all denied
</Location>
<Location /health>
    SetHandler socket-handoff-health
    SocketHandoffHealthSocket {prefix}/s
</Location>
<Location /health-outside>
    SetHandler socket-handoff-health
    SocketHandoffHealthSocket {prefix}-elsewhere/s
</Location>
"""
