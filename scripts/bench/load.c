/* load: hands client sockets over to a daemon at a set rate and reads every stream to its end.
 *
 * One thread, one epoll, one fd per stream once it has been handed over. The machine is shared with the daemon that is
 * being measured, so nothing here polls: epoll_pwait2 sleeps to the nanosecond at which the next handoff is due, a
 * wake-up costs one read per stream that has bytes, and what was read is compared with memcmp, not parsed. The sender
 * does what the Apache module does for each request: connect, one sendmsg of data and fd, close; EAGAIN from connect
 * (the backlog is full) is tried again a millisecond later. With -p it does what the module does with
 * SocketHandoffPersistent On: one connection for all, and a new one when the daemon has closed it.
 *
 * With -u the daemon is an HTTP server on a Unix stream socket instead: DATA is the request, sent on a connection of its
 * own per stream, and the answer is expected in chunked transfer coding.
 *
 * Every stream must be a 200 whose body is, byte for byte, the file BODY: number and order of events included.
 *
 * Talks to whoever started it by lines: prints "ready", waits for a line, begins; prints "live COUNT" when all streams
 * have been handed over and each has its first byte after the head (or has failed), COUNT being those that have not ended; prints
 * "done JSON" at the end. RESULT receives one struct record per stream, in the order of handing over.
 *
 * Needs Linux 5.11 and glibc 2.35 (epoll_pwait2). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MS 1000000LL
#define RETRY_NS (1 * MS)
#define BURST 16 /* handoffs in a row, when late, before streams are read again */

enum fate { WHOLE, REFUSED, WRONG, TRUNCATED, RESET, TIMED_OUT, UNSENT, RUNNING }; /* as FATES in driver.py */

struct record { /* as RECORD in driver.py; times in ns, -1 where there is none */
    int64_t late; /* handed over after it was due */
    int64_t ttfb; /* from just before sendmsg to the first byte after the head */
    int64_t gap;  /* the longest time between two reads that brought such bytes */
    int64_t tail; /* from the last byte to EOF */
    int32_t status, fate;
};

struct stream {
    struct record out;
    int64_t sent, last;
    uint32_t head, body; /* bytes of each read so far */
    int fd;
    uint32_t chunk, size; /* with -u: what is left of the chunk, and the next one's size as far as it is read */
    bool sized;
    uint8_t crlf; /* how much of the blank line that ends the head has been seen */
};

static struct {
    struct sockaddr_un daemon;
    uint32_t count;
    int64_t over, timeout;
    bool tcp, http, persistent;
    char *body, *data;
    size_t body_len, data_len;
    char *number; /* where the stream's number goes in data; NULL: nowhere */
    const char *result;
} opt;

static struct stream *streams;
static int epoll, listener = -1;
static struct sockaddr_in listener_addr;
static uint32_t next, live, ended, live_peak, retries; /* live: has its first byte and has not ended */
static int kept = -1; /* with -p: the connection for all handoffs */
static int pending = -1; /* the daemon's end of the next stream's pair, while connect has to be retried */
static bool announced, explained;

static void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(2);
}

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000 * MS + t.tv_nsec;
}

/* The first stream that went wrong is shown, the others only counted. */
static void explain(const struct stream *s, const char *what, const char *bytes, size_t len)
{
    if (explained)
        return;
    explained = true;
    fprintf(stderr, "load: stream %u, byte %u of the body: %s: \"", (unsigned)(s - streams), s->body, what);
    for (size_t i = 0; i < len && i < 400; i++)
        fprintf(stderr, isprint((unsigned char)bytes[i]) ? "%c" : "\\x%02x", (unsigned char)bytes[i]);
    fprintf(stderr, "\"\n");
}

static void announce(void)
{
    if (announced || next < opt.count || live + ended < opt.count)
        return;
    announced = true;
    printf("live %u\n", live);
}

static void end(struct stream *s, enum fate fate)
{
    s->out.fate = fate;
    if (s->out.ttfb >= 0)
        live--;
    ended++;
    if (s->fd >= 0)
        close(s->fd); /* the only copy, so epoll forgets it too */
    s->fd = -1;
}

