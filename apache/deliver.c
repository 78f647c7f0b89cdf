/*
 * The way to the daemon: which path is allowed, how to connect, how to send.
 *
 * One delivery is at most 1 + SocketHandoffMaxRetries attempts, 10, 20, 40 ms apart. What is worth another attempt is
 * what a restarting daemon looks like: no socket file, nobody behind it (ECONNREFUSED), or a connection that ends before
 * it has taken anything (EPIPE, ECONNRESET). A full backlog is not: a non-blocking connect() to a Unix socket then fails
 * with EAGAIN at once, there is nothing to poll for, so within the connect timeout it is simply asked again every few ms.
 *
 * With SocketHandoffPersistent a connection is used again (idle.c). One that the daemon has closed meanwhile says so by
 * EPIPE or ECONNRESET, and has then taken nothing of this message: the same attempt goes on with a fresh connection.
 *
 * The point of no return is the sendmsg() that succeeds: the kernel holds a reference to the client's connection in the
 * daemon's queue, whether or not the daemon ever reads it. Nothing after it is a failure of the handoff any more.
 */

#include "handoff.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "apr_strings.h"
#include "apr_time.h"

#define ASK_AGAIN_MS 2
#define FIRST_RETRY_MS 10
#define LAST_RETRY_MS 1000

static const handoff_failure path_not_allowed = {HTTP_FORBIDDEN, "path_not_allowed",
                                                 "The handoff socket is not allowed"};
static const handoff_failure daemon_unavailable = {HTTP_SERVICE_UNAVAILABLE, "daemon_unavailable",
                                                   "The streaming service is unavailable"};
static const handoff_failure daemon_busy = {HTTP_SERVICE_UNAVAILABLE, "daemon_busy",
                                            "The streaming service is busy"};
static const handoff_failure internal_error = {HTTP_INTERNAL_SERVER_ERROR, "internal_error", "Internal error"};

/* realpath(3) into the pool; NULL and errno when it does not resolve. */
static const char *resolve(apr_pool_t *pool, const char *path)
{
    char *real = realpath(path, NULL);
    const char *copy = real ? apr_pstrdup(pool, real) : NULL;
    int err = errno;

    free(real);
    errno = err;
    return copy;
}

/* Whether `path` is inside the directory `dir`: "/run" holds "/run/a" and not "/runaway". */
static int is_under(const char *path, const char *dir)
{
    size_t len = strlen(dir);

    while (len && dir[len - 1] == '/')
        len--;
    return !strncmp(path, dir, len) && path[len] == '/';
}

static int has_dotdot(const char *path)
{
    const char *p;

    for (p = path; (p = strstr(p, "..")); p += 2)
        if ((p == path || p[-1] == '/') && (p[2] == '/' || !p[2]))
            return 1;
    return 0;
}

/*
 * Where a path that does not exist would be: a daemon that restarts takes its socket, and perhaps its directory, away
 * for a moment, and that must not look like an attack. NULL if that cannot be told.
 */
static const char *resolve_missing(apr_pool_t *pool, const char *path)
{
    char *parent = apr_pstrdup(pool, path);
    char *slash;

    while ((slash = strrchr(parent, '/'))) {
        const char *tail = path + (slash - parent), *real;

        if (has_dotdot(tail))
            return NULL;
        *slash = '\0';
        real = resolve(pool, *parent ? parent : "/");
        if (real)
            return apr_pstrcat(pool, strcmp(real, "/") ? real : "", tail, NULL);
        if (errno != ENOENT && errno != ENOTDIR && errno != EACCES)
            return NULL;
    }
    return NULL;
}

/*
 * 0: `target` is a socket under the prefix. EPERM: it is not, or would not be. Anything else (ENOENT, EACCES): it is
 * allowed, but not there.
 */
