// Node's own HTTP/2 client. See ../contract.py for what it is told and tells.
import { readFileSync } from 'node:fs';
import { connect } from 'node:http2';

const { env } = process;
const session = connect(`https://localhost:${env.APPLE_PORT}`, { ca: readFileSync(env.APPLE_CA) });

for (const line of env.APPLE_PUSHES.split('\n')) {
  const [id, token, topic, payload] = line.split(' ');
  const stream = session.request({
    ':method': 'POST',
    ':path': `/3/device/${token}`,
    authorization: `bearer ${env.APPLE_PROVIDER_TOKEN}`,
    ...(id === '-' ? {} : { 'apns-id': id }),
    'apns-topic': topic,
    'apns-push-type': 'alert',
  });
  stream.end(readFileSync(payload));
  const headers = await new Promise((resolve, reject) => stream.once('response', resolve).once('error', reject));
  let body = '';
  for await (const chunk of stream.setEncoding('utf8')) body += chunk;
  const told = { status: headers[':status'], id: headers['apns-id'], ...(body ? JSON.parse(body) : {}) };
  console.log(JSON.stringify(told));
}
session.close();
