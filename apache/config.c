/*
 * The directives: per server and per <Location>, not in .htaccess, where an application's author could widen the prefix.
 * What nobody set stays unset until a request needs it, so that merging can tell a default from a decision.
 */

#include "handoff.h"

#include <errno.h>
#include <string.h>

#include "apr_lib.h"
#include "apr_strings.h"

#define PREFIX_DEFAULT "/run/"
#define HEALTH_SOCKET_DEFAULT "/run/forkd/forkd.sock"
#define MAX_DATA_DEFAULT (1024 * 1024)
#define MAX_DATA_HIGHEST (1024 * 1024 * 1024)

static const apr_array_header_t *name_list(apr_pool_t *pool, const char *const *names, int count)
{
    apr_array_header_t *list = apr_array_make(pool, count, sizeof(const char *));
    int i;

    for (i = 0; i < count; i++)
        APR_ARRAY_PUSH(list, const char *) = names[i];
    return list;
}

void *handoff_conf_create(apr_pool_t *pool, char *dir)
{
    handoff_conf *conf = apr_pcalloc(pool, sizeof(*conf));

    (void)dir;
    conf->enabled = conf->connect_timeout_ms = conf->send_timeout_ms = conf->max_retries = conf->format = -1;
    conf->persistent = conf->fallback = -1;
    conf->max_data = -1;
    return conf;
}

void *handoff_conf_merge(apr_pool_t *pool, void *base, void *over)
{
    handoff_conf *conf = apr_pmemdup(pool, base, sizeof(*conf));
    const handoff_conf *add = over;

#define MERGE(field, unset) \
    if (add->field != (unset)) \
    conf->field = add->field
    MERGE(enabled, -1);
    MERGE(connect_timeout_ms, -1);
    MERGE(send_timeout_ms, -1);
    MERGE(max_retries, -1);
    MERGE(format, -1);
    MERGE(persistent, -1);
    MERGE(fallback, -1);
    MERGE(max_data, -1);
    MERGE(prefix, NULL);
    MERGE(health_socket, NULL);
    MERGE(response_headers, NULL);
    MERGE(request_headers, NULL);
#undef MERGE
    return conf;
}

const handoff_conf *handoff_conf_get(request_rec *r)
{
    static const char *const all[] = {"all"};
    static const char *const request[] = {"traceparent", "last-event-id", "accept-language"};
    handoff_conf *conf = apr_pmemdup(
        r->pool, ap_get_module_config(r->per_dir_config, &socket_handoff_module), sizeof(*conf));

#define DEFAULT(field, unset, value) \
    if (conf->field == (unset)) \
    conf->field = (value)
    DEFAULT(enabled, -1, 1);
    DEFAULT(connect_timeout_ms, -1, 100);
    DEFAULT(send_timeout_ms, -1, 200);
    DEFAULT(max_retries, -1, 2);
    DEFAULT(format, -1, FORMAT_RAW);
    DEFAULT(persistent, -1, 0);
    DEFAULT(fallback, -1, FALLBACK_ERROR);
    DEFAULT(max_data, -1, MAX_DATA_DEFAULT);
    DEFAULT(prefix, NULL, PREFIX_DEFAULT);
    DEFAULT(health_socket, NULL, HEALTH_SOCKET_DEFAULT);
    DEFAULT(response_headers, NULL, name_list(r->pool, all, 1));
    DEFAULT(request_headers, NULL, name_list(r->pool, request, 3));
#undef DEFAULT
    return conf;
}

/* NULL, or what is wrong with the argument of a numeric directive. */
static const char *parse_number(cmd_parms *cmd, const char *arg, apr_int64_t low, apr_int64_t high,
                                apr_int64_t *value)
{
    char *end;

    errno = 0;
    *value = apr_strtoi64(arg, &end, 10);
    if (errno || end == arg || *end || *value < low || *value > high)
        return apr_psprintf(cmd->pool, "%s must be a whole number from %" APR_INT64_T_FMT " to %" APR_INT64_T_FMT
                            ", not \"%s\"", cmd->cmd->name, low, high, arg);
    return NULL;
}

/* `info` is the offset of the field: milliseconds, 1 ms to a minute. */
static const char *set_timeout(cmd_parms *cmd, void *conf, const char *arg)
{
    apr_int64_t value;
    const char *error = parse_number(cmd, arg, 1, 60000, &value);

    if (!error)
        *(int *)((char *)conf + (apr_size_t)cmd->info) = (int)value;
    return error;
}

static const char *set_max_retries(cmd_parms *cmd, void *conf, const char *arg)
{
    apr_int64_t value;
    const char *error = parse_number(cmd, arg, 0, 10, &value);

    if (!error)
        ((handoff_conf *)conf)->max_retries = (int)value;
    return error;
}

static const char *set_max_data(cmd_parms *cmd, void *conf, const char *arg)
{
    return parse_number(cmd, arg, 1, MAX_DATA_HIGHEST, &((handoff_conf *)conf)->max_data);
}

static const char *set_path(cmd_parms *cmd, void *conf, const char *arg)
{
    if (*arg != '/')
        return apr_psprintf(cmd->pool, "%s must be an absolute path, not \"%s\"", cmd->cmd->name, arg);
    *(const char **)((char *)conf + (apr_size_t)cmd->info) = arg;
    return NULL;
}