static int check_path(request_rec *r, const handoff_conf *conf, const char *path, handoff_target *target)
{
    const char *prefix = resolve(r->pool, conf->prefix), *real;
    struct stat st;
    int err;

    if (!prefix)
        prefix = conf->prefix;
    if (*path != '/')
        return EPERM;
    real = resolve(r->pool, path);
    if (!real) {
        err = errno;
        if (err != ENOENT && err != ENOTDIR && err != EACCES)
            return EPERM;
        real = resolve_missing(r->pool, path);
        return real && is_under(real, prefix) ? err : EPERM;
    }
    if (!is_under(real, prefix) || strlen(real) >= sizeof(target->path))
        return EPERM;
    if (stat(real, &st) < 0)
        return errno;
    memcpy(target->path, real, strlen(real) + 1);
    target->device = st.st_dev;
    target->inode = st.st_ino;
    return S_ISSOCK(st.st_mode) ? 0 : EPERM;
}

/* *fd is a connected socket of that type, the caller's to close; or an errno, ETIMEDOUT if the backlog stayed full. */
static int connect_as(const char *path, int type, apr_time_t deadline, int *fd)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    int err;

    *fd = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (*fd < 0)
        return errno;
    memcpy(addr.sun_path, path, strlen(path) + 1);
    for (;;) {
        if (!connect(*fd, (struct sockaddr *)&addr, sizeof(addr)))
            return 0;
        err = errno;
        if (err == EAGAIN && apr_time_now() >= deadline)
            err = ETIMEDOUT;
        if (err != EAGAIN && err != EINTR)
            break;
        if (err == EAGAIN)
            apr_sleep(apr_time_from_msec(ASK_AGAIN_MS));
    }
    close(*fd);
    *fd = -1;
    return err;
}

static int connect_daemon(const handoff_conf *conf, const handoff_target *target, int *type, int *fd)
{
    apr_time_t deadline = apr_time_now() + apr_time_from_msec(conf->connect_timeout_ms);
    int err;

    *type = SOCK_SEQPACKET;
    err = connect_as(target->path, *type, deadline, fd);
    if (err == EPROTOTYPE) {
        /* An older daemon: its listener is a SOCK_STREAM. */
        *type = SOCK_STREAM;
        err = connect_as(target->path, *type, deadline, fd);
    }
    return err;
}

/*
 * Waits until the socket may take more; an errno when the time is up. ETOOMANYREFS (too many fds of this user are in
 * flight, because a daemon is slow to receive them) is nothing poll() knows about.
 */
static int wait_to_send(int fd, int why, apr_time_t deadline)
{
    struct pollfd pfd = {.fd = fd, .events = POLLOUT};
    apr_interval_time_t left = deadline - apr_time_now();

    if (why == EINTR)
        return 0;
    if (left <= 0)
        return ETIMEDOUT;
    if (why == ETOOMANYREFS)
        apr_sleep(apr_time_from_msec(ASK_AGAIN_MS));
    else if (poll(&pfd, 1, (int)apr_time_as_msec(left) + 1) < 0 && errno != EINTR)
        return errno;
    return 0;
}

static void attach_fds(struct msghdr *mh, int client_fd, int memfd)
{
    int fds[2] = {client_fd, memfd};
    size_t size = sizeof(int) * (memfd >= 0 ? 2 : 1);
    struct cmsghdr *cmsg;

    mh->msg_controllen = CMSG_SPACE(size);
    cmsg = CMSG_FIRSTHDR(mh);
    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(cmsg), fds, size);
}

/* What a STREAM socket did not take at once. The fds are in its first part only. */
static void advance(struct msghdr *mh, size_t sent)
{
    mh->msg_control = NULL;
    mh->msg_controllen = 0;
    while (mh->msg_iovlen && sent >= mh->msg_iov->iov_len) {
        sent -= mh->msg_iov->iov_len;
        mh->msg_iov++;
        mh->msg_iovlen--;
    }
    if (mh->msg_iovlen) {
        mh->msg_iov->iov_base = (char *)mh->msg_iov->iov_base + sent;
        mh->msg_iov->iov_len -= sent;
    }
}

