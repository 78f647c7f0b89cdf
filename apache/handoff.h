/*
 * What the files of mod_socket_handoff share. The theory of operation is at the top of mod_socket_handoff.c.
 */

#ifndef SOCKET_HANDOFF_H
#define SOCKET_HANDOFF_H

#include <stddef.h>
#include <sys/uio.h>

#include "httpd.h"
#include "http_config.h"
#include "http_log.h"
#include "apr_tables.h"

extern module AP_MODULE_DECLARE_DATA socket_handoff_module;
APLOG_USE_MODULE(socket_handoff);

/* Data beyond this travels in a memfd: a SEQPACKET message takes 212,960 bytes at most with default buffers. */
#define HANDOFF_INLINE_MAX 65536
/* The envelope's line of JSON; together with inline data a message stays well below what the kernel takes. */
#define HANDOFF_JSON_MAX 65536

typedef enum { FORMAT_RAW, FORMAT_ENVELOPE } handoff_format;

/* Per server and per <Location>. Numbers are -1 and pointers NULL where nothing was said. */
typedef struct {
    int enabled;
    int connect_timeout_ms;
    int send_timeout_ms;
    int max_retries;
    int format;
    apr_int64_t max_data;
    const char *prefix;
    const char *health_socket;
    const apr_array_header_t *response_headers; /* const char *; empty: none; a single "all": all */
    const apr_array_header_t *request_headers;
} handoff_conf;

/* A way to fail, as the client and the access log see it. Status 0: there is no client left to tell. */
typedef struct {
    int status;
    const char *code;
    const char *text;
} handoff_failure;

/* One message to the daemon. Whoever built it closes `memfd` (-1: none) by handoff_message_close(). */
typedef struct {
    struct iovec iov[2];
    int iovcnt;
    int memfd;
} handoff_message;

/* config.c. The request's configuration comes with the defaults filled in. */
extern const command_rec handoff_directives[];
void *handoff_conf_create(apr_pool_t *pool, char *dir);
void *handoff_conf_merge(apr_pool_t *pool, void *base, void *over);
const handoff_conf *handoff_conf_get(request_rec *r);

/* json.c: pure functions, no httpd. */

/* Bytes of the JSON string, quotes included, that stands for `in`; written to `out` unless that is NULL. */
size_t handoff_json_string(char *out, const char *in, size_t len);

/* payload.c. Strings point into r->pool; NULL means success. */
const handoff_failure *handoff_message_build(request_rec *r, const handoff_conf *conf, const char *data,
                                             size_t len, handoff_message *msg);
void handoff_message_close(handoff_message *msg);

/* deliver.c. NULL means that the daemon has the message and, from then on, owns the client. */
const handoff_failure *handoff_deliver(request_rec *r, const handoff_conf *conf, const char *path,
                                       int client_fd, const handoff_message *msg);
/* Connects and hangs up: does anybody accept at `path`? */
const handoff_failure *handoff_probe(request_rec *r, const handoff_conf *conf, const char *path);

#endif
