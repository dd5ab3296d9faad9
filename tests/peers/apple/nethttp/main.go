// Go's own HTTP/2 client. See ../contract.py for what it is told and tells.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net/http"
	"os"
	"strings"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func main() {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(must(os.ReadFile(os.Getenv("APPLE_CA"))))
	client := &http.Client{
		Transport: &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots}},
	}
	for _, line := range strings.Split(os.Getenv("APPLE_PUSHES"), "\n") {
		push := strings.Fields(line)
		url := "https://localhost:" + os.Getenv("APPLE_PORT") + "/3/device/" + push[1]
		request := must(http.NewRequest(http.MethodPost, url, must(os.Open(push[3]))))
		request.Header.Set("authorization", "bearer "+os.Getenv("APPLE_PROVIDER_TOKEN"))
		if push[0] != "-" {
			request.Header.Set("apns-id", push[0])
		}
		request.Header.Set("apns-topic", push[2])
		request.Header.Set("apns-push-type", "alert")
		answer := must(client.Do(request))
		told := map[string]any{"status": answer.StatusCode, "id": answer.Header.Get("apns-id")}
		if answer.StatusCode != http.StatusOK {
			must(0, json.NewDecoder(answer.Body).Decode(&told))
		}
		answer.Body.Close()
		must(0, json.NewEncoder(os.Stdout).Encode(told))
	}
}