/* 0, or the errno that kept even the first byte from being taken. */
static int send_message(request_rec *r, const handoff_conf *conf, int fd, int client_fd, const handoff_message *msg)
{
    apr_time_t deadline = apr_time_now() + apr_time_from_msec(conf->send_timeout_ms);
    union {
        char room[CMSG_SPACE(2 * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov[2];
    struct msghdr mh = {.msg_iov = iov, .msg_iovlen = (size_t)msg->iovcnt, .msg_control = &control};
    int err = 0, begun = 0;

    memset(&control, 0, sizeof(control));
    memcpy(iov, msg->iov, sizeof(iov));
    attach_fds(&mh, client_fd, msg->memfd);
    while (mh.msg_iovlen && !err) {
        ssize_t n = sendmsg(fd, &mh, MSG_NOSIGNAL);

        if (n >= 0) {
            begun = 1;
            advance(&mh, (size_t)n);
            continue;
        }
        err = errno;
        if (err == EAGAIN || err == EINTR || err == ETOOMANYREFS)
            err = wait_to_send(fd, err, deadline);
    }
    if (err && begun) {
        ap_log_rerror(APLOG_MARK, APLOG_ERR, err, r, "socket_handoff: the daemon took the client but not all data");
        return 0;
    }
    return err;
}

static int is_restarting(int err)
{
    return err == ENOENT || err == ENOTDIR || err == ECONNREFUSED || err == EPIPE || err == ECONNRESET;
}

/* By a connection that is there already; ENOTCONN: there is none that the daemon has not closed. */
static int send_by_idle(request_rec *r, const handoff_conf *conf, const handoff_target *target, int client_fd,
                        const handoff_message *msg)
{
    int fd = handoff_idle_take(target);
    int err;

    if (fd < 0)
        return ENOTCONN;
    err = send_message(r, conf, fd, client_fd, msg);
    if (!err) {
        handoff_idle_keep(target, fd);
        return 0;
    }
    close(fd);
    return is_restarting(err) ? ENOTCONN : err;
}

static int attempt(request_rec *r, const handoff_conf *conf, const char *path, int client_fd,
                   const handoff_message *msg)
{
    handoff_target target;
    int type, fd;
    int err = check_path(r, conf, path, &target);

    if (err)
        return err;
    if (conf->persistent) {
        err = send_by_idle(r, conf, &target, client_fd, msg);
        if (err != ENOTCONN)
            return err;
    }
    err = connect_daemon(conf, &target, &type, &fd);
    if (err)
        return err;
    err = send_message(r, conf, fd, client_fd, msg);
    if (!err && conf->persistent && type == SOCK_SEQPACKET)
        handoff_idle_keep(&target, fd);
    else
        close(fd); /* to a STREAM daemon this EOF says that the data is complete */
    return err;
}

static const handoff_failure *explain(request_rec *r, const char *path, int err)
{
    const handoff_failure *failure = &daemon_unavailable;

    if (err == EPERM)
        failure = &path_not_allowed;
    else if (err == ETIMEDOUT)
        failure = &daemon_busy;
    else if (err == EMFILE || err == ENFILE || err == ENOBUFS || err == ENOMEM || err == EMSGSIZE)
        failure = &internal_error;
    if (err == EPERM)
        ap_log_rerror(APLOG_MARK, APLOG_ERR, 0, r, "socket_handoff: \"%s\" is no socket under "
                      "SocketHandoffAllowedPrefix", path);
    else
        ap_log_rerror(APLOG_MARK, APLOG_ERR, err, r, "socket_handoff: the daemon at \"%s\" cannot be reached", path);
    return failure;
}

const handoff_failure *handoff_deliver(request_rec *r, const handoff_conf *conf, const char *path,
                                       int client_fd, const handoff_message *msg)
{
    int delay_ms = FIRST_RETRY_MS, retries = 0, err;

    while ((err = attempt(r, conf, path, client_fd, msg)) && is_restarting(err) && retries < conf->max_retries) {
        retries++;
        apr_sleep(apr_time_from_msec(delay_ms));
        delay_ms = delay_ms * 2 < LAST_RETRY_MS ? delay_ms * 2 : LAST_RETRY_MS;
    }
    if (err)
        return explain(r, path, err);
    ap_log_rerror(APLOG_MARK, APLOG_DEBUG, 0, r, "socket_handoff: handed off to \"%s\" after %d retries", path,
                  retries);
    return NULL;
}

const handoff_failure *handoff_probe(request_rec *r, const handoff_conf *conf, const char *path)
{
    handoff_target target;
    int type, fd;
    int err = check_path(r, conf, path, &target);

    if (!err)
        err = connect_daemon(conf, &target, &type, &fd);
    if (err)
        return explain(r, path, err);
    close(fd);
    return NULL;
}
