// A client of the HTTP API that takes next to nothing itself: keep-alive HTTP/1.1 over many connections, one thread,
// epoll. Every request differs in its device token and in a sequence number of 10 digits, by which the far side's log
// (`sink -o`) tells when the notification came out at the other end. Both logs read CLOCK_MONOTONIC.
//
// Without -r each connection sends again as soon as it was answered. With -r PER_SECOND requests have a timetable, and
// a request that was due while no connection was free counts from when it was due: a server that stands still must not
// slow down the questions (coordinated omission). Otherwise the clock is read right before the request is handed to the
// kernel in one piece, so that what this program itself is late does not count; it is told apart.
//
// usage: load -p PORT -q REQUEST_FILE -s OFFSET [-s OFFSET] -t OFFSET -d TOKENS_FILE -o LOG [-c CONNECTIONS] [-n NUMBER]
//             [-f FIRST_SEQUENCE_NUMBER] [-r PER_SECOND]
// The request file holds headers and body of one request; at the offsets stand sequence numbers and a token, which are
// overwritten with others of the same length. The log is an array of `Entry`. Prints one line of JSON.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define DIGITS 10
#define PLACES 2                 // where the sequence number stands, at most
#define ANSWER_SIZE 65536
#define PATIENCE_MS 30000        // without any answer
#define MAX_CONNECTIONS 4096

typedef struct {
    uint64_t began_ns, answered_ns, late_ns;
    uint32_t sequence, status;
} Entry;

typedef struct {
    int fd;
    uint32_t entry;              // the request that is being answered
    uint64_t free_since_ns;
    size_t length;
    char answer[ANSWER_SIZE + 1];
} Connection;

static char *request;
static size_t request_length, sequence_at[PLACES], places, token_at, token_length, tokens;
static char **token;
static Entry *entries;
static uint32_t number = 1000, first_sequence, sent, answered;
static Connection *idle[MAX_CONNECTIONS];  // ring: the one that has waited longest is next
static size_t idle_first, idle_count, connections = 64;

static void fail(const char *what, const char *detail) {
    fprintf(stderr, "%s%s%.500s\n", what, detail ? ": " : "", detail ? detail : "");
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static double cpu_s(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static char *whole_file(const char *path, size_t *length) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path, strerror(errno));
    fseek(file, 0, SEEK_END);
    *length = ftell(file);
    rewind(file);
    char *content = malloc(*length + 1);
    if (!content || fread(content, 1, *length, file) != *length) fail(path, "cannot be read");
    content[*length] = 0;
    fclose(file);
    return content;
}

static void read_tokens(const char *path) {
    size_t length;
    char *content = whole_file(path, &length), *rest = content;
    token = malloc((length / 2 + 1) * sizeof *token);
    for (char *line; (line = strsep(&rest, "\n"));)
        if (*line) token[tokens++] = line;
    if (!tokens) fail(path, "no tokens");
    token_length = strlen(token[0]);
    for (size_t i = 0; i < tokens; i++)
        if (strlen(token[i]) != token_length) fail(path, "tokens of different lengths");
}

static void become_idle(Connection *c, uint64_t now) {
    c->free_since_ns = now;
    c->length = 0;
    idle[(idle_first + idle_count++) % MAX_CONNECTIONS] = c;
}

// `due_ns` is 0 where there is no timetable.
static void send_next(uint64_t due_ns) {
    Connection *c = idle[idle_first];
    idle_first = (idle_first + 1) % MAX_CONNECTIONS, idle_count--;
    uint32_t sequence = first_sequence + sent, rest = sequence;
    for (int i = DIGITS - 1; i >= 0; i--, rest /= 10)
        for (size_t place = 0; place < places; place++) request[sequence_at[place] + i] = '0' + rest % 10;
    memcpy(request + token_at, token[sequence % tokens], token_length);
    c->entry = sent;
    Entry *e = &entries[sent++];
    uint64_t now = now_ns();
    int waited_for_server = due_ns && c->free_since_ns > due_ns;
    e->began_ns = waited_for_server ? due_ns : now;
    e->late_ns = due_ns && !waited_for_server ? now - due_ns : 0;
    e->sequence = sequence;
    if (send(c->fd, request, request_length, MSG_NOSIGNAL) != (ssize_t)request_length) fail("send", strerror(errno));
}

