// The package apn as it was before HTTP/2. Its argument is `careless`, `careful` or `feedback`; see ../contract.py.

"use strict";
const apn = require("apn");
const fs = require("fs");

const options = {
  address: "localhost",
  pfx: process.env.LEGACY_P12,
  passphrase: process.env.LEGACY_PASSPHRASE,
  ca: [process.env.LEGACY_CA],
};
const tell = (what) => console.log(JSON.stringify(what));
const fail = (error) => {
  console.error(error);
  process.exit(1);
};

if (process.argv[2] === "feedback") {
  const feedback = new apn.Feedback({ ...options, port: process.env.LEGACY_FEEDBACK_PORT, interval: 0 });
  feedback.on("feedback", (gone) => gone.forEach((each) => tell({ token: each.device.toString(), at: each.time })));
  feedback.on("feedbackError", fail);
  feedback.on("error", fail);
} else {
  const connection = new apn.Connection({ ...options, port: process.env.LEGACY_PORT });
  // Its own wait before it closes is what it gives the gateway for an error, and it goes on after one by itself.
  connection.on("transmissionError", (status, _, device) => tell({ status, token: device && device.toString() }));
  connection.on("socketError", fail);
  connection.on("error", fail);
  const lines = fs.readFileSync(process.env.LEGACY_PUSHES, "utf8").trimEnd().split("\n");
  for (const line of lines) {
    const [, expiry, priority, token, ...rest] = line.split(" ");
    const notification = new apn.Notification(JSON.parse(rest.join(" ")));
    notification.expiry = Number(expiry);
    notification.priority = Number(priority);
    connection.pushNotification(notification, token);
  }
  connection.on("completed", () => connection.shutdown());
}
