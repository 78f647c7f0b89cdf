/*
 * mod_socket_handoff: gives the client's connection to a daemon that streams the answer.
 *
 * A handler (PHP, mostly) authenticates the request, sets X-Socket-Handoff to the path of a Unix socket, and is done.
 * This module sends the client's file descriptor and the handler's data over that socket; the daemon answers the client,
 * and the Apache worker is free for the next request.
 *
 * Theory of operation
 *
 * Two output filters and one context per request.
 *
 *   handler -> CAPTURE -> content filters (deflate, substitute, headers ...) -> HANDOFF -> protocol -> connection
 *
 * CAPTURE stands before every other filter, because `X-Handoff-Data-Source: body` makes the handler's body the data, and
 * data must not be compressed or rewritten. It keeps such a body and lets only its end pass.
 *
 * HANDOFF stands behind mod_headers, so that `Header set` counts (CORS headers, or X-Socket-Handoff itself for a static
 * handoff), and before the protocol filters, so that nothing of a response has been written yet. On the first brigade it
 * takes our headers out of both header tables, whatever happens next, and decides:
 *
 *   pass     no handoff asked for, or none possible in kind (switched off, a subrequest, HEAD, a status that is not
 *            2xx): the response goes on as it is, less our headers. A body that is handoff data is never sent.
 *   refuse   asked for and not possible: a JSON error takes the response's place. Nothing has reached the daemon.
 *   hand off the daemon owns the client. Everything that still comes from the handler is swallowed.
 *
 * The handoff itself, in an order that matters:
 *
 *   1. Read the rest of the request body, or its bytes would wait in the socket for the daemon.
 *   2. Flush the connection: earlier keep-alive responses may still be in Apache's buffers. By a FLUSH bucket and not
 *      ap_flush_conn(), whose EOC bucket announces the end of the connection.
 *   3. Make the dummy socket, so that nothing can fail between the handoff and the swap.
 *   4. sendmsg(). If it succeeds the handoff is final.
 *   5. dup3() the dummy over the client's descriptor. That one number is what every holder inside Apache has (the
 *      apr_socket_t, the core filters, the MPM): all of them now hold the dummy, whose peer is closed. Reads see EOF,
 *      writes EPIPE; never shutdown(), which would act on the connection that is no longer ours.
 *   6. c->aborted, keep-alive closed: the MPM ends the connection as it does when a client has gone.
 *
 * A connection under TLS is never handed off (the daemon would write plain text into it), nor is an HTTP/2 stream (it
 * has no socket of its own). They are refused, or relayed: relay.c.
 */

#include "handoff.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "http_connection.h"
#include "http_core.h"
#include "http_protocol.h"
#include "http_request.h"
#include "http_ssl.h"
#include "util_filter.h"
#include "apr_buckets.h"
#include "apr_lib.h"
#include "apr_portable.h"
#include "apr_strings.h"

#define HDR_PATH "X-Socket-Handoff"
#define HDR_DATA "X-Handoff-Data"
#define HDR_SOURCE "X-Handoff-Data-Source"
#define NOTE "socket_handoff"

/* A request body that the handler left unread is read and dropped up to here. */
#define UNREAD_BODY_MAX (1024 * 1024)

static const handoff_failure tls_unsupported = {HTTP_INTERNAL_SERVER_ERROR, "tls_unsupported",
                                                "A connection under TLS cannot be handed off"};
static const handoff_failure http2_unsupported = {HTTP_INTERNAL_SERVER_ERROR, "http2_unsupported",
                                                  "An HTTP/2 stream cannot be handed off"};
static const handoff_failure bad_data_source = {HTTP_INTERNAL_SERVER_ERROR, "bad_data_source",
                                                "The handoff data source cannot be used"};
static const handoff_failure incomplete_data = {HTTP_INTERNAL_SERVER_ERROR, "incomplete_data",
                                                "The handoff data is incomplete"};
static const handoff_failure too_large = {HTTP_REQUEST_ENTITY_TOO_LARGE, "payload_too_large",
                                          "The handoff data is too large"};
