// Sends many POSTs at once over one HTTP/2 connection and checks that each answer is its own:
// status 200, the x-echo field and the body as they were sent.
//
// Usage: client URL CA-FILE COUNT
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

var sizes = []int{0, 118, 4096}

func post(client *http.Client, url string, i int, connections *sync.Map) error {
	body := bytes.Repeat([]byte{byte('a' + i%26)}, sizes[i%len(sizes)])
	request, err := http.NewRequest("POST", fmt.Sprintf("%s/%d", url, i), bytes.NewReader(body))
	if err != nil {
		return err
	}
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		connections.Store(info.Conn.LocalAddr().String(), true)
	}}
	request = request.WithContext(httptrace.WithClientTrace(request.Context(), trace))
	request.Header.Set("x-echo", strconv.Itoa(i))
	if i%10 == 9 {
		// More than one frame holds, however well it is compressed.
		request.Header.Set("x-long", strings.Repeat(strconv.Itoa(i)+"~", 40_000/(len(strconv.Itoa(i))+1)))
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	echoed, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode != 200 || answer.ProtoMajor != 2 || answer.Header.Get("x-echo") != strconv.Itoa(i) || !bytes.Equal(echoed, body) {
		return fmt.Errorf("request %d: %s %s, x-echo %q, %d octets", i, answer.Proto, answer.Status, answer.Header.Get("x-echo"), len(echoed))
	}
	return nil
}

func main() {
	url, caFile := os.Args[1], os.Args[2]
	count, err := strconv.Atoi(os.Args[3])
	if err != nil {
		panic(err)
	}
	authority, err := os.ReadFile(caFile)
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: roots},
		ForceAttemptHTTP2: true,
	}}
	var connections sync.Map
	// The first goes alone, so that the rest find its connection.
	if err := post(client, url, 0, &connections); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	var failed atomic.Int32
	var all sync.WaitGroup
	for i := 1; i < count; i++ {
		all.Add(1)
		go func() {
			defer all.Done()
			if err := post(client, url, i, &connections); err != nil {
				failed.Add(1)
				fmt.Println(err)
			}
		}()
	}
	all.Wait()
	if failed.Load() > 0 {
		os.Exit(1)
	}
	used := 0
	connections.Range(func(_, _ any) bool { used++; return true })
	fmt.Printf("%d answered over %d\n", count, used)
}
