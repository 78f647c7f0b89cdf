/*
 * The message for the daemon: what its bytes are, and the memfd that carries what a message cannot.
 *
 *   raw        the data itself, or one NUL byte when there is none
 *   raw, big   SOH 0x01 {} LF, and the data in a memfd: an empty envelope, so that it arrives whole
 *   envelope   SOH flags JSON LF data, the data in a memfd (flag 0x01) when it is big
 *
 * Where there are flags, 0x04 says that the client's end is Apache, which relays (relay.c).
 *
 * The memfd is sealed against every change before it is sent: the daemon checks the seals and may then map it without
 * fear that it shrinks or changes under its feet.
 */

#include "handoff.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "apr_lib.h"
#include "apr_strings.h"

#define SOH "\x01"
#define FLAG_DATA_IN_MEMFD 0x01
#define FLAG_RELAYED 0x04

static const handoff_failure internal_error = {HTTP_INTERNAL_SERVER_ERROR, "internal_error", "Internal error"};
static const handoff_failure headers_too_large = {HTTP_INTERNAL_SERVER_ERROR, "headers_too_large",
                                                  "The response headers are too large to hand off"};
static const handoff_failure bad_data = {HTTP_FORBIDDEN, "bad_data", "The handoff data is not allowed"};

/* The JSON is a list of pieces until it is known to fit; nothing is copied twice. */
typedef struct {
    apr_pool_t *pool;
    apr_array_header_t *pieces; /* struct iovec */
    size_t length;
    const char *separator;
} json_line;

static void add_bytes(json_line *line, const char *bytes, size_t len)
{
    struct iovec *piece = apr_array_push(line->pieces);

    piece->iov_base = (void *)bytes;
    piece->iov_len = len;
    line->length += len;
}

static void add(json_line *line, const char *literal)
{
    add_bytes(line, literal, strlen(literal));
}

static void add_string(json_line *line, const char *value)
{
    size_t len = strlen(value);
    size_t size = handoff_json_string(NULL, value, len);
    char *json = apr_palloc(line->pool, size);

    handoff_json_string(json, value, len);
    add_bytes(line, json, size);
}

static void add_member(json_line *line, const char *name, const char *value)
{
    if (!value)
        return;
    add(line, line->separator);
    line->separator = ",";
    add_string(line, name);
    add(line, ":");
    add_string(line, value);
}

/*
 * mod_unique_id's, or the client's own if it is a plain token: it is going into logs and response headers, so it must
 * not be able to hold anything that means something there.
 */
static const char *request_id(request_rec *r)
{
    const char *id = apr_table_get(r->subprocess_env, "UNIQUE_ID");
    const char *p;

    if (id && *id)
        return id;
    id = apr_table_get(r->headers_in, "X-Request-Id");
    if (!id || !*id || strlen(id) > 128)
        return NULL;
    for (p = id; *p; p++)
        if (!apr_isalnum(*p) && !strchr("-_.:+/=@", *p))
            return NULL;
    return id;
}

static void add_request(json_line *line, request_rec *r, const handoff_conf *conf)
{
    request_rec *asked = r;
    int i;

    /* What the client asked for, not what per-directory rewriting or DirectoryIndex made of it. */
    while (asked->prev)
        asked = asked->prev;
    add(line, "{\"request\":{");
    line->separator = "";
    add_member(line, "method", asked->method);
    add_member(line, "uri", asked->unparsed_uri);
    add_member(line, "host", r->hostname);
    add_member(line, "remote_addr", r->useragent_ip);
    add_member(line, "request_id", request_id(r));
    add_member(line, "protocol", r->protocol);
    add(line, ",\"headers\":{");
    line->separator = "";
    for (i = 0; i < conf->request_headers->nelts; i++) {
        const char *name = APR_ARRAY_IDX(conf->request_headers, i, const char *);

        add_member(line, name, apr_table_getm(r->pool, r->headers_in, name));
    }
    add(line, "}}");
}

/* Headers that describe a message or a connection which will not exist: the daemon sends its own body, its own way. */
static int is_framing(const char *name)
{
    static const char *const framing[] = {
        "Accept-Ranges", "Connection", "Content-Encoding", "Content-Length", "Content-MD5", "Content-Range",
        "Content-Type", "ETag", "Keep-Alive", "Last-Modified", "Proxy-Connection", "TE", "Trailer",
        "Transfer-Encoding", "Upgrade", NULL};
    int i;

    for (i = 0; framing[i]; i++)
        if (!ap_cstr_casecmp(name, framing[i]))
            return 1;
    return 0;
}