static const handoff_failure unread_body = {HTTP_REQUEST_ENTITY_TOO_LARGE, "unread_body",
                                            "The request body was not read"};
static const handoff_failure internal_error = {HTTP_INTERNAL_SERVER_ERROR, "internal_error", "Internal error"};
static const handoff_failure client_gone = {0, "client_gone", ""};

static ap_filter_rec_t *capture_handle;
static ap_filter_rec_t *handoff_handle;

typedef struct {
    const handoff_conf *conf;
    enum { UNDECIDED, COLLECTING, PASSING, OVER } state;
    int body_is_data;   /* X-Handoff-Data-Source: body */
    int body_complete;  /* its end was seen */
    int body_failed;    /* the handler broke off */
    int body_too_large;
    apr_bucket_brigade *body;
    apr_off_t body_length;
    const char *path;
    const char *data;
    const char *source;
    const char *outcome; /* for the access log */
} handoff_ctx;

static handoff_ctx *get_ctx(request_rec *r)
{
    handoff_ctx *ctx = ap_get_module_config(r->request_config, &socket_handoff_module);

    if (!ctx) {
        ctx = apr_pcalloc(r->pool, sizeof(*ctx));
        ctx->conf = handoff_conf_get(r);
        ap_set_module_config(r->request_config, &socket_handoff_module, ctx);
    }
    return ctx;
}

/* ---- the handler's headers and body ---- */

static const char *get_header(request_rec *r, const char *name)
{
    const char *value = apr_table_get(r->headers_out, name);

    if (!value || !*value)
        value = apr_table_get(r->err_headers_out, name);
    return value && *value ? value : NULL;
}

static void strip_headers(request_rec *r)
{
    static const char *const ours[] = {HDR_PATH, HDR_DATA, HDR_SOURCE};
    apr_size_t i;

    for (i = 0; i < sizeof(ours) / sizeof(ours[0]); i++) {
        apr_table_unset(r->headers_out, ours[i]);
        apr_table_unset(r->err_headers_out, ours[i]);
    }
}

static int source_is_body(const char *source)
{
    return source && !ap_cstr_casecmp(source, "body");
}

/*
 * Moves what the handler wrote into ctx->body, up to the limit. An error bucket is how a handler says that it broke
 * off (a PHP-FPM that died, say): half the data is no data.
 */
static apr_status_t collect(request_rec *r, handoff_ctx *ctx, apr_bucket_brigade *bb)
{
    apr_bucket *b;

    if (!ctx->body)
        ctx->body = apr_brigade_create(r->pool, r->connection->bucket_alloc);
    while (!APR_BRIGADE_EMPTY(bb) && !ctx->body_complete) {
        const char *bytes;
        apr_size_t len;
        apr_status_t rv;

        b = APR_BRIGADE_FIRST(bb);
        if (APR_BUCKET_IS_METADATA(b)) {
            ctx->body_failed |= AP_BUCKET_IS_ERROR(b);
            ctx->body_complete |= APR_BUCKET_IS_EOS(b) || AP_BUCKET_IS_ERROR(b);
            apr_bucket_delete(b);
            continue;
        }
        rv = apr_bucket_read(b, &bytes, &len, APR_BLOCK_READ);
        if (rv == APR_SUCCESS)
            rv = apr_bucket_setaside(b, r->pool);
        if (rv != APR_SUCCESS && rv != APR_ENOTIMPL)
            return rv;
        APR_BUCKET_REMOVE(b);
        APR_BRIGADE_INSERT_TAIL(ctx->body, b);
        ctx->body_length += (apr_off_t)len;
        if (ctx->body_length > ctx->conf->max_data)
            ctx->body_too_large = ctx->body_complete = 1;
    }
    apr_brigade_cleanup(bb);
    return APR_SUCCESS;
}

static void append_eos(request_rec *r, apr_bucket_brigade *bb)
{
    APR_BRIGADE_INSERT_TAIL(bb, apr_bucket_eos_create(r->connection->bucket_alloc));
}

