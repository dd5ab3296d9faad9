// Go's own HTTP/2 client. See bench/contract.py for what it is told and tells.
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

func must[T any](value T, err error) T {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return value
}

func number(name string) int { return must(strconv.Atoi(os.Getenv(name))) }

func cpuUsed() float64 {
	var used syscall.Rusage
	must(0, syscall.Getrusage(syscall.RUSAGE_SELF, &used))
	return time.Duration(used.Utime.Nano() + used.Stime.Nano()).Seconds()
}

// Not getrusage: what that says includes the process that started us. 0 where there is no /proc.
func peakRSSMB() float64 {
	status, _ := os.ReadFile("/proc/self/status")
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	kb := 0.0
	fmt.Sscan(after, &kb)
	return kb / 1024
}

type sender struct {
	base, bearer string
	body         []byte
	tokens       []string
}

func (s *sender) push(client *http.Client, token string) (int, error) {
	request, err := http.NewRequest(http.MethodPost, s.base+token, bytes.NewReader(s.body))
	if err != nil {
		return 0, err
	}
	// keys as they go on the wire, so that they need no canonical form
	request.Header["apns-topic"] = []string{"com.example.app"}
	request.Header["apns-push-type"] = []string{"alert"}
	request.Header["apns-priority"] = []string{"10"}
	request.Header["apns-expiration"] = []string{"0"}
	request.Header["authorization"] = []string{s.bearer}
	answer, err := client.Do(request)
	if err != nil {
		return 0, err
	}
	defer answer.Body.Close()
	_, err = io.Copy(io.Discard, answer.Body)
	return answer.StatusCode, err
}

// A client has one connection while its far side allows the streams; several connections are several clients.
func (s *sender) send(clients []*http.Client, streams, count int) int {
	var next, ok atomic.Int64
	var workers sync.WaitGroup
	for _, client := range clients {
		for range streams {
			workers.Go(func() {
				for i := next.Add(1) - 1; i < int64(count); i = next.Add(1) - 1 {
					status, err := s.push(client, s.tokens[i%int64(len(s.tokens))])
					if err != nil || status != http.StatusOK {
						fmt.Fprintln(os.Stderr, status, err)
						continue
					}
					ok.Add(1)
				}
			})
		}
	}
	workers.Wait()
	return int(ok.Load())
}

func main() {
	data, n, streams := os.Getenv("BENCH_DATA"), number("BENCH_N"), number("BENCH_STREAMS")
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(must(os.ReadFile(filepath.Join(data, "ca.pem"))))
	s := &sender{
		base:   "https://127.0.0.1:" + os.Getenv("BENCH_PORT") + "/3/device/",
		bearer: "bearer " + string(must(os.ReadFile(filepath.Join(data, "jwt.txt")))),
		body:   must(os.ReadFile(filepath.Join(data, "body.json"))),
		tokens: strings.Fields(string(must(os.ReadFile(os.Getenv("BENCH_TOKENS"))))),
	}
	var clients []*http.Client
	for range number("BENCH_CONNECTIONS") {
		transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots}}
		clients = append(clients, &http.Client{Transport: transport, Timeout: time.Minute})
		s.send(clients[len(clients)-1:], 1, 1) // opens the connection, so that the crowd does not open several
	}
	s.send(clients, streams, number("BENCH_WARM"))
	cpu, started := cpuUsed(), time.Now()
	ok := s.send(clients, streams, n)
	secs, cpuAfter := time.Since(started).Seconds(), cpuUsed()
	line := must(json.Marshal(map[string]any{
		"name": "gohttp", "version": strings.TrimPrefix(runtime.Version(), "go"),
		"n": n, "ok": ok, "secs": secs, "cpu": cpuAfter - cpu, "rss_mb": peakRSSMB(),
	}))
	fmt.Println(string(line))
	if ok != n {
		os.Exit(1)
	}
}
