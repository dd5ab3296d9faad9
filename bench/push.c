// An APNs client that takes next to nothing itself: HTTP/2 over TLS by libnghttp2 and OpenSSL, many streams on a few
// connections, one thread, epoll. Every request differs in its device token and in a sequence number of 10 digits, by
// which the far side's log (`sink -o`) tells that it arrived once.
//
// Without -r there are always as many requests open as there may be. With -r PER_SECOND requests have a timetable, as in
// load.c: one that was due while no stream was free counts from when it was due (coordinated omission); otherwise the
// clock is read right before the request is made, so that what this program itself is late does not count; that is told
// apart. An answer counts from when its octets were read from the socket.
//
// usage: push -p PORT -a CA.pem -j PROVIDER_TOKEN_FILE -t TOPIC -b PAYLOAD_FILE -s OFFSET -d TOKENS_FILE -o LOG
//             [-c CONNECTIONS] [-m STREAMS] [-n NUMBER] [-f FIRST_SEQUENCE_NUMBER] [-r PER_SECOND]
// At the payload's OFFSET stands the sequence number. The log is an array of `Entry`. Prints one line of JSON.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define DIGITS 10
#define PATIENCE_MS 30000        // without any answer
#define MAX_CONNECTIONS 1024
#define READ_SIZE 65536
#define MAX_FRAME 16393         // with its head

typedef struct {
    uint64_t began_ns, answered_ns, late_ns;
    uint32_t sequence, status;
} Entry;

typedef struct {
    int fd, waits_to_write;
    SSL *ssl;
    nghttp2_session *session;
    size_t open;
    uint8_t *out;                // what the socket did not take yet
    size_t out_length;
} Connection;

static char *payload, *authorization;
static const char *topic;
static size_t payload_length, sequence_at, tokens;
static char **token;
static Entry *entries;
static uint32_t number = 1000, first_sequence, sent, answered;
static Connection *all[MAX_CONNECTIONS];
static size_t connections = 8, streams = 100, next_connection, open_streams;
static uint64_t read_ns, free_since_ns;  // when the octets in hand were read; since when there is a free stream
static int epoll;

static void fail(const char *what, const char *detail) {
    fprintf(stderr, "%s%s%.500s\n", what, detail ? ": " : "", detail ? detail : "");
    exit(1);
}

static void fail_tls(const char *what) {
    fail(what, ERR_reason_error_string(ERR_get_error()));
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
}

// ---------------------------------------------------------------------------------------------------- requests

static ssize_t give_payload(nghttp2_session *session, int32_t stream, uint8_t *buffer, size_t length, uint32_t *flags,
                            nghttp2_data_source *source, void *c) {
    (void)session, (void)stream, (void)c;
    if (length < payload_length) fail("a payload that does not fit into one frame", NULL);
    memcpy(buffer, payload, payload_length);
    uint32_t rest = source->fd;
    for (int i = DIGITS - 1; i >= 0; i--, rest /= 10) buffer[sequence_at + i] = '0' + rest % 10;
    *flags |= NGHTTP2_DATA_FLAG_EOF;
    return payload_length;
}

static nghttp2_nv field(const char *name, const char *value, size_t length) {
    return (nghttp2_nv){(uint8_t *)name, (uint8_t *)value, strlen(name), length,
                        NGHTTP2_NV_FLAG_NO_COPY_NAME};
}

// `due_ns` is 0 where there is no timetable.
static void send_next(uint64_t due_ns) {
    Connection *c;
    do c = all[next_connection++ % connections];
    while (c->open == streams);
    uint32_t sequence = first_sequence + sent;
    Entry *e = &entries[sent];
    uint64_t now = now_ns();
    int waited_for_server = due_ns && free_since_ns > due_ns;
    e->began_ns = waited_for_server ? due_ns : now;
    e->late_ns = due_ns && !waited_for_server ? now - due_ns : 0;
    e->sequence = sequence;
    char path[256];
    int length = snprintf(path, sizeof path, "/3/device/%s", token[sequence % tokens]);
#define FIELD(name, value) field(name, value, strlen(value))
    const nghttp2_nv fields[] = {
        FIELD(":method", "POST"), FIELD(":scheme", "https"), FIELD(":authority", "localhost"),
        field(":path", path, length), FIELD("authorization", authorization), FIELD("apns-topic", topic),
        FIELD("apns-push-type", "alert"), FIELD("apns-priority", "10"), FIELD("apns-expiration", "0"),
    };
    const nghttp2_data_provider body = {.source.fd = sequence, .read_callback = give_payload};
    int32_t stream = nghttp2_submit_request(c->session, NULL, fields, sizeof fields / sizeof *fields, &body, e);
    if (stream < 0) fail("a request was not taken", nghttp2_strerror(stream));
    c->open++, open_streams++, sent++;
}

