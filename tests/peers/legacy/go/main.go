// A client of the binary protocol with Go's own TLS: commands 1 and 2 by turns, one goroutine writes, one reads.
// Its argument is `careless`, `careful` or `feedback`; see ../contract.py for what it is told and tells.
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"strings"
)

type message struct {
	identifier, expiry uint32
	priority           uint8
	token, payload     []byte
}

func must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func number(text string) uint32 { return uint32(must(strconv.ParseUint(text, 10, 32))) }

func put(out *bytes.Buffer, values ...any) {
	for _, value := range values {
		must(0, binary.Write(out, binary.BigEndian, value))
	}
}

func (m message) frame() []byte {
	var out, items bytes.Buffer
	if m.identifier%2 == 1 {
		put(&out, uint8(1), m.identifier, m.expiry, uint16(len(m.token)), m.token, uint16(len(m.payload)), m.payload)
		return out.Bytes()
	}
	put(&items, uint8(5), uint16(1), m.priority, uint8(4), uint16(4), m.expiry, uint8(3), uint16(4), m.identifier)
	put(&items, uint8(2), uint16(len(m.payload)), m.payload, uint8(1), uint16(len(m.token)), m.token)
	put(&out, uint8(2), uint32(items.Len()), items.Bytes())
	return out.Bytes()
}

func connect(port string) *tls.Conn {
	pem := os.Getenv("LEGACY_PEM")
	authorities := x509.NewCertPool()
	authorities.AppendCertsFromPEM(must(os.ReadFile(os.Getenv("LEGACY_CA"))))
	return must(tls.Dial("tcp", "localhost:"+os.Getenv(port), &tls.Config{
		Certificates: []tls.Certificate{must(tls.LoadX509KeyPair(pem, pem))},
		RootCAs:      authorities,
	}))
}

func push(messages []message, careful bool) {
	connection := connect("LEGACY_PORT")
	answer := make(chan []byte)
	if careful {
		go func() {
			packet := make([]byte, 6)
			must(io.ReadFull(connection, packet))
			answer <- packet
		}()
	}
	for _, each := range messages {
		if _, err := connection.Write(each.frame()); err != nil {
			break // the gateway closed, and its reason is there to read
		}
	}
	if !careful {
		must(0, connection.Close())
		return
	}
	packet := <-answer
	connection.Close()
	for at, each := range messages {
		if each.identifier == binary.BigEndian.Uint32(packet[2:]) {
			fmt.Printf("{\"status\":%d,\"token\":\"%x\"}\n", packet[1], each.token)
			push(messages[at+1:], false)
		}
	}
}

func main() {
	log.SetFlags(0)
	if os.Args[1] == "feedback" {
		content := must(io.ReadAll(connect("LEGACY_FEEDBACK_PORT")))
		for len(content) > 0 {
			end := 6 + int(binary.BigEndian.Uint16(content[4:]))
			fmt.Printf("{\"token\":\"%x\",\"at\":%d}\n", content[6:end], binary.BigEndian.Uint32(content))
			content = content[end:]
		}
		return
	}
	var messages []message
	lines := strings.TrimSpace(string(must(os.ReadFile(os.Getenv("LEGACY_PUSHES")))))
	for _, line := range strings.Split(lines, "\n") {
		column := strings.SplitN(line, " ", 5)
		messages = append(messages, message{
			number(column[0]), number(column[1]), uint8(number(column[2])),
			must(hex.DecodeString(column[3])), []byte(column[4]),
		})
	}
	push(messages, os.Args[1] == "careful")
}
