/* Feeds the C parser of ACLs from a pipe, to be built with sanitizers: see fuzz_acls.py.
 *
 * In: u16 length and bytes of the access ACL, the same of the default ACL. Out: i32 errno, u32 length, the items.
 */
#include "../../pxar/_metadata.c"

#include <stdio.h>

/* A copy of its own size, so that a read beyond its end is one beyond the end of an allocation. */
static Bytes
taken(void)
{
    Bytes raw = {0};
    uint16_t length;
    if (fread(&length, sizeof length, 1, stdin) != 1) exit(0);
    raw.data = malloc(length);
    raw.used = raw.room = length;
    if (!raw.data || fread(raw.data, 1, length, stdin) != length) exit(1);
    return raw;
}

int
main(void)
{
    for (;;) {
        Bytes access = taken(), standard = taken(), out = {0};
        int32_t error = put_acl(&out, &access, 0);
        if (!error) error = put_acl(&out, &standard, 1);
        uint32_t length = error ? 0 : (uint32_t)out.used;
        fwrite(&error, sizeof error, 1, stdout);
        fwrite(&length, sizeof length, 1, stdout);
        if (length) fwrite(out.data, 1, length, stdout);
        free(access.data);
        free(standard.data);
        free(out.data);
    }
}
