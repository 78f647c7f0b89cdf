/*
 * Connections to daemons that are kept for the next handoff (SocketHandoffPersistent).
 *
 * One stack per child, shared by its threads: a connection is taken off it, used, and put back, so it has one user at a
 * time, and there are as many as ever were in use at once: one, mostly, for a handoff takes microseconds. Threads come
 * and go (mod_http2's do) without taking a connection with them or leaving one behind. What is longest unused lies at
 * the bottom, and goes when the stack is full.
 *
 * Nobody watches them: one that the daemon has closed is found out by whoever sends by it, who then connects anew.
 *
 * They end with the child, and close on exec. A process forked off a child (a CGI script's, just before it is executed) has copies for a moment
 * and sends nothing by them; if it did, no message would be lost, because SEQPACKET messages are whole.
 */

#include "handoff.h"

#include <string.h>
#include <unistd.h>

#include "apr_thread_mutex.h"

#define IDLE_MAX 32

typedef struct {
    handoff_target target;
    int fd;
} idle_connection;

static struct {
    apr_thread_mutex_t *mutex; /* NULL: no child of ours yet, and nothing is kept */
    idle_connection stack[IDLE_MAX];
    int count;
} idle;

void handoff_idle_init(apr_pool_t *child)
{
    if (apr_thread_mutex_create(&idle.mutex, APR_THREAD_MUTEX_DEFAULT, child) != APR_SUCCESS)
        idle.mutex = NULL;
}

static int take_out(int index)
{
    int fd = idle.stack[index].fd;

    idle.count--;
    memmove(&idle.stack[index], &idle.stack[index + 1], sizeof(idle.stack[0]) * (size_t)(idle.count - index));
    return fd;
}

int handoff_idle_take(const handoff_target *target)
{
    int fd = -1, i;

    if (!idle.mutex)
        return -1;
    apr_thread_mutex_lock(idle.mutex);
    for (i = idle.count - 1; i >= 0 && fd < 0; i--) {
        const handoff_target *its = &idle.stack[i].target;

        if (strcmp(its->path, target->path))
            continue;
        if (its->device == target->device && its->inode == target->inode)
            fd = take_out(i);
        else
            close(take_out(i)); /* to a daemon whose socket is no longer at this path */
    }
    apr_thread_mutex_unlock(idle.mutex);
    return fd;
}

void handoff_idle_keep(const handoff_target *target, int fd)
{
    if (!idle.mutex) {
        close(fd);
        return;
    }
    apr_thread_mutex_lock(idle.mutex);
    if (idle.count == IDLE_MAX)
        close(take_out(0));
    idle.stack[idle.count].target = *target;
    idle.stack[idle.count++].fd = fd;
    apr_thread_mutex_unlock(idle.mutex);
}
