/* How long writes take, as a guest sees it: write_latency DEVICE MIB PAUSE_US
 *
 * 4 KiB with O_DIRECT at random places of the first MIB MiB of DEVICE, one after the other, with a pause of PAUSE_US
 * microseconds between, until SIGTERM. Then: how many there were since the last SIGUSR1 (or the start), the median, the
 * 99th percentile and the worst, in microseconds, on one line.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, MOST = 1 << 20 };

static uint32_t taken[MOST];
static volatile sig_atomic_t again, ended;

static void on_signal(int number) {
    if (number == SIGUSR1) again = 1;
    else ended = 1;
}

static int by_value(const void *left, const void *right) {
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

static uint64_t now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

int main(int argc, char **argv) {
    if (argc != 4) return fprintf(stderr, "usage: write_latency DEVICE MIB PAUSE_US\n"), 2;
    uint64_t blocks = strtoull(argv[2], NULL, 10) << 8, pause = strtoull(argv[3], NULL, 10), state = 88172645463325252u;
    struct sigaction action = {.sa_handler = on_signal};
    size_t count = 0;
    char *block;
    int fd = open(argv[1], O_WRONLY | O_DIRECT);

    if (fd < 0 || !blocks || posix_memalign((void **)&block, BLOCK, BLOCK)) return perror(argv[1]), 1;
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    while (!ended) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17; /* xorshift */
        memcpy(block, &state, sizeof state);
        uint64_t started = now_us();
        if (pwrite(fd, block, BLOCK, (off_t)(state % blocks) * BLOCK) != BLOCK) return perror(argv[1]), 1;
        if (again) count = again = 0;
        else if (count < MOST) taken[count++] = (uint32_t)(now_us() - started);
        if (pause) nanosleep(&(struct timespec){pause / 1000000, pause % 1000000 * 1000}, NULL);
    }
    if (!count) return 1;
    qsort(taken, count, sizeof *taken, by_value);
    printf("%zu %u %u %u\n", count, taken[count / 2], taken[count - 1 - count / 100], taken[count - 1]);
    return 0;
}
