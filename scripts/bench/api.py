#!/usr/bin/env python3
"""The fake API that relays are measured with: OpenAI's Chat Completions, streaming, on loopback TCP.

Each request gets its response head and the first chunk at once, then a chunk every --delay-ms counted from its own
beginning, then the finish reason and [DONE]. A request for the model "trial" gets all of it at once and is not counted.

Prints "ready PORT" when it listens, and its totals as one line of JSON when it is told to stop (SIGTERM or SIGINT).
Try it:  curl -N http://127.0.0.1:PORT/v1/chat/completions -d '{"model": "trial"}'
"""

import argparse
import ctypes
import gc
import json
import signal
import socket
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path

from api_http1 import http1
from api_http2 import http2
from api_loop import Loop, Totals
from percentiles import percentile
from shape import numbered_words

BACKLOG = 4096
_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop."""
    args = parse(argv)
    words = numbered_words(args.events)
    tls = None
    if args.protocol == "h2-tls":
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(args.cert)
        tls.set_alpn_protocols(["h2"])
    with socket.create_server(("127.0.0.1", args.port), backlog=BACKLOG) as listener:
        listener.setblocking(False)
        protocol = http1(words) if args.protocol == "http1" else http2(words)
        loop = Loop(listener, protocol, tls, args.delay_ms / 1000)

        def stop(*_: object) -> None:
            loop.stopped = True

        ctypes.CDLL(None).prctl(
            _PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0
        )  # nothing is left when the benchmark is killed
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        gc.disable()  # the few cycles that there are may stay: a collection would show as a late chunk
        print("ready", listener.getsockname()[1], flush=True)
        loop.run()
    print(json.dumps(report(loop.totals)), flush=True)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="api.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--protocol", choices=("http1", "h2", "h2-tls"), default="http1", help="h2: by prior knowledge (http1)")
    add("--port", type=int, default=0, help="on 127.0.0.1 (any free one)")
    add("--events", type=int, metavar="N", default=18, help="chunks with content (18)")
    add("--delay-ms", type=float, metavar="MS", default=500, help="between two chunks (500)")
    add("--cert", type=Path, metavar="PEM", help="certificate and key, for h2-tls")
    args = parser.parse_args(argv)
    if args.protocol == "h2-tls" and args.cert is None:
        parser.error("h2-tls needs --cert")
    return args


def report(totals: Totals) -> dict[str, float | None]:
    """The totals, with percentiles in milliseconds."""

    def ms(values: Sequence[float], percent: float) -> float | None:
        value = percentile(values, percent)
        return None if value is None else value * 1000

    return {
        "streams": totals.streams,
        "whole": totals.whole,
        "chunks": totals.chunks,
        "connections": totals.connections,
        "connections_peak": totals.connections_peak,
        "late_p50_ms": ms(totals.late, 50),
        "late_p99_ms": ms(totals.late, 99),
        "first_p50_ms": ms(totals.first, 50),
        "first_p99_ms": ms(totals.first, 99),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