static const char *set_format(cmd_parms *cmd, void *conf, const char *arg)
{
    if (!ap_cstr_casecmp(arg, "raw"))
        ((handoff_conf *)conf)->format = FORMAT_RAW;
    else if (!ap_cstr_casecmp(arg, "envelope"))
        ((handoff_conf *)conf)->format = FORMAT_ENVELOPE;
    else
        return apr_psprintf(cmd->pool, "%s must be raw or envelope, not \"%s\"", cmd->cmd->name, arg);
    return NULL;
}

static const char *set_fallback(cmd_parms *cmd, void *conf, const char *arg)
{
    if (!ap_cstr_casecmp(arg, "relay"))
        ((handoff_conf *)conf)->fallback = FALLBACK_RELAY;
    else if (!ap_cstr_casecmp(arg, "error"))
        ((handoff_conf *)conf)->fallback = FALLBACK_ERROR;
    else
        return apr_psprintf(cmd->pool, "%s must be relay or error, not \"%s\"", cmd->cmd->name, arg);
    return NULL;
}

int handoff_is_token(const char *name)
{
    const char *p;

    for (p = name; *p; p++)
        if (!apr_isalnum(*p) && !strchr("!#$%&'*+-.^_`|~", *p))
            return 0;
    return p != name;
}

/* Names in lower case; "none" alone is the empty list; "all" alone is itself where the directive knows it. */
static const char *parse_names(cmd_parms *cmd, int argc, char *const argv[], int knows_all,
                               const apr_array_header_t **list)
{
    const char **names = apr_palloc(cmd->pool, sizeof(char *) * (apr_size_t)(argc + 1));
    int i;

    if (!argc)
        return apr_psprintf(cmd->pool, "%s needs header names%s or none", cmd->cmd->name, knows_all ? ", all" : "");
    for (i = 0; i < argc; i++) {
        char *name = apr_pstrdup(cmd->pool, argv[i]);

        ap_str_tolower(name);
        if (!handoff_is_token(name))
            return apr_psprintf(cmd->pool, "%s: \"%s\" is no header name", cmd->cmd->name, argv[i]);
        if ((!strcmp(name, "all") || !strcmp(name, "none")) && (argc > 1 || (*name == 'a' && !knows_all)))
            return apr_psprintf(cmd->pool, "%s: \"%s\" cannot be used here", cmd->cmd->name, argv[i]);
        names[i] = name;
    }
    *list = name_list(cmd->pool, names, strcmp(names[0], "none") ? argc : 0);
    return NULL;
}

static const char *set_response_headers(cmd_parms *cmd, void *conf, int argc, char *const argv[])
{
    return parse_names(cmd, argc, argv, 1, &((handoff_conf *)conf)->response_headers);
}

static const char *set_request_headers(cmd_parms *cmd, void *conf, int argc, char *const argv[])
{
    return parse_names(cmd, argc, argv, 0, &((handoff_conf *)conf)->request_headers);
}

#define OFFSET(field) (void *)APR_OFFSETOF(handoff_conf, field)
#define WHERE (RSRC_CONF | ACCESS_CONF)

const command_rec handoff_directives[] = {
    AP_INIT_FLAG("SocketHandoffEnabled", ap_set_flag_slot, OFFSET(enabled), WHERE,
                 "On or Off: whether X-Socket-Handoff hands the connection off"),
    AP_INIT_TAKE1("SocketHandoffAllowedPrefix", set_path, OFFSET(prefix), WHERE,
                  "the directory that the daemon's socket must be in, symbolic links resolved"),
    AP_INIT_TAKE1("SocketHandoffConnectTimeoutMs", set_timeout, OFFSET(connect_timeout_ms), WHERE,
                  "milliseconds to wait for a place in the daemon's backlog, 1 to 60000"),
    AP_INIT_TAKE1("SocketHandoffSendTimeoutMs", set_timeout, OFFSET(send_timeout_ms), WHERE,
                  "milliseconds to wait until the daemon takes the message, 1 to 60000"),
    AP_INIT_TAKE1("SocketHandoffMaxRetries", set_max_retries, NULL, WHERE,
                  "attempts after the first while the daemon restarts, 0 to 10"),
    AP_INIT_TAKE1("SocketHandoffFormat", set_format, NULL, WHERE,
                  "raw: the data alone; envelope: the request and the response headers with it"),
    AP_INIT_FLAG("SocketHandoffPersistent", ap_set_flag_slot, OFFSET(persistent), WHERE,
                 "On or Off: whether connections to the daemon are kept for the next handoff"),
    AP_INIT_TAKE1("SocketHandoffFallback", set_fallback, NULL, WHERE,
                  "what becomes of clients under TLS or HTTP/2. relay: Apache passes the answer on; error: refused"),
    AP_INIT_TAKE_ARGV("SocketHandoffResponseHeaders", set_response_headers, NULL, WHERE,
                      "the response headers put into the envelope: all, none, or names"),
    AP_INIT_TAKE_ARGV("SocketHandoffRequestHeaders", set_request_headers, NULL, WHERE,
                      "the request headers put into the envelope: none, or names"),
    AP_INIT_TAKE1("SocketHandoffMaxData", set_max_data, NULL, WHERE, "the most handoff data accepted, in bytes"),
    AP_INIT_TAKE1("SocketHandoffHealthSocket", set_path, OFFSET(health_socket), WHERE,
                  "the socket that SetHandler socket-handoff-health asks"),
    {NULL, {NULL}, NULL, 0, RAW_ARGS, NULL},
};
