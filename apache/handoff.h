/*
 * What the files of mod_socket_handoff share. The theory of operation is at the top of mod_socket_handoff.c.
 */

#ifndef SOCKET_HANDOFF_H
#define SOCKET_HANDOFF_H

#include <stddef.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>

#include "httpd.h"
#include "http_config.h"
#include "http_log.h"
#include "util_filter.h"
#include "apr_tables.h"

extern module AP_MODULE_DECLARE_DATA socket_handoff_module;
APLOG_USE_MODULE(socket_handoff);

/* Data beyond this travels in a memfd: a SEQPACKET message takes 212,960 bytes at most with default buffers. */
#define HANDOFF_INLINE_MAX 65536
/* The envelope's line of JSON; together with inline data a message stays well below what the kernel takes. */
#define HANDOFF_JSON_MAX 65536

typedef enum { FORMAT_RAW, FORMAT_ENVELOPE } handoff_format;
typedef enum { FALLBACK_ERROR, FALLBACK_RELAY } handoff_fallback;

/* Per server and per <Location>. Numbers are -1 and pointers NULL where nothing was said. */
typedef struct {
    int enabled;
    int connect_timeout_ms;
    int send_timeout_ms;
    int max_retries;
    int format;
    int persistent;
    int fallback;
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

/* The daemon's socket: its real path, and which file that is. A daemon that starts anew makes another. */
typedef struct {
    char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
    dev_t device;
    ino_t inode;
} handoff_target;

/* The head of a daemon's answer that is relayed. Strings are the pool's. */
typedef struct {
    int status;
    const char *type;     /* NULL: none was said */
    apr_int64_t length;   /* of the body; -1: up to the end of file */
    apr_table_t *headers; /* the others, less those about the connection */
} handoff_answer;

/* config.c. The request's configuration comes with the defaults filled in. */
extern const command_rec handoff_directives[];
void *handoff_conf_create(apr_pool_t *pool, char *dir);
void *handoff_conf_merge(apr_pool_t *pool, void *base, void *over);
const handoff_conf *handoff_conf_get(request_rec *r);
/* Whether it can be the name of a header (RFC 9110, 5.6.2). */
int handoff_is_token(const char *name);

/* json.c: pure functions, no httpd. */

/* Bytes of the JSON string, quotes included, that stands for `in`; written to `out` unless that is NULL. */
size_t handoff_json_string(char *out, const char *in, size_t len);

/* payload.c. Strings point into r->pool; NULL means success. */
const handoff_failure *handoff_message_build(request_rec *r, const handoff_conf *conf, const char *data,
                                             size_t len, int relayed, handoff_message *msg);
void handoff_message_close(handoff_message *msg);

/* idle.c: connections to daemons that are kept for the next handoff, shared by the threads of a child. */
void handoff_idle_init(apr_pool_t *child);
/* A connection to `target`, the caller's to close or to give back; -1: there is none. */
int handoff_idle_take(const handoff_target *target);
/* Takes over `fd`. */
void handoff_idle_keep(const handoff_target *target, int fd);

/* deliver.c. NULL means that the daemon has the message and, from then on, owns the client. */
const handoff_failure *handoff_deliver(request_rec *r, const handoff_conf *conf, const char *path,
                                       int client_fd, const handoff_message *msg);
/* Connects and hangs up: does anybody accept at `path`? */
const handoff_failure *handoff_probe(request_rec *r, const handoff_conf *conf, const char *path);

/* answer.c: the head of an answer, which may hold anything. */

/* The length of the head, its blank line included; 0 while there is no blank line. The first `seen` were looked at. */
apr_size_t handoff_head_length(const char *bytes, apr_size_t len, apr_size_t seen);
/* NULL, or what is wrong with the head. Writes into `head`. */
const char *handoff_answer_parse(apr_pool_t *pool, char *head, apr_size_t len, handoff_answer *answer);

/* relay.c */
void handoff_relay_init(apr_pool_t *pconf);
/*
 * Gives the daemon one end of a pair of sockets and sends what it answers to `next`, until one of the two ends. With
 * NULL *outcome says how it went; with a failure the client has been sent nothing.
 */
const handoff_failure *handoff_relay(request_rec *r, const handoff_conf *conf, const char *path,
                                     const handoff_message *msg, ap_filter_t *next, const char **outcome);

#endif