static int is_wanted(const apr_array_header_t *names, const char *name)
{
    int i;

    for (i = 0; i < names->nelts; i++) {
        const char *wanted = APR_ARRAY_IDX(names, i, const char *);

        if (!strcmp(wanted, "all") || !ap_cstr_casecmp(wanted, name))
            return !is_framing(name);
    }
    return 0;
}

static void add_response_headers(json_line *line, const apr_table_t *headers, const handoff_conf *conf)
{
    const apr_array_header_t *all = apr_table_elts(headers);
    const apr_table_entry_t *entry = (const apr_table_entry_t *)all->elts;
    int i;

    for (i = 0; i < all->nelts; i++) {
        if (!entry[i].key || !is_wanted(conf->response_headers, entry[i].key))
            continue;
        add(line, line->separator);
        line->separator = ",";
        add(line, "[");
        add_string(line, entry[i].key);
        add(line, ",");
        add_string(line, entry[i].val);
        add(line, "]");
    }
}

static const handoff_failure *build_envelope(request_rec *r, const handoff_conf *conf, int flags,
                                             struct iovec *head)
{
    json_line line = {r->pool, apr_array_make(r->pool, 64, sizeof(struct iovec)), 0, ""};
    char *at;
    int i;

    add_request(&line, r, conf);
    add(&line, ",\"response_headers\":[");
    line.separator = "";
    add_response_headers(&line, r->headers_out, conf);
    add_response_headers(&line, r->err_headers_out, conf);
    add(&line, "]}\n");
    if (line.length > HANDOFF_JSON_MAX)
        return &headers_too_large;

    head->iov_base = at = apr_palloc(r->pool, line.length + 2);
    head->iov_len = line.length + 2;
    *at++ = SOH[0];
    *at++ = (char)flags;
    for (i = 0; i < line.pieces->nelts; i++) {
        const struct iovec *piece = &APR_ARRAY_IDX(line.pieces, i, struct iovec);

        memcpy(at, piece->iov_base, piece->iov_len);
        at += piece->iov_len;
    }
    return NULL;
}

/* The caller owns the fd; -1 and errno on failure. The file offset stays 0, for receivers that simply read. */
static int sealed_memfd(const char *data, size_t len)
{
    int fd = memfd_create("handoff-data", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    size_t done = 0;
    int err;

    if (fd < 0)
        return -1;
    while (done < len) {
        ssize_t n = pwrite(fd, data + done, len - done, (off_t)done);

        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            goto failed;
        done += (size_t)n;
    }
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
        return fd;
failed:
    err = errno;
    close(fd);
    errno = err;
    return -1;
}

static void append(handoff_message *msg, const void *bytes, size_t len)
{
    if (!len)
        return;
    msg->iov[msg->iovcnt].iov_base = (void *)bytes;
    msg->iov[msg->iovcnt++].iov_len = len;
}

const handoff_failure *handoff_message_build(request_rec *r, const handoff_conf *conf, const char *data,
                                             size_t len, int relayed, handoff_message *msg)
{
    const handoff_failure *failure;
    struct iovec head;
    int big = len > HANDOFF_INLINE_MAX;
    int flags = (big ? FLAG_DATA_IN_MEMFD : 0) | (relayed ? FLAG_RELAYED : 0);

    msg->iovcnt = 0;
    msg->memfd = -1;
    if (conf->format == FORMAT_ENVELOPE) {
        failure = build_envelope(r, conf, flags, &head);
        if (failure)
            return failure;
        append(msg, head.iov_base, head.iov_len);
    }
    else if (len && data[0] == SOH[0]) {
        /* Envelopes are ours to write: the daemon believes what they say of the client. */
        return &bad_data;
    }
    else if (big) {
        append(msg, apr_psprintf(r->pool, SOH "%c{}\n", flags), 5);
    }
    else if (!len) {
        append(msg, "\0", 1);
    }
    if (!big) {
        append(msg, data, len);
        return NULL;
    }
    msg->memfd = sealed_memfd(data, len);
    if (msg->memfd < 0) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, errno, r, "socket_handoff: cannot put %" APR_SIZE_T_FMT
                      " bytes of data into a memfd", len);
        return &internal_error;
    }
    return NULL;
}

void handoff_message_close(handoff_message *msg)
{
    if (msg->memfd >= 0)
        close(msg->memfd);
    msg->memfd = -1;
}
