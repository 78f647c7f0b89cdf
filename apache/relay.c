/*
 * The relay: for clients that cannot be handed off (SocketHandoffFallback relay).
 *
 * A connection under TLS has its keys in this process, and an HTTP/2 stream has no socket. The daemon gets one end of a
 * pair of sockets in the client's place and answers on it as it would to any client; what it says comes out of our end,
 * and goes to the client through Apache's protocol filters, each piece flushed at once. The worker is held meanwhile, as
 * it would be without a handoff.
 *
 * Two sides may vanish.
 *
 *   The client: over HTTP/1.1 its socket is polled beside ours, for the end of what it sends, and a half-close counts, as
 *   it does with forkd. It is never read: what a client pipelines waits. An HTTP/2 stream has nothing to poll; mod_http2
 *   marks its connection as aborted, from another thread, so that is looked at now and then. Then our end is closed,
 *   which to the daemon is a client that has gone.
 *
 *   The daemon: before the head is whole, the client gets an error of ours. Afterwards the answer must not look whole:
 *   an error bucket makes the HTTP/1.1 filters leave out the last chunk and close the connection. HTTP/2 resets a stream
 *   whose connection is aborted.
 *
 * Where the answer ends: after Content-Length bytes if it has one, else at the end of file. An end of file by itself says
 * nothing about whether the daemon had come to its end or was killed. So a daemon that was told that it is relayed (the
 * envelope's flag; forkd) ends its answer by shutdown(SHUT_WR), and keeps the socket open until we close ours. If the
 * socket is already closed (POLLHUP), then nobody has said that this was the end. From a daemon that was told nothing
 * (format raw) every end of file is taken for the end.
 */

#include "handoff.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "http_connection.h"
#include "http_core.h"
#include "http_protocol.h"
#include "http_request.h"
#include "apr_atomic.h"
#include "apr_buckets.h"
#include "apr_portable.h"
#include "apr_shm.h"

#define HEAD_MAX 65536
#define PIECE_BYTES 16384
#define LOOK_AGAIN_MS 100
#define LOOK_AT_LEAST_MS 60000
#define WARN_SECS 60

static const handoff_failure internal_error = {HTTP_INTERNAL_SERVER_ERROR, "internal_error", "Internal error"};
static const handoff_failure daemon_lost = {HTTP_BAD_GATEWAY, "daemon_lost",
                                            "The streaming service broke off"};
static const handoff_failure bad_answer = {HTTP_BAD_GATEWAY, "bad_answer",
                                           "The streaming service gave an unusable answer"};
static const handoff_failure daemon_timeout = {HTTP_GATEWAY_TIME_OUT, "daemon_timeout",
                                               "The streaming service did not answer in time"};
static const handoff_failure client_gone = {0, "client_gone", ""};

typedef struct {
    request_rec *r;
    ap_filter_t *next;
    int daemon;                 /* our end of the pair */
    int client;                 /* its socket, to be polled and nothing else; -1: an HTTP/2 stream */
    int end_is_said;            /* the daemon knows that it is relayed */
    apr_interval_time_t patience;
    apr_bucket_brigade *bb;
    handoff_answer answer;
    apr_int64_t left;           /* of the body; -1: not known */
} relay;

/* When somebody was last warned, in seconds since the epoch; in memory that all children share. */
static apr_uint32_t *warned_at;

void handoff_relay_init(apr_pool_t *pconf)
{
    apr_shm_t *shared;

    warned_at = NULL;
    if (apr_shm_create(&shared, sizeof(*warned_at), NULL, pconf) != APR_SUCCESS)
        return;
    warned_at = apr_shm_baseaddr_get(shared);
    apr_atomic_set32(warned_at, 0);
}

static void warn(request_rec *r)
{
    apr_uint32_t now = (apr_uint32_t)apr_time_sec(apr_time_now()), then;

    if (!warned_at)
        return;
    then = apr_atomic_read32(warned_at);
    if ((then && now - then < WARN_SECS) || apr_atomic_cas32(warned_at, now, then) != then)
        return;
    ap_log_rerror(APLOG_MARK, APLOG_WARNING, 0, r, "socket_handoff: a client cannot be handed off (%s), so its answer is "
                  "relayed, and holds an Apache worker until its end; said at most once a minute",
                  r->connection->master ? "HTTP/2" : "TLS");
}

