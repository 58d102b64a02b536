/* Ordered writes to one or more disks: ring SLOTS STRIDE START COUNT FILE DEVICE...
 *
 * For n = START, START+1, ... the 4 KiB block at (n % SLOTS) * STRIDE of every DEVICE is filled with n (64 bit, little
 * endian, 512 times), one device after the other, each write O_DIRECT and finished before the next begins. COUNT
 * numbers are written, 0 for "until killed". FILE gets the newest number that is on all devices, as 8 bytes
 * ("-" for none): it tells how far the writer is.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 4096, MOST_DEVICES = 8 };

int main(int argc, char **argv) {
    if (argc < 7 || argc > 6 + MOST_DEVICES) {
        fprintf(stderr, "usage: ring SLOTS STRIDE START COUNT FILE DEVICE...\n");
        return 2;
    }
    uint64_t slots = strtoull(argv[1], NULL, 10), stride = strtoull(argv[2], NULL, 10);
    uint64_t n = strtoull(argv[3], NULL, 10), count = strtoull(argv[4], NULL, 10);
    int devices = argc - 6, fds[MOST_DEVICES], told = -1;
    uint64_t *block;
    if (slots == 0 || stride % BLOCK || posix_memalign((void **)&block, BLOCK, BLOCK)) return 2;
    if (strcmp(argv[5], "-") && (told = open(argv[5], O_WRONLY | O_CREAT | O_TRUNC, 0644)) < 0) return perror(argv[5]), 1;
    for (int d = 0; d < devices; d++)
        if ((fds[d] = open(argv[6 + d], O_WRONLY | O_DIRECT)) < 0) return perror(argv[6 + d]), 1;
    for (uint64_t done = 0; count == 0 || done < count; done++, n++) {
        for (int i = 0; i < BLOCK / 8; i++) block[i] = n;
        for (int d = 0; d < devices; d++)
            if (pwrite(fds[d], block, BLOCK, (off_t)((n % slots) * stride)) != BLOCK) return perror(argv[6 + d]), 1;
        if (told >= 0 && pwrite(told, &n, sizeof n, 0) != sizeof n) return perror(argv[5]), 1;
    }
    return 0;
}