/* Reads the head, which ends at the first blank line. Returns how many of the bytes belonged to it. */
static size_t read_head(struct stream *s, const char *bytes, size_t len)
{
    size_t i = 0;
    while (i < len && s->crlf < 4) {
        char c = bytes[i++];
        uint32_t at = s->head++;
        if (at >= 9 && at < 12 && isdigit((unsigned char)c)) /* "HTTP/1.1 200" */
            s->out.status = s->out.status * 10 + (c - '0');
        if (c == "\r\n\r\n"[s->crlf])
            s->crlf++;
        else
            s->crlf = c == '\r';
    }
    return i;
}

/* Takes the chunked transfer coding off, in place. Returns how many bytes of the body are left. */
static size_t dechunk(struct stream *s, char *bytes, size_t len)
{
    size_t out = 0;
    for (size_t i = 0; i < len;) {
        if (s->chunk) {
            size_t take = s->chunk < len - i ? s->chunk : len - i;
            memmove(bytes + out, bytes + i, take);
            s->chunk -= take;
            out += take;
            i += take;
            continue;
        }
        int c = tolower((unsigned char)bytes[i++]); /* a size, or the line end after a chunk's bytes */
        if (isxdigit(c)) {
            s->size = s->size * 16 + (c <= '9' ? c - '0' : c - 'a' + 10);
            s->sized = true;
        } else if (c == '\n' && s->sized) {
            s->chunk = s->size;
            s->size = 0;
            s->sized = false;
        }
    }
    return out;
}

static void read_stream(struct stream *s)
{
    static char buf[65536];
    ssize_t n = recv(s->fd, buf, sizeof buf, MSG_DONTWAIT);
    int64_t t = now();
    if (n < 0) {
        if (errno == EAGAIN || errno == EINTR)
            return;
        explain(s, strerror(errno), "", 0);
        end(s, RESET);
        return;
    }
    if (n == 0) {
        s->out.tail = s->out.ttfb < 0 ? -1 : t - s->last;
        if (s->body < opt.body_len)
            explain(s, "ended too early", "", 0);
        end(s, s->body == opt.body_len ? WHOLE : TRUNCATED);
        return;
    }
    size_t used = s->crlf < 4 ? read_head(s, buf, n) : 0, len = n - used;
    if (s->crlf == 4 && s->out.status != 200) {
        explain(s, "not a 200", buf, n);
        end(s, REFUSED);
        return;
    }
    if (opt.http)
        len = dechunk(s, buf + used, len);
    if (!len)
        return;
    if (s->out.ttfb < 0) {
        s->out.ttfb = t - s->sent;
        if (++live > live_peak)
            live_peak = live;
    } else if (t - s->last > s->out.gap) {
        s->out.gap = t - s->last;
    }
    s->last = t;
    if (len > opt.body_len - s->body || memcmp(buf + used, opt.body + s->body, len)) {
        explain(s, "unexpected bytes", buf + used, len);
        end(s, WRONG);
    } else {
        s->body += len;
    }
}

/* A connected pair: ours in fd[0], non-blocking; the daemon's in fd[1]. */
static void make_pair(int fd[2])
{
    if (!opt.tcp) {
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fd))
            die("socketpair");
        return;
    }
    fd[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd[0] < 0 || connect(fd[0], (void *)&listener_addr, sizeof listener_addr))
        die("connect to the own listener");
    fd[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd[1] < 0)
        die("accept");
}

static void watch(struct stream *s, uint32_t index)
{
    struct epoll_event ev = { .events = EPOLLIN | EPOLLRDHUP, .data.u32 = index };
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, s->fd, &ev))
        die("epoll_ctl");
}

/* One sendmsg of data and fd over the connected socket. */
static bool pass(int conn, int fd, struct stream *s)
{
    union { struct cmsghdr c; char space[CMSG_SPACE(sizeof(int))]; } control = { 0 };
    struct iovec iov = { opt.data, opt.data_len };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
    control.c = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS };
    memcpy(CMSG_DATA(&control.c), &fd, sizeof fd);
    s->sent = now();
    return sendmsg(conn, &m, MSG_NOSIGNAL) == (ssize_t)opt.data_len;
}

