/*
 * The head of a daemon's answer: what a client of HTTP/1.x would read, taken apart so that Apache can say it in its own
 * framing. The daemon is trusted with the client, but not to be free of bugs: what is not exactly a status line and
 * fields is refused as a whole (RFC 9112, 4 and 5), and no byte of it reaches the client.
 *
 * A line may end with LF alone, as scripts write it. Fields that speak of the connection are dropped: it is not the
 * client's. A body that comes in a transfer coding is refused; a daemon whose client asked for `Connection: close`, as it
 * were, has no need of one.
 */

#include "handoff.h"

#include <errno.h>
#include <string.h>

#include "apr_lib.h"
#include "apr_strings.h"

apr_size_t handoff_head_length(const char *bytes, apr_size_t len, apr_size_t seen)
{
    /* The blank line may have begun in what was looked at. */
    const char *at = bytes + (seen > 3 ? seen - 3 : 0), *end = bytes + len;

    while ((at = memchr(at, '\n', (apr_size_t)(end - at)))) {
        at++;
        if (at < end && *at == '\n')
            return (apr_size_t)(at - bytes) + 1;
        if (end - at > 1 && at[0] == '\r' && at[1] == '\n')
            return (apr_size_t)(at - bytes) + 2;
    }
    return 0;
}

/* "HTTP/1.1 200 OK": the number, or -1. */
static int parse_status(const char *line)
{
    int status;

    if (strncmp(line, "HTTP/1.", 7) || !apr_isdigit(line[7]) || line[8] != ' ')
        return -1;
    if (!apr_isdigit(line[9]) || !apr_isdigit(line[10]) || !apr_isdigit(line[11]) || (line[12] && line[12] != ' '))
        return -1;
    status = (line[9] - '0') * 100 + (line[10] - '0') * 10 + (line[11] - '0');
    return status >= 200 && status <= 599 ? status : -1;
}

static int parse_length(const char *value, apr_int64_t *length)
{
    apr_int64_t said;
    char *end;

    if (!apr_isdigit(*value))
        return 0;
    errno = 0;
    said = apr_strtoi64(value, &end, 10);
    if (errno || *end || (*length >= 0 && *length != said))
        return 0;
    *length = said;
    return 1;
}

static int is_about_connection(const char *name)
{
    static const char *const names[] = {"Connection", "Keep-Alive", "Proxy-Connection", "TE", "Trailer", "Upgrade",
                                        "X-Socket-Handoff", "X-Handoff-Data", "X-Handoff-Data-Source", NULL};
    int i;

    for (i = 0; names[i]; i++)
        if (!ap_cstr_casecmp(name, names[i]))
            return 1;
    return 0;
}

/* The value without the blanks around it; NULL if it holds a control character. */
static char *trim_value(char *value)
{
    char *end, *p;

    while (*value == ' ' || *value == '\t')
        value++;
    for (p = value; *p; p++)
        if (apr_iscntrl(*p) && *p != '\t')
            return NULL;
    for (end = p; end > value && (end[-1] == ' ' || end[-1] == '\t'); end--)
        ;
    *end = '\0';
    return value;
}

static const char *parse_field(apr_pool_t *pool, char *line, handoff_answer *answer)
{
    char *colon = strchr(line, ':'), *value;

    if (!colon)
        return "a line without a colon";
    *colon = '\0';
    if (!handoff_is_token(line))
        return "a field name that is none";
    value = trim_value(colon + 1);
    if (!value)
        return "a control character in a field";
    if (!ap_cstr_casecmp(line, "Transfer-Encoding"))
        return "a transfer coding";
    if (!ap_cstr_casecmp(line, "Content-Length"))
        return parse_length(value, &answer->length) ? NULL : "a Content-Length that is none";
    if (!ap_cstr_casecmp(line, "Content-Type"))
        answer->type = apr_pstrdup(pool, value);
    else if (!is_about_connection(line))
        apr_table_add(answer->headers, line, value);
    return NULL;
}

/* The line at `at`, its end cut off; *at is then the next one. */
static char *next_line(char **at)
{
    char *line = *at, *end = strchr(line, '\n');

    *at = end + 1;
    if (end > line && end[-1] == '\r')
        end--;
    *end = '\0';
    return line;
}

const char *handoff_answer_parse(apr_pool_t *pool, char *head, apr_size_t len, handoff_answer *answer)
{
    const char *fault = NULL;
    char *at = head, *line;

    if (memchr(head, '\0', len))
        return "a NUL byte";
    head[len - 1] = '\0'; /* the LF of the blank line */
    answer->type = NULL;
    answer->length = -1;
    answer->headers = apr_table_make(pool, 16);
    answer->status = strchr(at, '\n') ? parse_status(next_line(&at)) : -1;
    if (answer->status < 0)
        return "no status line";
    while (!fault && strchr(at, '\n')) {
        line = next_line(&at);
        fault = parse_field(pool, line, answer);
    }
    return fault;
}