/* ---- waiting, reading, writing ---- */

static int is_aborted(const relay *x)
{
    return x->r->connection->aborted;
}

/* 0: the daemon has said something, or ended. ECONNABORTED: the client has gone. ETIMEDOUT. */
static int wait_for_daemon(const relay *x, apr_time_t deadline)
{
    struct pollfd fds[2] = {{.fd = x->daemon, .events = POLLIN}, {.fd = x->client, .events = POLLRDHUP}};

    for (;;) {
        apr_interval_time_t left = deadline - apr_time_now(), most;
        int n;

        most = apr_time_from_msec(x->client < 0 ? LOOK_AGAIN_MS : LOOK_AT_LEAST_MS);
        n = poll(fds, 2, left > 0 ? (int)apr_time_as_msec(left < most ? left : most) + 1 : 0);
        if (n < 0 && errno != EINTR)
            return errno;
        if (is_aborted(x) || (n > 0 && fds[1].revents))
            return ECONNABORTED;
        if (n > 0)
            return 0;
        if (left <= 0)
            return ETIMEDOUT;
    }
}

/* *got is the number of bytes, 0 at the end of file. Else an errno: see wait_for_daemon(). */
static int read_daemon(const relay *x, apr_time_t deadline, char *bytes, apr_size_t room, apr_size_t *got)
{
    for (;;) {
        int err = wait_for_daemon(x, deadline);
        ssize_t n;

        if (err)
            return err;
        n = recv(x->daemon, bytes, room, MSG_DONTWAIT);
        if (n >= 0) {
            *got = (apr_size_t)n;
            return 0;
        }
        if (errno != EAGAIN && errno != EINTR)
            return errno;
    }
}

/* Nobody has said that this end of file is the answer's end. */
static int is_cut(const relay *x)
{
    struct pollfd pfd = {.fd = x->daemon, .events = POLLIN};

    if (x->left >= 0)
        return x->left > 0;
    return x->end_is_said && (poll(&pfd, 1, 0) < 0 || pfd.revents & POLLHUP);
}

/* Passes the brigade on, at once. ECONNABORTED if the client is no more. */
static int flush(relay *x)
{
    apr_status_t rv;

    APR_BRIGADE_INSERT_TAIL(x->bb, apr_bucket_flush_create(x->r->connection->bucket_alloc));
    rv = ap_pass_brigade(x->next, x->bb);
    apr_brigade_cleanup(x->bb);
    return rv != APR_SUCCESS || is_aborted(x) ? ECONNABORTED : 0;
}

/* A piece of the body, as much of it as belongs there. */
static int pass_body(relay *x, const char *bytes, apr_size_t len)
{
    if (x->left >= 0 && (apr_int64_t)len > x->left)
        len = (apr_size_t)x->left;
    if (x->left >= 0)
        x->left -= (apr_int64_t)len;
    if (len)
        APR_BRIGADE_INSERT_TAIL(x->bb, apr_bucket_transient_create(bytes, len, x->r->connection->bucket_alloc));
    return flush(x);
}

/* ---- the head ---- */

/* The answer takes the place of the response that was to be, all of it: what it had to say went into the envelope. */
static void start_response(relay *x)
{
    request_rec *r = x->r;

    r->headers_out = x->answer.headers;
    apr_table_clear(r->err_headers_out);
    r->content_encoding = NULL;
    r->content_languages = NULL;
    r->clength = 0;
    r->status = x->answer.status;
    r->status_line = NULL;
    ap_set_content_type(r, x->answer.type);
    if (x->answer.length >= 0)
        ap_set_content_length(r, x->answer.length);
    x->left = AP_STATUS_IS_HEADER_ONLY(r->status) ? 0 : x->answer.length;
}

static const handoff_failure *explain(const relay *x, int err)
{
    if (err == ECONNABORTED)
        return &client_gone;
    ap_log_rerror(APLOG_MARK, APLOG_ERR, err == ETIMEDOUT ? 0 : err, x->r, "socket_handoff: the daemon %s before the "
                  "head of its answer was whole", err == ETIMEDOUT ? "fell silent" : "ended");
    return err == ETIMEDOUT ? &daemon_timeout : &daemon_lost;
}

