// The Node library node-apn. See ../contract.py for what it is told and tells; it does not show the apns-id of an answer.
import apn from '@parse/node-apn';
import { readFileSync } from 'node:fs';

const { env } = process;
const credentials = env.APPLE_PEM
  ? { cert: env.APPLE_PEM, key: env.APPLE_PEM }
  : { token: { key: env.APPLE_KEY_FILE, keyId: env.APPLE_KEY_ID, teamId: env.APPLE_TEAM_ID } };
const provider = new apn.Provider({
  ...credentials,
  production: true,
  address: 'localhost',
  port: Number(env.APPLE_PORT),
  ca: readFileSync(env.APPLE_CA),
});

for (const line of env.APPLE_PUSHES.split('\n')) {
  const [id, token, topic, payload] = line.split(' ');
  const note = new apn.Notification();
  if (id !== '-') note.id = id;
  note.topic = topic;
  note.pushType = 'alert';
  note.rawPayload = JSON.parse(readFileSync(payload, 'utf8'));
  const { sent, failed } = await provider.send(note, token);
  const [no] = failed;
  if (no?.error) throw no.error;
  const told = no ? { status: Number(no.status), ...no.response } : { status: sent.length ? 200 : null };
  console.log(JSON.stringify(told));
}
await provider.shutdown();