static void number_data(void)
{
    if (opt.number) {
        char number[16];
        snprintf(number, sizeof number, "%06u", next % 1000000);
        memcpy(opt.number, number, 6);
    }
}

/* Asks for the next stream by HTTP. False: the server's backlog is full, try again in RETRY_NS. */
static bool ask(int64_t due)
{
    struct stream *s = &streams[next];
    s->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (s->fd < 0)
        die("socket");
    s->sent = now();
    bool ok = !connect(s->fd, (void *)&opt.daemon, sizeof opt.daemon);
    if (!ok && errno == EAGAIN) {
        close(s->fd);
        retries++;
        return false;
    }
    number_data();
    if (ok && send(s->fd, opt.data, opt.data_len, MSG_NOSIGNAL) == (ssize_t)opt.data_len) {
        s->out.late = s->sent - due;
        watch(s, next);
    } else {
        explain(s, strerror(errno), "", 0);
        end(s, UNSENT);
    }
    next++;
    return true;
}

/* A connection to the daemon; -1 and errno when there is none to be had. */
static int connect_daemon(void)
{
    int conn = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (conn < 0)
        die("socket");
    if (!connect(conn, (void *)&opt.daemon, sizeof opt.daemon))
        return conn;
    int why = errno;
    close(conn);
    errno = why;
    return -1;
}

/* By the kept connection. False: there is none, or the daemon has closed it. */
static bool pass_by_kept(struct stream *s)
{
    if (kept < 0)
        return false;
    if (pass(kept, pending, s))
        return true;
    close(kept);
    kept = -1;
    return false;
}

/* Hands the next stream over. False: the daemon's backlog is full, try again in RETRY_NS. */
static bool hand_over(int64_t due)
{
    struct stream *s = &streams[next];
    if (pending < 0) {
        int pair[2];
        make_pair(pair);
        s->fd = pair[0];
        pending = pair[1];
        watch(s, next);
    }
    number_data();
    bool ok = pass_by_kept(s);
    int conn = ok ? -1 : connect_daemon();
    if (!ok && conn < 0 && errno == EAGAIN) {
        retries++;
        return false;
    }
    if (ok || (conn >= 0 && pass(conn, pending, s))) {
        s->out.late = s->sent - due;
    } else {
        explain(s, strerror(errno), "", 0);
        end(s, UNSENT);
    }
    close(pending);
    if (opt.persistent && conn >= 0)
        kept = conn;
    else if (conn >= 0)
        close(conn);
    pending = -1;
    next++;
    return true;
}

static void run(void)
{
    int64_t start = now(), retry_at = 0, give_up = start + opt.over + opt.timeout;
    while (ended < opt.count) {
        int64_t t = now(), wake = give_up;
        for (int burst = 0; next < opt.count; burst++) {
            int64_t due = start + opt.over * next / opt.count;
            wake = due > retry_at ? due : retry_at;
            if (wake > t || burst == BURST)
                break;
            if (!(opt.http ? ask(due) : hand_over(due)))
                retry_at = now() + RETRY_NS;
            wake = give_up;
        }
        announce();
        t = now();
        if (t >= give_up)
            break;
        int64_t left = wake > t ? wake - t : 0;
        struct timespec timeout = { left / (1000 * MS), left % (1000 * MS) };
        struct epoll_event evs[256];
        int n = epoll_pwait2(epoll, evs, 256, &timeout, NULL);
        if (n < 0 && errno != EINTR)
            die("epoll_pwait2");
        for (int i = 0; i < n; i++)
            read_stream(&streams[evs[i].data.u32]);
    }
    for (uint32_t i = 0; i < opt.count; i++)
        if (streams[i].out.fate == RUNNING) {
            explain(&streams[i], "timed out", "", 0);
            end(&streams[i], i < next ? TIMED_OUT : UNSENT);
        }
    announce();
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    double cpu = u.ru_utime.tv_sec + u.ru_stime.tv_sec + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
    double secs = (now() - start) / 1e9;
    FILE *f = fopen(opt.result, "wb");
    if (!f)
        die(opt.result);
    for (uint32_t i = 0; i < opt.count; i++)
        if (fwrite(&streams[i].out, sizeof streams[i].out, 1, f) != 1)
            die(opt.result);
    if (fclose(f))
        die(opt.result);
    printf("done {\"secs\": %.6f, \"cpu_secs\": %.6f, \"live_peak\": %u, \"connect_retries\": %u}\n", secs, cpu, live_peak,
           retries);
}

