"""The one table of error codes: what the client, the metrics and the log say of the same failure.

A code is what a client reads in `{"code": …}` and an operator in `forkd_*{code=…}` and in the access log. Its `metric`
is the reference's closed set of five, which `daemon_*_errors_total{reason}` must keep to. A status is what the client
gets if nothing has been sent to it yet; after that the same code travels in `event: error`.
"""

from enum import StrEnum
from typing import NamedTuple


class Metric(StrEnum):
    """The `reason` label of the reference's error counters; a closed set."""

    CLIENT_DISCONNECTED = "client_disconnected"
    TIMEOUT = "timeout"
    CANCELED = "canceled"
    NETWORK = "network"
    OTHER = "other"


class Reason(NamedTuple):
    """One way to fail. `status` is the HTTP status, 0 where no client can be told; `text` is what the client reads."""

    code: str
    status: int
    metric: Metric
    text: str


_TABLE = (
    # A handoff that cannot become a stream. Without a usable client there is nobody to tell: status 0.
    Reason("no_fd", 0, Metric.OTHER, "The handoff carried no file descriptor"),
    Reason("unsupported_flags", 0, Metric.OTHER, "The handoff needs something that this version does not have"),
    Reason("bad_client_fd", 0, Metric.OTHER, "The file descriptor is no connected stream socket"),
    Reason("sender_timeout", 0, Metric.TIMEOUT, "The sender connected and sent nothing"),
    Reason("sender_evicted", 0, Metric.OTHER, "Too many senders were silent at once"),
    Reason("sender_forbidden", 0, Metric.OTHER, "The sender is not in allow_users or allow_groups"),
    Reason("sender_failed", 0, Metric.NETWORK, "Reading from the sender failed"),
    Reason("out_of_fds", 503, Metric.OTHER, "The server is out of capacity"),
    Reason("bad_handoff", 400, Metric.OTHER, "The handoff data is not valid"),
    Reason("no_prompt", 400, Metric.OTHER, "The handoff data has no prompt"),
    Reason("bad_data_fd", 400, Metric.OTHER, "The handoff's data is not in a sealed memfd"),
    Reason("unknown_backend", 400, Metric.OTHER, "The backend named in the handoff data does not exist"),
    Reason("payload_too_large", 413, Metric.OTHER, "The handoff data is too large"),
    Reason("bad_attachment", 400, Metric.OTHER, "An attachment cannot be used"),
    Reason("attachment_too_large", 413, Metric.OTHER, "An attachment is too large"),
    # No room.
    Reason("no_capacity", 503, Metric.OTHER, "The server is out of capacity"),
    Reason("queue_timeout", 503, Metric.TIMEOUT, "The server is out of capacity"),
    Reason("shutdown", 503, Metric.CANCELED, "The server is shutting down"),
    # The worker.
    Reason("worker_lost", 502, Metric.OTHER, "The stream was interrupted"),
    Reason("poison", 502, Metric.OTHER, "The request could not be processed"),
    Reason("internal_error", 500, Metric.OTHER, "Internal error"),
    # The upstream: it cannot be reached,
    Reason("backend_unavailable", 502, Metric.NETWORK, "Backend unavailable"),
    Reason("backend_unresolved", 502, Metric.NETWORK, "Backend unavailable"),
    Reason("backend_untrusted", 502, Metric.NETWORK, "Backend unavailable"),
    # says nothing in time,
    Reason("backend_timeout", 504, Metric.TIMEOUT, "The backend did not answer in time"),
    Reason("backend_silent", 504, Metric.TIMEOUT, "The backend fell silent"),
    # says no,
    Reason("backend_rejected", 502, Metric.OTHER, "The backend rejected the request"),
    Reason("backend_unauthorized", 502, Metric.OTHER, "The backend refused access"),
    Reason("backend_rate_limited", 429, Metric.OTHER, "Too many requests"),
    Reason("backend_overloaded", 503, Metric.OTHER, "The backend is overloaded"),
    Reason("backend_error", 502, Metric.OTHER, "The backend reported an error"),
    Reason("backend_redirect", 502, Metric.OTHER, "The backend answered with a redirect"),
    Reason("backend_not_a_stream", 502, Metric.OTHER, "The backend did not answer with a stream"),
    # or breaks in the middle.
    Reason("backend_reset", 502, Metric.NETWORK, "The backend broke the connection"),
    Reason("backend_truncated", 502, Metric.NETWORK, "The backend's answer was cut short"),
    Reason("backend_garbled", 502, Metric.NETWORK, "The backend broke the protocol"),
    Reason("backend_head_too_large", 502, Metric.NETWORK, "The backend broke the protocol"),
    Reason("backend_event_too_large", 502, Metric.NETWORK, "The backend broke the protocol"),
    # A handler (provider: python): no thread is free for it, it raised, yielded what cannot be sent, yields nothing.
    Reason("handler_busy", 503, Metric.OTHER, "The server is out of capacity"),
    Reason("handler_error", 502, Metric.OTHER, "The backend reported an error"),
    Reason("handler_bad_yield", 502, Metric.OTHER, "The backend reported an error"),
    Reason("handler_timeout", 504, Metric.TIMEOUT, "The backend fell silent"),
    # The program (`exec`): there are too many, it cannot be started,
    Reason("program_limit", 503, Metric.OTHER, "The server is out of capacity"),
    Reason("program_unavailable", 502, Metric.OTHER, "Backend unavailable"),
    # says nothing, breaks in the middle, or does not come to an end.
    Reason("program_mute", 502, Metric.OTHER, "The backend gave no answer"),
    Reason("program_failed", 502, Metric.OTHER, "The backend's answer was cut short"),
    Reason("program_timeout", 504, Metric.TIMEOUT, "The stream took too long"),
    # The client.
    Reason("client_disconnected", 0, Metric.CLIENT_DISCONNECTED, "The client went away"),
    Reason("write_timeout", 0, Metric.TIMEOUT, "The client stopped reading"),
    Reason("max_duration", 504, Metric.TIMEOUT, "The stream took too long"),
)

REASONS: dict[str, Reason] = {reason.code: reason for reason in _TABLE}