/*
 * Reads up to the end of the head and takes it apart. *rest and *len are the bytes of the body that came with it. The
 * whole head has as much time as any later silence, so that it cannot come in drips for ever.
 */
static const handoff_failure *read_head(relay *x, char **rest, apr_size_t *len)
{
    apr_time_t deadline = apr_time_now() + x->patience;
    char *head = apr_palloc(x->r->pool, HEAD_MAX);
    apr_size_t filled = 0, got, length = 0;
    const char *fault;
    int err;

    while (!length) {
        if (filled == HEAD_MAX)
            break;
        err = read_daemon(x, deadline, head + filled, HEAD_MAX - filled, &got);
        if (err || !got)
            return explain(x, err);
        length = handoff_head_length(head, filled + got, filled);
        filled += got;
    }
    fault = length ? handoff_answer_parse(x->r->pool, head, length, &x->answer) : "no end of the head";
    if (fault) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, x->r, "socket_handoff: the daemon's answer has %s", fault);
        return &bad_answer;
    }
    *rest = head + length;
    *len = filled - length;
    return NULL;
}

/* ---- the body ---- */

/* The client is to notice that something is missing. */
static void end_cut(relay *x)
{
    conn_rec *c = x->r->connection;

    ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, x->r, "socket_handoff: the daemon broke off in the middle of its answer");
    APR_BRIGADE_INSERT_TAIL(x->bb, ap_bucket_error_create(HTTP_BAD_GATEWAY, NULL, x->r->pool, c->bucket_alloc));
    APR_BRIGADE_INSERT_TAIL(x->bb, apr_bucket_eos_create(c->bucket_alloc));
    ap_pass_brigade(x->next, x->bb);
    c->keepalive = AP_CONN_CLOSE;
}

static void end_whole(relay *x)
{
    APR_BRIGADE_INSERT_TAIL(x->bb, apr_bucket_eos_create(x->r->connection->bucket_alloc));
    ap_pass_brigade(x->next, x->bb);
}

/* What comes after the head, to the end. Returns what became of it. */
static const char *pump(relay *x, const char *rest, apr_size_t len)
{
    char piece[PIECE_BYTES];
    int err = pass_body(x, rest, len);

    while (!err && x->left) {
        err = read_daemon(x, apr_time_now() + x->patience, piece, sizeof(piece), &len);
        if (!err && !len)
            break;
        if (!err)
            err = pass_body(x, piece, len);
    }
    if (err == ECONNABORTED) {
        x->r->connection->aborted = 1;
        return "relayed_client_gone";
    }
    if (err || is_cut(x)) {
        end_cut(x);
        return "relayed_cut";
    }
    end_whole(x);
    return "relayed";
}

/* ---- the whole ---- */

/* The socket to poll for the client's going. */
static int client_socket(conn_rec *c)
{
    apr_os_sock_t fd;

    return !c->master && apr_os_sock_get(&fd, ap_get_conn_socket(c)) == APR_SUCCESS ? fd : -1;
}

const handoff_failure *handoff_relay(request_rec *r, const handoff_conf *conf, const char *path,
                                     const handoff_message *msg, ap_filter_t *next, const char **outcome)
{
    relay x = {.r = r, .next = next, .client = client_socket(r->connection)};
    const handoff_failure *failure;
    apr_size_t len = 0;
    char *rest = NULL;
    int pair[2];

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, errno, r, "socket_handoff: cannot make a pair of sockets");
        return &internal_error;
    }
    x.daemon = pair[0];
    x.end_is_said = conf->format == FORMAT_ENVELOPE;
    x.patience = r->server->timeout;
    x.bb = apr_brigade_create(r->pool, r->connection->bucket_alloc);
    failure = handoff_deliver(r, conf, path, pair[1], msg);
    close(pair[1]);
    if (!failure) {
        warn(r);
        failure = read_head(&x, &rest, &len);
    }
    if (!failure) {
        start_response(&x);
        *outcome = pump(&x, rest, len);
    }
    close(pair[0]);
    return failure;
}
