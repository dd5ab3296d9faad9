// The neutral far side of every comparison: an HTTP/2 server that looks like APNs and does as little as it can,
// so that the *client* is what is measured. TLS with ALPN h2, one thread, epoll. HPACK by libnghttp2; the frames are
// read here, because a full server library would cost more than most clients under test.
//
// Cheap, but not blind: every header block is decoded and every request checked (see `check_field`). A request that APNs
// would not understand is answered 400 and counted as bad, and the harness throws the run away: a client must not win
// by sending nonsense.
//
// A device token of the test data says its own length: its first octet is the number of its octets. So the sink sees a
// path that was cut or that ran into the next field, whatever the length.
//
// A payload with `"id":"` and 10 digits in it has a sequence number (see load.c). With -o, when each of these was read
// from the socket is kept, as an array of `Arrival`; the file is written on SIGTERM.
//
// usage: sink -c CERT.pem -k KEY.pem [-p PORT] [-l ANSWER_LATER_MS] [-m MAX_STREAMS] [-o LOG]
// Prints {"port": ...} once it listens; on SIGTERM one line of JSON with what it saw.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION };
enum { END_STREAM = 1, ACK = 1, END_HEADERS = 4, PADDED = 8, PRIORITY_FLAG = 0x20 };

#define MAX_FRAME 16384
#define MAX_BLOCK 65536          // a header block over several frames
#define IN_SIZE (1 << 18)        // holds many frames, so that one read feeds a long run of them
#define SLOTS 8192               // half-received requests of a connection; a power of two well above any stream limit
#define WINDOW (1 << 24)         // so large that flow control never decides a comparison
#define FLUSH_AT 32768           // two full TLS records: answers leave in large writes, yet never pile up
#define ID_LENGTH 36             // a UUID as text
#define SEQUENCE_MARK "\"id\":\""
#define SEQUENCE_DIGITS 10

static int answer_later_ms = 0, max_streams = 1000;
static uint64_t requests, bad_requests, connections, most_open, header_octets;
static char first_fault[200];
static volatile sig_atomic_t stopping;

typedef struct {
    uint64_t ns, sequence;       // CLOCK_MONOTONIC
} Arrival;

static const char *log_path;
static Arrival *arrivals;
static size_t arrivals_length, arrivals_size;
static uint64_t first_ns, read_ns;  // when the first request came, when the octets in hand were read

typedef struct {
    uint32_t stream, body;
    uint8_t used, has_id, last_octet;
    const char *fault;           // why the request is bad; NULL while it is good
    char id[ID_LENGTH];
} Request;

typedef struct {
    uint64_t due_us;
    Request request;
} Later;

typedef struct Connection {
    int fd, shaken, greeted, wants_write;
    SSL *ssl;
    uint8_t in[IN_SIZE];
    size_t in_length;
    uint8_t *out;
    size_t out_length, out_sent, out_size;
    nghttp2_hd_inflater *inflater;
    uint8_t block[MAX_BLOCK];
    size_t block_length;
    uint32_t block_stream;
    uint8_t block_flags;
    Request slots[SLOTS];
    Later *later;                // ring of answers to come; all wait equally long, so it is in order
    size_t later_first, later_end, later_size;
    uint64_t unacknowledged;     // DATA octets for which the client has not been given window back
    int64_t open;
    struct Connection *next, *previous;
} Connection;

static Connection *all;
static int epoll;
static SSL_CTX *tls;

static void on_signal(int number) {
    (void)number;
    stopping = 1;
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t now_us(void) {
    return now_ns() / 1000;
}

static int fault(const char *why) {
    if (!first_fault[0]) snprintf(first_fault, sizeof first_fault, "%s", why);
    return -1;
}

// ---------------------------------------------------------------------------------------------------- writing

static uint8_t *reserve(Connection *c, size_t octets) {
    if (c->out_length + octets > c->out_size) {
        if (c->out_sent) {
            memmove(c->out, c->out + c->out_sent, c->out_length - c->out_sent);
            c->out_length -= c->out_sent;
            c->out_sent = 0;
        }
        if (c->out_length + octets > c->out_size) {
            c->out_size = (c->out_length + octets) * 2;
            c->out = realloc(c->out, c->out_size);
            if (!c->out) abort();
        }
    }
    return c->out + c->out_length;
}

static void put32(uint8_t *p, uint32_t value) {
    p[0] = value >> 24, p[1] = value >> 16, p[2] = value >> 8, p[3] = value;
}

// Opens a frame and returns where its payload goes.
static uint8_t *frame(Connection *c, uint32_t length, uint8_t type, uint8_t flags, uint32_t stream) {
    uint8_t *p = reserve(c, 9 + length);
    put32(p, length << 8);
    p[3] = type, p[4] = flags;
    put32(p + 5, stream);
    c->out_length += 9 + length;
    return p + 9;
}

static void greet(Connection *c) {
    // HEADER_TABLE_SIZE, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE
    const uint16_t ids[] = {1, 3, 4, 5, 6};
    const uint32_t values[] = {4096, max_streams, 65535, MAX_FRAME, 8000};
    uint8_t *p = frame(c, sizeof ids / sizeof *ids * 6, SETTINGS, 0, 0);
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++, p += 6) {
        p[0] = ids[i] >> 8, p[1] = ids[i];
        put32(p + 2, values[i]);
    }
    put32(frame(c, 4, WINDOW_UPDATE, 0, 0), WINDOW - 65535);
}

