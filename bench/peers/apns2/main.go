// The Go library sideshow/apns2. See bench/contract.py for what it is told and tells.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sideshow/apns2"
	"github.com/sideshow/apns2/token"
	"golang.org/x/net/http2"
)

const library = "github.com/sideshow/apns2"

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

// A client of apns2 has one connection while its far side allows the streams; several connections are several clients.
func send(clients []*apns2.Client, streams int, tokens []string, body []byte, count int) int {
	var next, ok atomic.Int64
	var workers sync.WaitGroup
	for _, client := range clients {
		for range streams {
			workers.Go(func() {
				for i := next.Add(1) - 1; i < int64(count); i = next.Add(1) - 1 {
					answer, err := client.Push(&apns2.Notification{
						DeviceToken: tokens[i%int64(len(tokens))],
						Topic:       "com.example.app",
						PushType:    apns2.PushTypeAlert,
						Priority:    apns2.PriorityHigh,
						Payload:     body, // ready JSON: the library's own builder would be measured otherwise
					})
					if err != nil {
						fmt.Fprintln(os.Stderr, err)
					} else if answer.StatusCode == http.StatusOK {
						ok.Add(1)
					} else {
						fmt.Fprintln(os.Stderr, answer.StatusCode, answer.Reason)
					}
				}
			})
		}
	}
	workers.Wait()
	return int(ok.Load())
}

func version() string {
	if info, found := debug.ReadBuildInfo(); found {
		for _, module := range info.Deps {
			if module.Path == library {
				return strings.TrimPrefix(module.Version, "v")
			}
		}
	}
	return ""
}

func main() {
	data, n, streams := os.Getenv("BENCH_DATA"), number("BENCH_N"), number("BENCH_STREAMS")
	tokens := strings.Fields(string(must(os.ReadFile(os.Getenv("BENCH_TOKENS")))))
	body := must(os.ReadFile(filepath.Join(data, "body.json")))
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(must(os.ReadFile(filepath.Join(data, "ca.pem"))))
	key := must(token.AuthKeyFromFile(filepath.Join(data, "AuthKey.p8")))
	var clients []*apns2.Client
	for range number("BENCH_CONNECTIONS") {
		client := apns2.NewTokenClient(&token.Token{AuthKey: key, KeyID: "KEYID12345", TeamID: "ABCDE12345"})
		client.Host = "https://127.0.0.1:" + os.Getenv("BENCH_PORT")
		client.HTTPClient.Transport.(*http2.Transport).TLSClientConfig = &tls.Config{RootCAs: roots}
		clients = append(clients, client)
		send(clients[len(clients)-1:], 1, tokens, body, 1) // opens the connection, so that the crowd does not open several
	}
	send(clients, streams, tokens, body, number("BENCH_WARM"))
	cpu, started := cpuUsed(), time.Now()
	ok := send(clients, streams, tokens, body, n)
	secs, cpuAfter := time.Since(started).Seconds(), cpuUsed()
	line := must(json.Marshal(map[string]any{
		"name": "apns2", "version": version(), "n": n, "ok": ok, "secs": secs, "cpu": cpuAfter - cpu, "rss_mb": peakRSSMB(),
	}))
	fmt.Println(string(line))
	if ok != n {
		os.Exit(1)
	}
}
