// An HTTP/2 server that keeps a ledger of what it was asked.
//
// Usage: node server.mjs CERTIFICATE-FILE KEY-FILE STREAMS [padded]
//
// It prints its port, answers until its standard input ends, then prints how often it acted on each apns-id, a line
// each: "ID COUNT". The last element of the path says what becomes of a request:
//
//   dead…     410 with a JSON body          abort…    reset with INTERNAL_ERROR
//   hint…     103 before 200 and trailers   refuse…   reset with REFUSED_STREAM the first time
//   fewer…    200, and STREAMS falls to 1   more…     200, and STREAMS is as at the start again
//   bye…      200, and GOAWAY that takes back what comes after this stream, which is not acted on
//   else      200, the apns-id in the answer
import { readFileSync } from "node:fs";
import http2 from "node:http2";

const { NGHTTP2_INTERNAL_ERROR, NGHTTP2_NO_ERROR, NGHTTP2_REFUSED_STREAM } = http2.constants;
const [certificate, key, streams, padded] = process.argv.slice(2);
const book = new Map();
const server = http2.createSecureServer({
  cert: readFileSync(certificate),
  key: readFileSync(key),
  settings: { maxConcurrentStreams: Number(streams) },
  paddingStrategy: padded ? http2.constants.PADDING_STRATEGY_MAX : http2.constants.PADDING_STRATEGY_NONE,
});
const last = new WeakMap();
const refused = new Set();

server.on("session", (session) => session.on("error", () => {}));
server.on("stream", (stream, fields) => {
  const session = stream.session;
  const token = fields[":path"].split("/").pop();
  stream.on("error", () => {});
  if (last.has(session) && stream.id > last.get(session)) return stream.close(NGHTTP2_REFUSED_STREAM);
  if (token.startsWith("refuse") && !refused.has(token)) {
    refused.add(token);
    return stream.close(NGHTTP2_REFUSED_STREAM);
  }
  if (token.startsWith("bye") && !last.has(session)) {
    last.set(session, stream.id);
    session.goaway(NGHTTP2_NO_ERROR, stream.id, Buffer.from('{"reason":"Shutdown"}'));
  }
  let octets = 0;
  stream.on("data", (chunk) => (octets += chunk.length));
  stream.on("end", () => {
    const id = fields["apns-id"];
    book.set(id, (book.get(id) ?? 0) + 1);
    const answer = { ":status": 200, "apns-id": id, "x-octets": octets };
    if (token.startsWith("dead")) {
      stream.respond({ ...answer, ":status": 410 });
      stream.end('{"reason":"Unregistered","timestamp":1700000000000}');
    } else if (token.startsWith("abort")) {
      stream.close(NGHTTP2_INTERNAL_ERROR);
    } else if (token.startsWith("hint")) {
      stream.additionalHeaders({ ":status": 103 });
      stream.respond(answer, { waitForTrailers: true });
      stream.on("wantTrailers", () => stream.sendTrailers({ "x-late": "1" }));
      stream.end("{}");
    } else {
      if (token.startsWith("fewer")) session.settings({ maxConcurrentStreams: 1 });
      if (token.startsWith("more")) session.settings({ maxConcurrentStreams: Number(streams) });
      stream.respond(answer, { endStream: true });
    }
  });
});
server.listen(0, "127.0.0.1", () => console.log(server.address().port));
process.stdin.on("end", () => {
  for (const [id, count] of book) console.log(id, count);
  process.exit();
});
process.stdin.resume();
