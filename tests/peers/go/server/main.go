// An HTTP/2 server that keeps a ledger of what it was asked.
//
// Usage: server CERTIFICATE-FILE KEY-FILE STREAMS
//
// It prints its port, answers until its standard input ends, then prints how often it saw each apns-id, a line each:
// "ID COUNT". The last element of the path says what becomes of a request:
//
//	dead…     410 with a JSON body          abort…    the stream is reset
//	hint…     103 before 200 and trailers   bye…      200, and the server shuts down gracefully
//	else      200, the apns-id in the answer
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
)

type ledger struct {
	sync.Mutex
	seen map[string]int
}

func (l *ledger) enter(id string) {
	l.Lock()
	l.seen[id]++
	l.Unlock()
}

func main() {
	streams, err := strconv.Atoi(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	book := &ledger{seen: map[string]int{}}
	server := &http.Server{
		HTTP2:    &http.HTTP2Config{MaxConcurrentStreams: streams},
		ErrorLog: log.New(io.Discard, "", 0),
	}
	var leaving sync.Once
	gone := make(chan struct{})
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		id := r.Header.Get("apns-id")
		book.enter(id)
		w.Header().Set("apns-id", id)
		w.Header().Set("x-octets", strconv.Itoa(len(body)))
		switch token := path.Base(r.URL.Path); {
		case strings.HasPrefix(token, "dead"):
			w.WriteHeader(410)
			io.WriteString(w, `{"reason":"Unregistered","timestamp":1700000000000}`)
		case strings.HasPrefix(token, "abort"):
			panic(http.ErrAbortHandler)
		case strings.HasPrefix(token, "hint"):
			w.WriteHeader(103)
			w.Header().Set("Trailer", "x-late")
			io.WriteString(w, "{}")
			w.Header().Set("x-late", "1")
		case strings.HasPrefix(token, "bye"):
			leaving.Do(func() {
				go func() {
					server.Shutdown(context.Background())
					close(gone)
				}()
			})
		}
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	certificate, err := tls.LoadX509KeyPair(os.Args[1], os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{certificate}}
	go server.ServeTLS(listener, "", "")
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	bufio.NewReader(os.Stdin).ReadString('\n')
	leaving.Do(func() { server.Close(); close(gone) })
	<-gone
	book.Lock()
	for id, count := range book.seen {
		fmt.Println(id, count)
	}
}