static int on_field(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_length,
                    const uint8_t *value, size_t length, uint8_t flags, void *c) {
    (void)flags, (void)c;
    if (name_length == 7 && !memcmp(name, ":status", 7) && length == 3) {
        Entry *e = nghttp2_session_get_stream_user_data(session, frame->hd.stream_id);
        e->status = (value[0] - '0') * 100 + (value[1] - '0') * 10 + value[2] - '0';
    }
    return 0;
}

static int on_body(nghttp2_session *session, uint8_t flags, int32_t stream, const uint8_t *data, size_t length, void *c) {
    (void)session, (void)flags, (void)stream, (void)c;
    fprintf(stderr, "%.*s\n", (int)length, data);  // there is one only where the answer is no
    return 0;
}

static int on_end(nghttp2_session *session, int32_t stream, uint32_t code, void *connection) {
    Entry *e = nghttp2_session_get_stream_user_data(session, stream);
    Connection *c = connection;
    char text[64];
    snprintf(text, sizeof text, "status %u, code %u", e->status, code);
    if (code || e->status != 200) fail("a request was refused", text);
    e->answered_ns = read_ns;
    answered++;
    if (open_streams-- == connections * streams) free_since_ns = read_ns;
    c->open--;
    return 0;
}

// ---------------------------------------------------------------------------------------------------- the socket

static void wait_to_write(Connection *c, int on) {
    if (c->waits_to_write == on) return;
    c->waits_to_write = on;
    struct epoll_event event = {.events = EPOLLIN | (on ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event);
}

// Whether all of it went out.
static int write_out(Connection *c, const uint8_t *data, size_t length) {
    ERR_clear_error();
    int n = SSL_write(c->ssl, data, length);
    if (n <= 0 && SSL_get_error(c->ssl, n) != SSL_ERROR_WANT_WRITE) fail_tls("writing");
    wait_to_write(c, n <= 0);
    return n > 0;
}

static void flush(Connection *c) {
    static uint8_t together[2 * MAX_FRAME];
    if (c->out_length) {
        if (!write_out(c, c->out, c->out_length)) return;
        c->out_length = 0;
    }
    for (;;) {  // many requests in one TLS record
        size_t length = 0;
        const uint8_t *part;
        for (ssize_t n; length < MAX_FRAME && (n = nghttp2_session_mem_send(c->session, &part)) > 0; length += n) {
            if (n > MAX_FRAME) fail("a frame that is too long", NULL);
            memcpy(together + length, part, n);
        }
        if (!length) return;
        if (write_out(c, together, length)) continue;
        if (!c->out) c->out = malloc(sizeof together);
        memcpy(c->out, together, c->out_length = length);
        return;
    }
}

static void on_readable(Connection *c) {
    static uint8_t in[READ_SIZE];
    for (;;) {
        ERR_clear_error();
        int n = SSL_read(c->ssl, in, sizeof in);
        if (n <= 0) {
            int why = SSL_get_error(c->ssl, n);
            if (why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE) return;
            fail("the server hung up", why == SSL_ERROR_SYSCALL ? strerror(errno) : NULL);
        }
        read_ns = now_ns();
        ssize_t used = nghttp2_session_mem_recv(c->session, in, n);
        if (used < 0) fail("the server", nghttp2_strerror(used));
    }
}

static void connect_one(SSL_CTX *tls, const nghttp2_session_callbacks *callbacks, int port) {
    Connection *c = all[next_connection++] = calloc(1, sizeof *c);
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(c->fd, (void *)&address, sizeof address)) fail("connect", strerror(errno));
    c->ssl = SSL_new(tls);
    SSL_set_fd(c->ssl, c->fd);
    SSL_set_tlsext_host_name(c->ssl, "localhost");
    if (SSL_connect(c->ssl) != 1) fail_tls("TLS handshake");
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    nghttp2_session_client_new(&c->session, callbacks, c);
    const nghttp2_settings_entry no_push = {NGHTTP2_SETTINGS_ENABLE_PUSH, 0};
    nghttp2_submit_settings(c->session, 0, &no_push, 1);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
    flush(c);
}