static void make_id(char *id) {
    static uint64_t state = 88172645463325252ull;  // xorshift: unique enough for an id nobody looks up
    for (int i = 0; i < ID_LENGTH; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        id[i] = i == 8 || i == 13 || i == 18 || i == 23 ? '-' : i == 14 ? '4' : "0123456789ABCDEF"[state & 15];
    }
}

static void answer(Connection *c, Request *r) {
    // Each answer stands alone (no dynamic table), as Apple's do for a client that announces HEADER_TABLE_SIZE 0.
    uint8_t *p = frame(c, 1 + 2 + 7 + 1 + ID_LENGTH, HEADERS, r->fault ? END_HEADERS : END_HEADERS | END_STREAM, r->stream);
    *p++ = r->fault ? 0x8c : 0x88;  // :status 400 or 200, both in the static table (RFC 7541, appendix A)
    memcpy(p, "\0\7apns-id\x24", 10);
    if (!r->has_id) make_id(r->id);
    memcpy(p + 10, r->id, ID_LENGTH);
    if (r->fault) {
        static const char body[] = "{\"reason\":\"BadRequest\"}";
        memcpy(frame(c, sizeof body - 1, DATA, END_STREAM, r->stream), body, sizeof body - 1);
    }
    c->open--;
}

// ---------------------------------------------------------------------------------------------------- requests

static void complete(Connection *c, Request *r) {
    r->used = 0;
    if (!requests++) first_ns = now_ns();
    if (!r->fault && (r->body == 0 || r->last_octet != '}')) r->fault = "a body that is not a JSON object";
    if (r->fault) {
        bad_requests++;
        fault(r->fault);
    }
    if (!answer_later_ms) {
        answer(c, r);
        return;
    }
    if (c->later_end - c->later_first == c->later_size) {
        size_t larger = c->later_size ? c->later_size * 2 : 4096;
        Later *ring = malloc(larger * sizeof *ring);
        if (!ring) abort();
        for (size_t i = c->later_first; i < c->later_end; i++) ring[i % larger] = c->later[i % c->later_size];
        free(c->later);
        c->later = ring, c->later_size = larger;
    }
    c->later[c->later_end++ % c->later_size] = (Later){now_us() + answer_later_ms * 1000ull, *r};
}

static void note_arrival(const uint8_t *data, uint32_t length) {
    const uint8_t *mark = memmem(data, length, SEQUENCE_MARK, strlen(SEQUENCE_MARK));
    if (!mark || data + length - mark < (long)strlen(SEQUENCE_MARK) + SEQUENCE_DIGITS) return;
    uint64_t sequence = 0;
    for (const uint8_t *p = mark + strlen(SEQUENCE_MARK), *end = p + SEQUENCE_DIGITS; p < end; p++) {
        if (*p < '0' || *p > '9') return;
        sequence = sequence * 10 + *p - '0';
    }
    if (arrivals_length == arrivals_size) {
        arrivals_size = arrivals_size ? arrivals_size * 2 : 65536;
        arrivals = realloc(arrivals, arrivals_size * sizeof *arrivals);
        if (!arrivals) abort();
    }
    arrivals[arrivals_length++] = (Arrival){read_ns, sequence};
}

static int is(const uint8_t *text, size_t length, const char *word) {
    return length == strlen(word) && !memcmp(text, word, length);
}