static apr_status_t capture_filter(ap_filter_t *f, apr_bucket_brigade *bb)
{
    request_rec *r = f->r;
    handoff_ctx *ctx = get_ctx(r);
    apr_status_t rv;

    if (APR_BRIGADE_EMPTY(bb))
        return APR_SUCCESS;
    if (ctx->body_complete) {
        apr_brigade_cleanup(bb);
        return APR_SUCCESS;
    }
    if (!ctx->body) {
        if (!source_is_body(get_header(r, HDR_SOURCE))) {
            if (get_header(r, HDR_PATH))
                r->no_cache = 1; /* mod_cache must not keep what the client never sees */
            ap_remove_output_filter(f);
            return ap_pass_brigade(f->next, bb);
        }
        r->no_cache = 1;
        ctx->body_is_data = 1;
    }
    rv = collect(r, ctx, bb);
    if (rv != APR_SUCCESS || !ctx->body_complete)
        return rv;
    append_eos(r, bb);
    return ap_pass_brigade(f->next, bb);
}

/* ---- answering the client ourselves ---- */

/* The response that was to be is replaced; Set-Cookie and CORS headers stay, so that the page may read the error. */
static void drop_response(request_rec *r)
{
    static const char *const about_the_body[] = {
        "Accept-Ranges", "Cache-Control", "Content-Encoding", "Content-Language", "Content-Length", "Content-MD5",
        "Content-Range", "Content-Type", "ETag", "Expires", "Last-Modified", "Retry-After", "Transfer-Encoding"};
    apr_size_t i;

    for (i = 0; i < sizeof(about_the_body) / sizeof(about_the_body[0]); i++) {
        apr_table_unset(r->headers_out, about_the_body[i]);
        apr_table_unset(r->err_headers_out, about_the_body[i]);
    }
    r->content_encoding = NULL;
    r->content_languages = NULL;
}

static apr_status_t send_json(request_rec *r, ap_filter_t *next, int status, const char *json)
{
    apr_bucket_alloc_t *alloc = r->connection->bucket_alloc;
    apr_bucket_brigade *bb = apr_brigade_create(r->pool, alloc);
    apr_size_t len = strlen(json);

    drop_response(r);
    r->status = status;
    r->status_line = NULL;
    ap_set_content_type(r, "application/json");
    ap_set_content_length(r, (apr_off_t)len);
    apr_table_setn(r->headers_out, "Cache-Control", "no-store");
    if (status == HTTP_SERVICE_UNAVAILABLE)
        apr_table_setn(r->headers_out, "Retry-After", "1");
    APR_BRIGADE_INSERT_TAIL(bb, apr_bucket_pool_create(json, len, r->pool, alloc));
    append_eos(r, bb);
    return ap_pass_brigade(next, bb);
}

static const char *failure_json(request_rec *r, const handoff_failure *failure)
{
    return apr_psprintf(r->pool, "{\"error\":\"%s\",\"code\":\"%s\"}\n", failure->text, failure->code);
}

/* ---- the handoff ---- */

/* The rest of the request body, read and dropped: left in the socket, it would be the daemon's to stumble over. */
static const handoff_failure *drain_request_body(request_rec *r)
{
    apr_bucket_brigade *bb = apr_brigade_create(r->pool, r->connection->bucket_alloc);
    apr_off_t total = 0, len;
    int at_end = 0;

    while (!at_end) {
        apr_status_t rv = ap_get_brigade(r->input_filters, bb, AP_MODE_READBYTES, APR_BLOCK_READ, HUGE_STRING_LEN);

        if (rv != APR_SUCCESS || APR_BRIGADE_EMPTY(bb))
            return r->connection->aborted ? &client_gone : &unread_body;
        at_end = APR_BUCKET_IS_EOS(APR_BRIGADE_LAST(bb));
        if (apr_brigade_length(bb, 1, &len) != APR_SUCCESS)
            return &unread_body;
        apr_brigade_cleanup(bb);
        total += len;
        if (total > UNREAD_BODY_MAX)
            return &unread_body;
    }
    return NULL;
}

