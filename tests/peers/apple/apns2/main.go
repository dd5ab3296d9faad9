// The Go library sideshow/apns2. See ../contract.py for what it is told and tells.
package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"os"
	"strings"

	"github.com/sideshow/apns2"
	"github.com/sideshow/apns2/certificate"
	"github.com/sideshow/apns2/token"
	"golang.org/x/net/http2"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func newClient() *apns2.Client {
	if file := os.Getenv("APPLE_P12"); file != "" {
		return apns2.NewClient(must(certificate.FromP12File(file, "")))
	}
	key := must(token.AuthKeyFromFile(os.Getenv("APPLE_KEY_FILE")))
	return apns2.NewTokenClient(
		&token.Token{AuthKey: key, KeyID: os.Getenv("APPLE_KEY_ID"), TeamID: os.Getenv("APPLE_TEAM_ID")},
	)
}

func main() {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(must(os.ReadFile(os.Getenv("APPLE_CA"))))
	client := newClient()
	client.Host = "https://localhost:" + os.Getenv("APPLE_PORT")
	transport := client.HTTPClient.Transport.(*http2.Transport)
	if transport.TLSClientConfig == nil {
		transport.TLSClientConfig = &tls.Config{}
	}
	transport.TLSClientConfig.RootCAs = roots
	for _, line := range strings.Split(os.Getenv("APPLE_PUSHES"), "\n") {
		push := strings.Fields(line)
		if push[0] == "-" {
			push[0] = ""
		}
		answer := must(client.Push(&apns2.Notification{
			ApnsID: push[0], DeviceToken: push[1], Topic: push[2], PushType: apns2.PushTypeAlert, Payload: must(os.ReadFile(push[3])),
		}))
		told := map[string]any{"status": answer.StatusCode, "id": answer.ApnsID}
		if !answer.Sent() {
			told["reason"] = answer.Reason
		}
		if !answer.Timestamp.IsZero() {
			told["timestamp"] = answer.Timestamp.UnixMilli()
		}
		must(0, json.NewEncoder(os.Stdout).Encode(told))
	}
}