static int hex(uint8_t c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

enum { METHOD = 1, SCHEME = 2, PATH = 4, AUTHORITY = 8, AUTHORIZATION = 16, TOPIC = 32, REGULAR = 64 };
#define REQUIRED (METHOD | SCHEME | PATH | AUTHORITY | AUTHORIZATION | TOPIC)

static const char *check_path(const uint8_t *value, size_t length) {
    if (length < 12 || memcmp(value, "/3/device/", 10)) return ":path is not /3/device/TOKEN";
    const uint8_t *token = value + 10;
    size_t digits = length - 10;
    for (size_t i = 0; i < digits; i++)
        if (hex(token[i]) < 0) return "the device token is not lower-case hex";
    if (digits != 2u * (hex(token[0]) * 16 + hex(token[1]))) return "the device token is too long or too short";
    return NULL;
}

static void check_field(Request *r, int *seen, const nghttp2_nv *nv) {
    const uint8_t *name = nv->name, *value = nv->value;
    size_t length = nv->namelen;
    if (length && name[0] == ':') {
        if (*seen & REGULAR) r->fault = "a pseudo-header after an ordinary one (RFC 9113, section 8.3)";
        int which = is(name, length, ":method") ? METHOD : is(name, length, ":scheme") ? SCHEME
                    : is(name, length, ":path") ? PATH : is(name, length, ":authority") ? AUTHORITY : 0;
        if (!which) r->fault = "an unknown pseudo-header";
        // a `host` field may stand in for :authority, but comes later, so this catches true repetitions only
        if (*seen & which) r->fault = "a pseudo-header twice";
        *seen |= which;
        if (which == METHOD && !is(value, nv->valuelen, "POST")) r->fault = ":method is not POST";
        if (which == SCHEME && !is(value, nv->valuelen, "https")) r->fault = ":scheme is not https";
        if (which == AUTHORITY && !nv->valuelen) r->fault = ":authority is empty";
        const char *why = which == PATH ? check_path(value, nv->valuelen) : NULL;
        if (why) r->fault = why;
        return;
    }
    *seen |= REGULAR;
    if (is(name, length, "host")) {  // instead of :authority, as some clients do (RFC 9113, section 8.3.1)
        *seen |= AUTHORITY;
    } else if (is(name, length, "authorization")) {
        // the scheme is case-insensitive (RFC 9110, section 11.1); any ES256 provider token is longer than 100
        if (nv->valuelen > 100 && !strncasecmp((const char *)value, "bearer ", 7)) *seen |= AUTHORIZATION;
    } else if (is(name, length, "apns-topic")) {
        if (nv->valuelen) *seen |= TOPIC;
    } else if (is(name, length, "apns-id")) {
        if (nv->valuelen != ID_LENGTH) {
            r->fault = "apns-id is not a UUID";
            return;
        }
        memcpy(r->id, value, ID_LENGTH);
        r->has_id = 1;
    }
}

static int on_headers(Connection *c) {
    Request *r = &c->slots[(c->block_stream >> 1) & (SLOTS - 1)];
    if (r->used) return fault("a header block for a stream that is still sending, or trailers");
    *r = (Request){.stream = c->block_stream, .used = 1};
    const uint8_t *p = c->block;
    size_t left = c->block_length;
    int seen = 0;
    for (;;) {
        nghttp2_nv nv;
        int flags = 0;
        ssize_t used = nghttp2_hd_inflate_hd2(c->inflater, &nv, &flags, p, left, 1);
        if (used < 0) return fault(nghttp2_strerror(used));
        p += used, left -= used;
        if (flags & NGHTTP2_HD_INFLATE_EMIT) check_field(r, &seen, &nv);
        if (flags & NGHTTP2_HD_INFLATE_FINAL) {
            nghttp2_hd_inflate_end_headers(c->inflater);
            break;
        }
        if (!(flags & NGHTTP2_HD_INFLATE_EMIT) && !left) break;
    }
    if (!r->fault && (seen & REQUIRED) != REQUIRED) r->fault = "a header that APNs needs is missing";
    c->open++;
    if ((uint64_t)c->open > most_open) most_open = c->open;
    if (c->open > max_streams) return fault("more streams open than MAX_CONCURRENT_STREAMS allows");
    if (c->block_flags & END_STREAM) complete(c, r);
    return 0;
}

static int on_data(Connection *c, uint32_t stream, uint8_t flags, const uint8_t *data, uint32_t length) {
    Request *r = &c->slots[(stream >> 1) & (SLOTS - 1)];
    if (!r->used || r->stream != stream) return fault("DATA for a stream that is not open");
    if (length) {
        if (!r->body && data[0] != '{') r->fault = "a body that is not a JSON object";
        r->body += length;
        r->last_octet = data[length - 1];
        if (log_path) note_arrival(data, length);
    }
    if (flags & END_STREAM) complete(c, r);
    return 0;
}

static int on_frame(Connection *c, const uint8_t *f, uint32_t length) {
    uint8_t type = f[3], flags = f[4];
    uint32_t stream = (uint32_t)(f[5] & 0x7f) << 24 | f[6] << 16 | f[7] << 8 | f[8];
    const uint8_t *p = f + 9;
    uint32_t left = length;
    if (type == DATA) c->unacknowledged += length;
    if ((type == DATA || type == HEADERS) && flags & PADDED) {
        if (left < 1u + p[0]) return fault("more padding than frame");
        left -= 1 + p[0], p++;
    }
    if (type == HEADERS && flags & PRIORITY_FLAG) {
        if (left < 5) return fault("a HEADERS frame too short for its priority");
        left -= 5, p += 5;
    }
    switch (type) {
    case DATA:
        return on_data(c, stream, flags, p, left);
    case HEADERS:
        header_octets += length;
        c->block_length = 0, c->block_stream = stream, c->block_flags = flags;
        __attribute__((fallthrough));  // the first part of a block is handled as the others are
    case CONTINUATION:
        if (c->block_length + left > MAX_BLOCK) return fault("a header block over 64 kB");
        memcpy(c->block + c->block_length, p, left);
        c->block_length += left;
        return flags & END_HEADERS ? on_headers(c) : 0;
    case SETTINGS:
        if (!(flags & ACK)) frame(c, 0, SETTINGS, ACK, 0);
        return 0;
    case PING:
        if (!(flags & ACK) && length == 8) memcpy(frame(c, 8, PING, ACK, 0), p, 8);
        return 0;
    case RST_STREAM:
        return fault("the client reset a stream");
    default:
        return 0;
    }
}

// Consumes whole frames from the input buffer.
static int digest(Connection *c) {
    static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    size_t at = 0;
    if (!c->greeted) {
        if (c->in_length < 24) return 0;
        if (memcmp(c->in, preface, 24)) return fault("no HTTP/2 preface");
        at = 24, c->greeted = 1;
    }
    while (c->in_length - at >= 9) {
        const uint8_t *f = c->in + at;
        uint32_t length = f[0] << 16 | f[1] << 8 | f[2];
        if (length > MAX_FRAME) return fault("a frame over MAX_FRAME_SIZE");
        if (c->in_length - at < 9 + length) break;
        if (on_frame(c, f, length)) return -1;
        at += 9 + length;
    }
    if (at) {
        memmove(c->in, c->in + at, c->in_length - at);
        c->in_length -= at;
    }
    if (c->unacknowledged > WINDOW / 4) {
        put32(frame(c, 4, WINDOW_UPDATE, 0, 0), c->unacknowledged);
        c->unacknowledged = 0;
    }
    return 0;
}

// ---------------------------------------------------------------------------------------------------- the socket

static void watch(Connection *c, int for_write) {
    if (c->wants_write == for_write) return;
    c->wants_write = for_write;
    struct epoll_event event = {.events = EPOLLIN | (for_write ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &event);
}

// What a failed SSL call means: 0 wait for the socket, -1 the connection is over.
static int blocked(Connection *c, int result) {
    int why = SSL_get_error(c->ssl, result);
    if (why == SSL_ERROR_WANT_WRITE) watch(c, 1);
    return why == SSL_ERROR_WANT_WRITE || why == SSL_ERROR_WANT_READ ? 0 : -1;
}

static int flush(Connection *c) {
    while (c->out_sent < c->out_length) {
        size_t left = c->out_length - c->out_sent;
        ERR_clear_error();
        int n = SSL_write(c->ssl, c->out + c->out_sent, left > 65536 ? 65536 : left);
        if (n <= 0) return blocked(c, n);
        c->out_sent += n;
    }
    c->out_sent = c->out_length = 0;
    watch(c, 0);
    return 0;
}

static int on_readable(Connection *c) {
    if (!c->shaken) {
        ERR_clear_error();
        int done = SSL_accept(c->ssl);
        if (done <= 0) return blocked(c, done);
        c->shaken = 1;
        greet(c);
        if (flush(c)) return -1;
    }
    for (;;) {
        ERR_clear_error();
        int n = SSL_read(c->ssl, c->in + c->in_length, IN_SIZE - c->in_length);
        if (n <= 0) {
            if (blocked(c, n)) return -1;
            break;
        }
        c->in_length += n;
        if (log_path) read_ns = now_ns();
        if (digest(c)) return -1;
        if (c->out_length - c->out_sent > FLUSH_AT && flush(c)) return -1;
    }
    return flush(c);
}

static void welcome(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    Connection *c = calloc(1, sizeof *c);
    if (!c || nghttp2_hd_inflate_new(&c->inflater)) abort();
    c->fd = fd;
    c->ssl = SSL_new(tls);
    SSL_set_fd(c->ssl, fd);
    c->next = all;
    if (all) all->previous = c;
    all = c;
    connections++;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
}

static void farewell(Connection *c) {
    if (c->previous) c->previous->next = c->next;
    else all = c->next;
    if (c->next) c->next->previous = c->previous;
    SSL_free(c->ssl);
    close(c->fd);
    nghttp2_hd_inflate_del(c->inflater);
    free(c->out), free(c->later), free(c);
}

static void answer_what_is_due(void) {
    uint64_t now = now_us();
    for (Connection *c = all, *next; c; c = next) {
        next = c->next;
        int any = 0;
        for (; c->later_first < c->later_end; c->later_first++, any = 1) {
            Later *l = &c->later[c->later_first % c->later_size];
            if (l->due_us > now) break;
            answer(c, &l->request);
        }
        if (any && flush(c)) farewell(c);
    }
}

static int choose_h2(SSL *ssl, const unsigned char **out, unsigned char *out_length, const unsigned char *in,
                     unsigned in_length, void *argument) {
    (void)ssl, (void)argument;
    int found = SSL_select_next_proto((unsigned char **)out, out_length, (const unsigned char *)"\x02h2", 3, in, in_length);
    return found == OPENSSL_NPN_NEGOTIATED ? SSL_TLSEXT_ERR_OK : SSL_TLSEXT_ERR_ALERT_FATAL;
}

static int prepare_tls(const char *certificate, const char *key) {
    tls = SSL_CTX_new(TLS_server_method());
    if (!tls || SSL_CTX_use_certificate_chain_file(tls, certificate) != 1 ||
        SSL_CTX_use_PrivateKey_file(tls, key, SSL_FILETYPE_PEM) != 1) {
        ERR_print_errors_fp(stderr);
        return -1;
    }
    SSL_CTX_set_alpn_select_cb(tls, choose_h2, NULL);
    SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_read_ahead(tls, 1);  // many records a system call
    SSL_CTX_set_default_read_buffer_len(tls, 65536);
    return 0;
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    if (bind(fd, (void *)&address, length) || listen(fd, 128) || getsockname(fd, (void *)&address, &length)) {
        perror("cannot listen");
        return -1;
    }
    printf("{\"port\": %d}\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

static int write_log(void) {
    if (!log_path) return 0;
    FILE *file = fopen(log_path, "wb");
    if (file && fwrite(arrivals, sizeof *arrivals, arrivals_length, file) == arrivals_length && !fclose(file)) return 0;
    perror(log_path);
    return 1;
}

static void report(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu = used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("{\"requests\": %lu, \"bad\": %lu, \"connections\": %lu, \"most_open\": %lu, \"header_octets\": %lu, "
           "\"first_ns\": %lu, \"cpu\": %.3f, \"fault\": \"%s\"}\n",
           requests, bad_requests, connections, most_open, header_octets, first_ns, cpu, first_fault);
}

int main(int argc, char **argv) {
    int port = 0, option;
    const char *certificate = NULL, *key = NULL;
    while ((option = getopt(argc, argv, "p:l:m:c:k:o:")) != -1) switch (option) {
        case 'p': port = atoi(optarg); break;
        case 'l': answer_later_ms = atoi(optarg); break;
        case 'm': max_streams = atoi(optarg); break;
        case 'c': certificate = optarg; break;
        case 'k': key = optarg; break;
        case 'o': log_path = optarg; break;
        default: return 2;
    }
    if (!certificate || !key || max_streams < 1 || max_streams > SLOTS / 2) {
        fprintf(stderr, "usage: sink -c CERT.pem -k KEY.pem [-p PORT] [-l MS] [-m STREAMS up to %d] [-o LOG]\n", SLOTS / 2);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);
    epoll = epoll_create1(0);
    int listener = prepare_tls(certificate, key) ? -1 : listen_on(port);
    if (listener < 0) return 1;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    struct epoll_event events[64];
    while (!stopping) {
        int timeout_ms = 1000;
        if (answer_later_ms)
            for (Connection *c = all; c; c = c->next)
                if (c->later_end > c->later_first) timeout_ms = 1;
        int n = epoll_wait(epoll, events, 64, timeout_ms);
        for (int i = 0; i < n; i++) {
            Connection *c = events[i].data.ptr;
            if (!c) {
                for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) welcome(fd);
                continue;
            }
            if ((events[i].events & EPOLLOUT && c->shaken && flush(c)) || on_readable(c)) farewell(c);
        }
        if (answer_later_ms) answer_what_is_due();
    }
    report();
    return write_log();
}