static const handoff_failure *flush_connection(conn_rec *c)
{
    apr_bucket_brigade *bb = apr_brigade_create(c->pool, c->bucket_alloc);
    apr_status_t rv;

    APR_BRIGADE_INSERT_TAIL(bb, apr_bucket_flush_create(c->bucket_alloc));
    rv = ap_pass_brigade(c->output_filters, bb);
    apr_brigade_destroy(bb);
    return rv != APR_SUCCESS || c->aborted || c->data_in_output_filters ? &client_gone : NULL;
}

/* A socket whose peer is closed; -1 and errno on failure. */
static int dummy_socket(void)
{
    int pair[2];

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0)
        return -1;
    close(pair[1]);
    return pair[0];
}

/* From here on Apache must not touch the client: it is the daemon's. */
static void let_go(request_rec *r, int client_fd, int dummy)
{
    conn_rec *c = r->connection;
    int rc;

    do {
        rc = dup3(dummy, client_fd, O_CLOEXEC);
    } while (rc < 0 && (errno == EINTR || errno == EBUSY));
    if (rc < 0)
        ap_log_rerror(APLOG_MARK, APLOG_CRIT, errno, r, "socket_handoff: cannot let go of the client's socket");
    c->aborted = 1;
    c->keepalive = AP_CONN_CLOSE;
}

static const handoff_failure *send_client(request_rec *r, const handoff_conf *conf, const char *path,
                                          const handoff_message *msg)
{
    const handoff_failure *failure;
    apr_os_sock_t client_fd;
    int dummy;

    failure = drain_request_body(r);
    if (!failure)
        failure = flush_connection(r->connection);
    if (failure)
        return failure;
    if (apr_os_sock_get(&client_fd, ap_get_conn_socket(r->connection)) != APR_SUCCESS)
        return &internal_error;
    dummy = dummy_socket();
    if (dummy < 0) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, errno, r, "socket_handoff: cannot make a dummy socket");
        return &internal_error;
    }
    failure = handoff_deliver(r, conf, path, client_fd, msg);
    if (!failure)
        let_go(r, client_fd, dummy);
    close(dummy);
    return failure;
}

/* The data from where the handler put it; it lives as long as the request. */
static const handoff_failure *get_data(request_rec *r, handoff_ctx *ctx, const char **data, apr_size_t *len)
{
    char *bytes;

    if (ctx->source && !ctx->body_is_data && ap_cstr_casecmp(ctx->source, "header"))
        return &bad_data_source;
    if (ctx->body_failed)
        return &incomplete_data;
    /* PHP's zlib.output_compression, or a static source that DEFLATE came before: the daemon could not read it. */
    if (ctx->body_is_data && (r->content_encoding || get_header(r, "Content-Encoding")))
        return &bad_data_source;
    *data = ctx->data ? ctx->data : "";
    *len = strlen(*data);
    if (ctx->body_too_large || (apr_int64_t)*len > ctx->conf->max_data)
        return &too_large;
    if (!ctx->body_is_data)
        return NULL;
    if (apr_brigade_pflatten(ctx->body, &bytes, len, r->pool) != APR_SUCCESS)
        return &incomplete_data;
    *data = *len ? bytes : "";
    apr_brigade_cleanup(ctx->body);
    return NULL;
}

/* Why this client cannot be handed off; NULL: it can. */
static const handoff_failure *obstacle(conn_rec *c)
{
    if (c->master)
        return &http2_unsupported;
    return ap_ssl_conn_is_ssl(c) ? &tls_unsupported : NULL;
}

static const handoff_failure *relay_client(request_rec *r, handoff_ctx *ctx, const handoff_message *msg,
                                           ap_filter_t *next)
{
    const handoff_failure *failure = drain_request_body(r);

    return failure ? failure : handoff_relay(r, ctx->conf, ctx->path, msg, next, &ctx->outcome);
}

static const handoff_failure *hand_off(request_rec *r, handoff_ctx *ctx, ap_filter_t *next)
{
    const handoff_failure *failure, *why_not = obstacle(r->connection);
    handoff_message msg;
    const char *data;
    apr_size_t len;

    if (why_not && ctx->conf->fallback == FALLBACK_ERROR)
        return why_not;
    failure = get_data(r, ctx, &data, &len);
    if (!failure)
        failure = handoff_message_build(r, ctx->conf, data, len, why_not != NULL, &msg);
    if (failure)
        return failure;
    ctx->outcome = "handed-off";
    failure = why_not ? relay_client(r, ctx, &msg, next) : send_client(r, ctx->conf, ctx->path, &msg);
    handoff_message_close(&msg);
    return failure;
}

