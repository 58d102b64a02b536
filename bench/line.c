/* A line between a client and a server on loopback: line PORT DELAY_US BYTES_PER_S
 *
 * Each connection is passed on to 127.0.0.1:PORT. Every byte, in either direction, takes its turn on a line of
 * BYTES_PER_S (0: any number) and comes DELAY_US microseconds later. Prints {"port": N} when it is ready, and ends with
 * SIGTERM or with its standard input.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* Bytes on the way in one direction, at most, and in one piece. The longest line here holds 10 MB. */
enum { RING = 32 << 20, PIECE = 256 << 10, PIECES = 1 << 16 };
/* What may wait for its turn on the line, as in a router's queue. */
static const uint64_t QUEUE_NS = 20000000;

static uint64_t delay_ns, rate;
static int port;

/* One direction of a connection. */
struct way {
    int from, to;
    char *ring;
    uint64_t taken, given;               /* bytes so far */
    struct { uint64_t due; uint32_t size; } pieces[PIECES];
    uint64_t first, last;                /* pieces so far */
    int ended;
    pthread_mutex_t lock;
    pthread_cond_t moved;
};

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void sleep_until(uint64_t due) {
    struct timespec at = {due / 1000000000, due % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL)) {}
}

static void *take(void *given) {
    struct way *way = given;
    uint64_t free_at = 0;
    for (;;) {
        pthread_mutex_lock(&way->lock);
        while (way->taken - way->given == RING || way->last - way->first == PIECES)
            pthread_cond_wait(&way->moved, &way->lock);
        uint64_t start = way->taken % RING, room = RING - (way->taken - way->given);
        pthread_mutex_unlock(&way->lock);
        if (room > RING - start) room = RING - start;
        if (room > PIECE) room = PIECE;
        ssize_t got = recv(way->from, way->ring + start, room, 0);
        uint64_t now = now_ns();
        if (got > 0) {
            if (free_at < now) free_at = now;
            if (rate) free_at += (uint64_t)got * 1000000000 / rate;
        }
        pthread_mutex_lock(&way->lock);
        if (got > 0) {
            way->pieces[way->last % PIECES].due = free_at + delay_ns;
            way->pieces[way->last++ % PIECES].size = got;
            way->taken += got;
        } else {
            way->ended = 1;
        }
        pthread_cond_broadcast(&way->moved);
        pthread_mutex_unlock(&way->lock);
        if (got <= 0) return NULL;
        if (free_at > now + QUEUE_NS) sleep_until(free_at - QUEUE_NS);
    }
}

static void *give(void *given) {
    struct way *way = given;
    for (;;) {
        pthread_mutex_lock(&way->lock);
        while (way->first == way->last && !way->ended) pthread_cond_wait(&way->moved, &way->lock);
        int done = way->first == way->last;
        uint64_t due = way->pieces[way->first % PIECES].due, start = way->given % RING;
        uint32_t size = done ? 0 : way->pieces[way->first % PIECES].size;
        pthread_mutex_unlock(&way->lock);
        if (done) break;
        sleep_until(due);
        for (uint32_t sent = 0; sent < size;) {
            ssize_t put = send(way->to, way->ring + start + sent, size - sent, MSG_NOSIGNAL);
            if (put <= 0) goto end;
            sent += put;
        }
        pthread_mutex_lock(&way->lock);
        way->first++;
        way->given += size;
        pthread_cond_broadcast(&way->moved);
        pthread_mutex_unlock(&way->lock);
    }
end:
    /* Nobody reads any more, or nobody writes: the other direction ends by itself. Its memory ends with the process. */
    shutdown(way->to, SHUT_WR);
    shutdown(way->from, SHUT_RD);
    return NULL;
}

static void start(int from, int to) {
    struct way *way = calloc(1, sizeof *way);
    if (!way || !(way->ring = malloc(RING))) abort();
    way->from = from, way->to = to;
    pthread_mutex_init(&way->lock, NULL);
    pthread_cond_init(&way->moved, NULL);
    pthread_t thread;
    if (pthread_create(&thread, NULL, take, way) || pthread_detach(thread)) abort();
    if (pthread_create(&thread, NULL, give, way) || pthread_detach(thread)) abort();
}

_Noreturn static void *accept_all(void *given) {
    int listener = *(int *)given, one = 1;
    for (;;) {
        int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC), server = socket(AF_INET, SOCK_STREAM, 0);
        struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
        address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        if (client < 0 || server < 0 || connect(server, (struct sockaddr *)&address, sizeof address)) {
            close(client), close(server);
            continue;
        }
        setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        start(client, server);
        start(server, client);
    }
}

int main(int argc, char **argv) {
    if (argc != 4) return fprintf(stderr, "usage: line PORT DELAY_US BYTES_PER_S\n"), 2;
    port = atoi(argv[1]), delay_ns = strtoull(argv[2], NULL, 10) * 1000, rate = strtoull(argv[3], NULL, 10);
    prctl(PR_SET_TIMERSLACK, 50000);
    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t length = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64)
        || getsockname(listener, (struct sockaddr *)&address, &length))
        return perror("line"), 1;
    pthread_t thread;
    if (pthread_create(&thread, NULL, accept_all, &listener)) return 1;
    printf("{\"port\": %d}\n", ntohs(address.sin_port));
    fflush(stdout);
    char byte;
    while (read(0, &byte, 1) > 0) {}
    return 0;
}