static void on_readable(Connection *c) {
    ssize_t n = recv(c->fd, c->answer + c->length, ANSWER_SIZE - c->length, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) fail("the server hung up", n < 0 ? strerror(errno) : NULL);
    c->length += n;
    c->answer[c->length] = 0;
    char *end = strstr(c->answer, "\r\n\r\n");
    if (!end) return;
    char *field = strcasestr(c->answer, "\r\ncontent-length:");
    if (!field || field > end) fail("an answer without Content-Length", c->answer);
    size_t whole = end + 4 - c->answer + strtoul(field + 17, NULL, 10);
    if (whole > ANSWER_SIZE || c->length > whole) fail("an answer that is too long", c->answer);
    if (c->length < whole) return;
    Entry *e = &entries[c->entry];
    e->answered_ns = now_ns();
    e->status = strtoul(c->answer + 9, NULL, 10);  // "HTTP/1.1 202 "
    if (e->status / 100 != 2) fail("the server refused", c->answer);
    answered++;
    become_idle(c, e->answered_ns);
}

static void connect_one(int epoll, int port) {
    Connection *c = calloc(1, sizeof *c);
    if (!c) abort();
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(c->fd, (void *)&address, sizeof address)) fail("connect", strerror(errno));
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
    become_idle(c, now_ns());
}

int main(int argc, char **argv) {
    int port = 0, option;
    double rate = 0;
    const char *request_file = NULL, *tokens_file = NULL, *log = NULL;
    while ((option = getopt(argc, argv, "p:q:s:t:d:o:c:n:f:r:")) != -1) switch (option) {
        case 'p': port = atoi(optarg); break;
        case 'q': request_file = optarg; break;
        case 's':
            if (places == PLACES) fail("too many offsets", NULL);
            sequence_at[places++] = strtoul(optarg, NULL, 10);
            break;
        case 't': token_at = strtoul(optarg, NULL, 10); break;
        case 'd': tokens_file = optarg; break;
        case 'o': log = optarg; break;
        case 'c': connections = strtoul(optarg, NULL, 10); break;
        case 'n': number = strtoul(optarg, NULL, 10); break;
        case 'f': first_sequence = strtoul(optarg, NULL, 10); break;
        case 'r': rate = atof(optarg); break;
        default: return 2;
    }
    if (!port || !request_file || !tokens_file || !log || !number || !connections || connections > MAX_CONNECTIONS)
        fail("usage: load -p PORT -q REQUEST -s OFFSET -t OFFSET -d TOKENS -o LOG [-c N] [-n N] [-f N] [-r N]", NULL);
    request = whole_file(request_file, &request_length);
    read_tokens(tokens_file);
    for (size_t place = 0; place < places; place++)
        if (sequence_at[place] + DIGITS > request_length) fail("bad offsets", NULL);
    if (!places || token_at + token_length > request_length) fail("bad offsets", NULL);
    entries = calloc(number, sizeof *entries);
    if (!entries) abort();

    int epoll = epoll_create1(0), timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[256];
    epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &event);
    for (size_t i = 0; i < connections; i++) connect_one(epoll, port);

    double cpu_before = cpu_s();
    uint64_t start = now_ns(), armed = 0;
    while (answered < number) {
        uint64_t due = 0;
        while (sent < number && idle_count) {
            due = rate > 0 ? start + (uint64_t)(sent / rate * 1e9) : 0;
            if (due > now_ns()) break;
            send_next(due);
            due = 0;
        }
        if (due && due != armed) {
            struct itimerspec when = {.it_value = {.tv_sec = due / 1000000000, .tv_nsec = due % 1000000000}};
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
            armed = due;
        }
        int n = epoll_wait(epoll, events, 256, PATIENCE_MS);
        if (n < 0 && errno != EINTR) fail("epoll_wait", strerror(errno));
        if (n == 0) fail("no answer for 30 s", NULL);
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr) {
                on_readable(events[i].data.ptr);
                continue;
            }
            uint64_t expirations;
            if (read(timer, &expirations, sizeof expirations) < 0 && errno != EAGAIN) fail("timer", strerror(errno));
        }
    }
    double cpu = cpu_s() - cpu_before;
    FILE *file = fopen(log, "wb");
    if (!file || fwrite(entries, sizeof *entries, number, file) != number || fclose(file)) fail(log, "cannot be written");
    printf("{\"cpu\": %.6f}\n", cpu);
    return 0;
}