/* Hands off or refuses. Either way the handler's own response is over. */
static apr_status_t conclude(ap_filter_t *f, handoff_ctx *ctx)
{
    request_rec *r = f->r;
    const handoff_failure *failure = hand_off(r, ctx, f->next);

    ctx->state = OVER;
    apr_table_setn(r->notes, NOTE, failure ? failure->code : ctx->outcome);
    if (!failure)
        return APR_SUCCESS;
    if (!failure->status) {
        r->connection->aborted = 1;
        return APR_ECONNABORTED;
    }
    ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "socket_handoff: refused with %d %s", failure->status, failure->code);
    return send_json(r, f->next, failure->status, failure_json(r, failure));
}

/* Why the response is to go on as it is although X-Socket-Handoff was set; NULL if nothing speaks against a handoff. */
static const char *exemption(request_rec *r, const handoff_conf *conf)
{
    if (r->main)
        return "subrequest";
    if (!conf->enabled)
        return "disabled";
    /* The daemon would write a body, and a paid answer, to someone who asked for headers. */
    if (r->header_only)
        return "head";
    /* `Header always set` adds to 401s and redirects too; what was refused must not reach the daemon. */
    if (!ap_is_HTTP_SUCCESS(r->status))
        return "status";
    return NULL;
}

/* On the first brigade: takes our headers away and says what this response is to be. */
static void decide(request_rec *r, handoff_ctx *ctx)
{
    const char *exempt;

    ctx->path = get_header(r, HDR_PATH);
    ctx->data = get_header(r, HDR_DATA);
    ctx->source = get_header(r, HDR_SOURCE);
    ctx->body_is_data = ctx->body_is_data || source_is_body(ctx->source);
    strip_headers(r);
    exempt = exemption(r, ctx->conf);
    ctx->state = ctx->path && !exempt ? COLLECTING : PASSING;
    if (ctx->path && exempt)
        apr_table_setn(r->notes, NOTE, exempt);
    else if (ctx->body_is_data && !ctx->path)
        ap_log_rerror(APLOG_MARK, APLOG_WARNING, 0, r, "socket_handoff: " HDR_SOURCE ": body without " HDR_PATH);
}

/* The response goes on; a body that is data does not. */
static apr_status_t pass(ap_filter_t *f, handoff_ctx *ctx, apr_bucket_brigade *bb)
{
    apr_bucket *b, *next;

    if (!ctx->body_is_data) {
        ap_remove_output_filter(f);
        return ap_pass_brigade(f->next, bb);
    }
    apr_table_unset(f->r->headers_out, "Content-Length");
    apr_table_unset(f->r->err_headers_out, "Content-Length");
    for (b = APR_BRIGADE_FIRST(bb); b != APR_BRIGADE_SENTINEL(bb); b = next) {
        next = APR_BUCKET_NEXT(b);
        if (!APR_BUCKET_IS_METADATA(b))
            apr_bucket_delete(b);
    }
    return ap_pass_brigade(f->next, bb);
}

static int has_error(apr_bucket_brigade *bb)
{
    apr_bucket *b;

    for (b = APR_BRIGADE_FIRST(bb); b != APR_BRIGADE_SENTINEL(bb); b = APR_BUCKET_NEXT(b))
        if (AP_BUCKET_IS_ERROR(b))
            return 1;
    return 0;
}

