/* Reads records (32-bit length, bytes) from stdin, writes the JSON string of each in the same form to stdout. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

size_t handoff_json_string(char *out, const char *in, size_t len);

int main(void)
{
    uint32_t len;

    while (fread(&len, sizeof(len), 1, stdin) == 1) {
        /* Exactly as large as needed, so that the sanitizer sees every byte too far. */
        char *in = malloc(len ? len : 1), *out;
        uint32_t size;

        if (!in || fread(in, 1, len, stdin) != len)
            return 1;
        size = (uint32_t)handoff_json_string(NULL, in, len);
        out = malloc(size);
        if (!out || handoff_json_string(out, in, len) != size)
            return 1;
        fwrite(&size, sizeof(size), 1, stdout);
        fwrite(out, 1, size, stdout);
        free(out);
        free(in);
    }
    return 0;
}
