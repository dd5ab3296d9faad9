// Sends many POSTs at once over one HTTP/2 connection and checks that each answer is its own:
// status 200, the x-echo field and the body as they were sent.
//
// Usage: node client.mjs URL CA-FILE COUNT [padded]
import { readFileSync } from "node:fs";
import http2 from "node:http2";

const [url, authority, count, padded] = process.argv.slice(2);
const sizes = [0, 118, 4096];
const session = http2.connect(url, {
  ca: readFileSync(authority),
  paddingStrategy: padded ? http2.constants.PADDING_STRATEGY_MAX : http2.constants.PADDING_STRATEGY_NONE,
});

function post(i) {
  return new Promise((resolve, reject) => {
    const body = String.fromCharCode(97 + (i % 26)).repeat(sizes[i % 3]);
    const fields = { ":method": "POST", ":path": `/${i}`, "x-echo": `${i}` };
    // More than one frame holds, however well it is compressed.
    if (i % 10 === 9) fields["x-long"] = `${i}~`.repeat(40_000 / `${i}~`.length);
    const stream = session.request(fields);
    let answer;
    let echoed = "";
    stream.setEncoding("utf8");
    stream.on("response", (received) => (answer = received));
    stream.on("data", (chunk) => (echoed += chunk));
    stream.on("error", reject);
    stream.on("end", () => {
      if (answer[":status"] === 200 && answer["x-echo"] === `${i}` && echoed === body) resolve();
      else reject(new Error(`request ${i}: ${JSON.stringify(answer)}, ${echoed.length} octets`));
    });
    stream.end(body);
  });
}

session.on("error", (error) => { throw error; });
session.once("remoteSettings", async () => {
  await Promise.all(Array.from({ length: Number(count) }, (_, i) => post(i)));
  session.close(() => console.log(`${count} answered over 1`));
});
