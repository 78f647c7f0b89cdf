"""The fake LLM API: a real server on real sockets, that can be told to misbehave.

    with FakeApi(tls="good") as api:
        ... api_base: api.base, ca_file: api.ca_file ...
        api.script = ["503", "gate-tokens words=3"]
        seen = api.wait_for(lambda api: api.requests[1:], "the second request")[0]
        api.gate.let(2)
        client.close()
        api.wait_for(lambda api: seen.cancelled_at, "the request's cancellation")

It speaks the APIs of OpenAI, Anthropic and LangGraph (dialects.py), over HTTP/1.1 and HTTP/2, TLS, TCP and Unix
sockets.
What it can do is told in patterns/, what it remembers in records.py.
"""

from tests.fake_api.certificates import Certificates
from tests.fake_api.dialects import INPUT_TOKENS, text, words
from tests.fake_api.records import Connection, Seen
from tests.fake_api.server import FakeApi

__all__ = ["INPUT_TOKENS", "Certificates", "Connection", "FakeApi", "Seen", "text", "words"]