static apr_status_t handoff_filter(ap_filter_t *f, apr_bucket_brigade *bb)
{
    request_rec *r = f->r;
    handoff_ctx *ctx = get_ctx(r);
    apr_status_t rv;

    if (APR_BRIGADE_EMPTY(bb))
        return APR_SUCCESS;
    if (ctx->state == OVER) {
        apr_brigade_cleanup(bb);
        return APR_SUCCESS;
    }
    if (ctx->state == UNDECIDED)
        decide(r, ctx);
    if (ctx->state == PASSING)
        return pass(f, ctx, bb);
    if (ctx->body_is_data && !ctx->body_complete) {
        /* mod_headers named the body as the source: CAPTURE could not know. */
        rv = collect(r, ctx, bb);
        if (rv != APR_SUCCESS || !ctx->body_complete)
            return rv;
    }
    ctx->body_failed |= has_error(bb);
    apr_brigade_cleanup(bb);
    return conclude(f, ctx);
}

/* ---- hooks ---- */

static void insert_filters(request_rec *r)
{
    ap_add_output_filter_handle(capture_handle, NULL, r, r->connection);
    ap_add_output_filter_handle(handoff_handle, NULL, r, r->connection);
}

/*
 * A response that Apache writes itself gets filters of its own, and is no data. What the handler left in
 * err_headers_out goes at once; mod_headers may add to it again, so the filter looks too.
 */
static void insert_error_filter(request_rec *r)
{
    get_ctx(r)->body_is_data = 0;
    strip_headers(r);
    ap_add_output_filter_handle(handoff_handle, NULL, r, r->connection);
}

/* err_headers_out survives an internal redirect; a handoff that was asked for before it does not. */
static int forget_before_redirect(request_rec *r)
{
    if (r->prev)
        strip_headers(r);
    return DECLINED;
}

static int health_handler(request_rec *r)
{
    const handoff_conf *conf;
    const handoff_failure *failure;

    if (!r->handler || strcmp(r->handler, "socket-handoff-health"))
        return DECLINED;
    ap_allow_standard_methods(r, REPLACE_ALLOW, M_GET, -1);
    if (r->method_number != M_GET)
        return HTTP_METHOD_NOT_ALLOWED;
    conf = handoff_conf_get(r);
    failure = handoff_probe(r, conf, conf->health_socket);
    if (failure)
        send_json(r, r->output_filters, HTTP_SERVICE_UNAVAILABLE, failure_json(r, failure));
    else
        send_json(r, r->output_filters, HTTP_OK, "{\"status\":\"ok\"}\n");
    return OK;
}

static int post_config(apr_pool_t *pconf, apr_pool_t *plog, apr_pool_t *ptemp, server_rec *s)
{
    (void)plog;
    (void)ptemp;
    (void)s;
    handoff_relay_init(pconf);
    return OK;
}

static void child_init(apr_pool_t *child, server_rec *s)
{
    (void)s;
    handoff_idle_init(child);
}

static void register_hooks(apr_pool_t *pool)
{
    static const char *const after[] = {"mod_headers.c", NULL};

    (void)pool;
    capture_handle = ap_register_output_filter("SOCKET_HANDOFF_CAPTURE", capture_filter, NULL,
                                               (ap_filter_type)(AP_FTYPE_RESOURCE - 1));
    /* Among filters of one type the last inserted is the last to run: behind mod_headers, before CACHE_SAVE. */
    handoff_handle = ap_register_output_filter("SOCKET_HANDOFF", handoff_filter, NULL, AP_FTYPE_CONTENT_SET);
    ap_hook_insert_filter(insert_filters, after, NULL, APR_HOOK_REALLY_LAST);
    ap_hook_insert_error_filter(insert_error_filter, after, NULL, APR_HOOK_REALLY_LAST);
    ap_hook_post_read_request(forget_before_redirect, NULL, NULL, APR_HOOK_REALLY_FIRST);
    ap_hook_handler(health_handler, NULL, NULL, APR_HOOK_MIDDLE);
    ap_hook_post_config(post_config, NULL, NULL, APR_HOOK_MIDDLE);
    ap_hook_child_init(child_init, NULL, NULL, APR_HOOK_MIDDLE);
}

module AP_MODULE_DECLARE_DATA socket_handoff_module = {
    STANDARD20_MODULE_STUFF,
    handoff_conf_create,
    handoff_conf_merge,
    NULL,
    NULL,
    handoff_directives,
    register_hooks,
    AP_MODULE_FLAG_NONE,
};
