// Node's own tls module and command 2. Its argument is `careless`, `careful` or `feedback`; see ../contract.py.

"use strict";
const fs = require("fs");
const tls = require("tls");

const pem = fs.readFileSync(process.env.LEGACY_PEM);
const options = {
  host: "localhost",
  cert: pem,
  key: pem,
  passphrase: process.env.LEGACY_PASSPHRASE,
  ca: [fs.readFileSync(process.env.LEGACY_CA)],
};
const tell = (what) => console.log(JSON.stringify(what));

function item(kind, data) {
  const head = Buffer.alloc(3);
  head.writeUInt8(kind, 0);
  head.writeUInt16BE(data.length, 1);
  return Buffer.concat([head, data]);
}

function frame({ identifier, expiry, priority, token, payload }) {
  const numbers = Buffer.alloc(9);
  numbers.writeUInt32BE(identifier, 0);
  numbers.writeUInt32BE(expiry, 4);
  numbers.writeUInt8(priority, 8);
  const items = Buffer.concat([
    item(1, Buffer.from(token, "hex")),
    item(2, Buffer.from(payload, "utf8")),
    item(3, numbers.subarray(0, 4)),
    item(4, numbers.subarray(4, 8)),
    item(5, numbers.subarray(8)),
  ]);
  const head = Buffer.alloc(5);
  head.writeUInt8(2, 0);
  head.writeUInt32BE(items.length, 1);
  return Buffer.concat([head, items]);
}

function push(messages, careful) {
  const socket = tls.connect({ ...options, port: process.env.LEGACY_PORT });
  let answer = Buffer.alloc(0);
  socket.on("data", (data) => (answer = Buffer.concat([answer, data])));
  // Writes fail once the gateway is gone; what it said before is what counts.
  socket.on("error", (error) => careful || console.error(error));
  socket.on("close", () => {
    if (answer.length < 6) return;
    const identifier = answer.readUInt32BE(2);
    const at = messages.findIndex((message) => message.identifier === identifier);
    tell({ status: answer[1], token: messages[at].token });
    push(messages.slice(at + 1), false);
  });
  for (const message of messages) socket.write(frame(message));
  if (!careful) socket.end();
}

if (process.argv[2] === "feedback") {
  const socket = tls.connect({ ...options, port: process.env.LEGACY_FEEDBACK_PORT });
  let held = Buffer.alloc(0);
  socket.on("data", (data) => {
    held = Buffer.concat([held, data]);
    while (held.length >= 6 && held.length >= 6 + held.readUInt16BE(4)) {
      const end = 6 + held.readUInt16BE(4);
      tell({ token: held.subarray(6, end).toString("hex"), at: held.readUInt32BE(0) });
      held = held.subarray(end);
    }
  });
} else {
  const lines = fs.readFileSync(process.env.LEGACY_PUSHES, "utf8").trimEnd().split("\n");
  const messages = lines.map((line) => {
    const [identifier, expiry, priority, token, ...rest] = line.split(" ");
    return {
      identifier: Number(identifier),
      expiry: Number(expiry),
      priority: Number(priority),
      token,
      payload: rest.join(" "),
    };
  });
  push(messages, process.argv[2] === "careful");
}