static void connect_all(const char *ca, int port) {
    SSL_CTX *tls = SSL_CTX_new(TLS_client_method());
    if (!tls || SSL_CTX_load_verify_file(tls, ca) != 1) fail_tls(ca);
    SSL_CTX_set_verify(tls, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_alpn_protos(tls, (const uint8_t *)"\x02h2", 3);
    SSL_CTX_set_mode(tls, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(tls, 1);
    nghttp2_session_callbacks *callbacks;
    nghttp2_session_callbacks_new(&callbacks);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_field);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_body);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_end);
    for (size_t i = 0; i < connections; i++) connect_one(tls, callbacks, port);
    for (size_t i = 0; i < connections; i++)  // until the server's SETTINGS are there, its limits are not known
        while (nghttp2_session_get_remote_settings(all[i]->session, NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS) > 100000) {
            struct epoll_event event;
            if (epoll_wait(epoll, &event, 1, PATIENCE_MS) != 1) fail("no SETTINGS for 30 s", NULL);
            on_readable(event.data.ptr);
            flush(event.data.ptr);
        }
}

int main(int argc, char **argv) {
    int port = 0, option;
    double rate = 0;
    size_t length;
    const char *ca = NULL, *token_file = NULL, *payload_file = NULL, *tokens_file = NULL, *log = NULL;
    while ((option = getopt(argc, argv, "p:a:j:t:b:s:d:o:c:m:n:f:r:")) != -1) switch (option) {
        case 'p': port = atoi(optarg); break;
        case 'a': ca = optarg; break;
        case 'j': token_file = optarg; break;
        case 't': topic = optarg; break;
        case 'b': payload_file = optarg; break;
        case 's': sequence_at = strtoul(optarg, NULL, 10); break;
        case 'd': tokens_file = optarg; break;
        case 'o': log = optarg; break;
        case 'c': connections = strtoul(optarg, NULL, 10); break;
        case 'm': streams = strtoul(optarg, NULL, 10); break;
        case 'n': number = strtoul(optarg, NULL, 10); break;
        case 'f': first_sequence = strtoul(optarg, NULL, 10); break;
        case 'r': rate = atof(optarg); break;
        default: return 2;
    }
    if (!port || !ca || !token_file || !topic || !payload_file || !tokens_file || !log || !number || !streams ||
        !connections || connections > MAX_CONNECTIONS)
        fail("usage: push -p PORT -a CA -j TOKEN -t TOPIC -b PAYLOAD -s OFFSET -d TOKENS -o LOG [-c N] [-m N] [-n N] "
             "[-f N] [-r N]", NULL);
    payload = whole_file(payload_file, &payload_length);
    if (sequence_at + DIGITS > payload_length) fail("a bad offset", NULL);
    if (asprintf(&authorization, "bearer %s", whole_file(token_file, &length)) < 0) abort();
    read_tokens(tokens_file);
    entries = calloc(number, sizeof *entries);
    if (!entries) abort();
    epoll = epoll_create1(0);
    connect_all(ca, port);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[256];
    epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &event);

    double cpu_before = cpu_s();
    uint64_t start = now_ns(), armed = 0;
    while (answered < number) {
        uint64_t due = 0;
        while (sent < number && open_streams < connections * streams) {
            due = rate > 0 ? start + (uint64_t)(sent / rate * 1e9) : 0;
            if (due > now_ns()) break;
            send_next(due);
            due = 0;
        }
        for (size_t i = 0; i < connections; i++)
            if (!all[i]->waits_to_write && nghttp2_session_want_write(all[i]->session)) flush(all[i]);
        if (due && due != armed) {
            struct itimerspec when = {.it_value = {.tv_sec = due / 1000000000, .tv_nsec = due % 1000000000}};
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
            armed = due;
        }
        int n = epoll_wait(epoll, events, 256, PATIENCE_MS);
        if (n < 0 && errno != EINTR) fail("epoll_wait", strerror(errno));
        if (n == 0) fail("no answer for 30 s", NULL);
        for (int i = 0; i < n; i++) {
            Connection *c = events[i].data.ptr;
            if (c) {
                on_readable(c);
                if (events[i].events & EPOLLOUT) flush(c);
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