static char *slurp(const char *path, size_t *len)
{
    struct stat st;
    FILE *f = fopen(path, "rb");
    if (!f || fstat(fileno(f), &st))
        die(path);
    char *bytes = malloc(st.st_size + 1);
    if (!bytes || fread(bytes, 1, st.st_size, f) != (size_t)st.st_size)
        die(path);
    fclose(f);
    *len = st.st_size;
    return bytes;
}

static void listen_for_own_clients(void)
{
    socklen_t len = sizeof listener_addr;
    listener_addr = (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (void *)&listener_addr, len) || listen(listener, 64) ||
        getsockname(listener, (void *)&listener_addr, &len))
        die("listener");
}

static void parse(int argc, char **argv)
{
    int c;
    while ((c = getopt(argc, argv, "tup")) != -1)
        if (c == 't')
            opt.tcp = true;
        else if (c == 'u')
            opt.http = true;
        else if (c == 'p')
            opt.persistent = true;
        else
            exit(2);
    if (argc - optind != 7 || strlen(argv[optind]) >= sizeof opt.daemon.sun_path) {
        fprintf(stderr, "usage: load [-t | -u] [-p] SOCKET STREAMS OVER_MS TIMEOUT_MS DATA BODY RESULT\n"
                        "  -t           TCP clients over the loopback, not AF_UNIX pairs\n"
                        "  -u           SOCKET is that of an HTTP server, DATA a request\n"
                        "  -p           one connection for all handoffs, not one for each\n"
                        "  TIMEOUT_MS   after OVER_MS, when streams that have not ended are given up\n"
                        "  DATA         the handoff data; ###### in it becomes the stream's number\n"
                        "  BODY         file: what each stream must say after its head\n"
                        "  RESULT       file: where the records go\n");
        exit(2);
    }
    argv += optind;
    opt.daemon.sun_family = AF_UNIX;
    strcpy(opt.daemon.sun_path, argv[0]);
    opt.count = strtoul(argv[1], NULL, 10);
    opt.over = atof(argv[2]) * MS;
    opt.timeout = atof(argv[3]) * MS;
    opt.data = argv[4];
    opt.data_len = strlen(opt.data);
    opt.number = strstr(opt.data, "######");
    opt.body = slurp(argv[5], &opt.body_len);
    opt.result = argv[6];
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_TIMERSLACK, 1UL, 0, 0, 0); /* wake at the nanosecond asked for, not up to 50 us later */
    struct rlimit fds;
    getrlimit(RLIMIT_NOFILE, &fds);
    fds.rlim_cur = fds.rlim_max;
    setrlimit(RLIMIT_NOFILE, &fds);
    if (fds.rlim_cur < opt.count + 16UL) {
        fprintf(stderr, "load: %u streams need more fds than the limit of %lu\n", opt.count, (unsigned long)fds.rlim_cur);
        return 2;
    }
    if (opt.tcp)
        listen_for_own_clients();
    epoll = epoll_create1(EPOLL_CLOEXEC);
    streams = malloc(opt.count * sizeof *streams);
    if (epoll < 0 || !streams)
        die("set-up");
    for (uint32_t i = 0; i < opt.count; i++) /* written to, so that no page fault falls into the measurement */
        streams[i] = (struct stream){ .out = { .ttfb = -1, .tail = -1, .fate = RUNNING }, .fd = -1 };
    char line[16];
    puts("ready");
    if (!fgets(line, sizeof line, stdin))
        return 2;
    run();
    return 0;
}
