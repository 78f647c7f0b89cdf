/*
 * JSON strings from whatever bytes a header may hold. The result is always valid UTF-8 without a raw control
 * character, so it is valid JSON (RFC 8259) and keeps to one line. What is not UTF-8 becomes U+FFFD, one per byte.
 */

#include <stddef.h>
#include <string.h>

size_t handoff_json_string(char *out, const char *in, size_t len);

/*
 * The length of the UTF-8 sequence at s, 0 if it is none. RFC 3629: the range of the second byte is what keeps out
 * overlong forms (E0, F0), surrogates (ED) and what lies beyond U+10FFFF (F4).
 */
static size_t utf8_sequence(const unsigned char *s, size_t left)
{
    unsigned char low = 0x80, high = 0xbf;
    size_t need, i;

    if (s[0] < 0x80)
        return 1;
    if (s[0] >= 0xc2 && s[0] <= 0xdf)
        need = 2;
    else if (s[0] >= 0xe0 && s[0] <= 0xef)
        need = 3;
    else if (s[0] >= 0xf0 && s[0] <= 0xf4)
        need = 4;
    else
        return 0;
    if (left < need)
        return 0;
    switch (s[0]) {
    case 0xe0: low = 0xa0; break;
    case 0xed: high = 0x9f; break;
    case 0xf0: low = 0x90; break;
    case 0xf4: high = 0x8f; break;
    default: break;
    }
    if (s[1] < low || s[1] > high)
        return 0;
    for (i = 2; i < need; i++)
        if (s[i] < 0x80 || s[i] > 0xbf)
            return 0;
    return need;
}

/* The escape for one ASCII character into esc (at least 7 bytes); its length, 0 if it needs none. */
static size_t escape(char *esc, unsigned char ch)
{
    static const char hex[] = "0123456789abcdef";

    if (ch == '"' || ch == '\\') {
        esc[0] = '\\';
        esc[1] = (char)ch;
        return 2;
    }
    if (ch >= 0x20 && ch != 0x7f)
        return 0;
    memcpy(esc, "\\u00", 4);
    esc[4] = hex[ch >> 4];
    esc[5] = hex[ch & 15];
    return 6;
}

size_t handoff_json_string(char *out, const char *in, size_t len)
{
    const unsigned char *s = (const unsigned char *)in;
    size_t at = 0, n = 0;
    char esc[8];

    if (out)
        out[n] = '"';
    n++;
    while (at < len) {
        size_t seq = utf8_sequence(s + at, len - at);
        const char *from = in + at;
        size_t size = seq;

        if (seq == 0) {
            from = "\\ufffd";
            size = 6;
            seq = 1;
        }
        else if (seq == 1) {
            size_t escaped = escape(esc, s[at]);

            if (escaped) {
                from = esc;
                size = escaped;
            }
        }
        if (out)
            memcpy(out + n, from, size);
        n += size;
        at += seq;
    }
    if (out)
        out[n] = '"';
    return n + 1;
}
