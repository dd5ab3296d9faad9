// The Node library node-apn. See bench/contract.py for what it is told and tells.
import apn from '@parse/node-apn';
import { existsSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

const { env } = process;
const number = name => Number(env[name]);
const { version } = createRequire(import.meta.url)('@parse/node-apn/package.json');
const tokens = readFileSync(env.BENCH_TOKENS, 'utf8').trim().split('\n');

const connections = number('BENCH_CONNECTIONS');
const options = {
  token: { key: `${env.BENCH_DATA}/AuthKey.p8`, keyId: 'KEYID12345', teamId: 'ABCDE12345' },
  address: '127.0.0.1',
  port: number('BENCH_PORT'),
  ca: readFileSync(`${env.BENCH_DATA}/ca.pem`),
  clientCount: connections,
};
const provider = connections === 1 ? new apn.Provider(options) : new apn.MultiProvider(options);

// One for all: the library turns it into JSON once and keeps that.
const note = new apn.Notification();
note.topic = 'com.example.app';
note.pushType = 'alert';
note.priority = 10;
note.expiry = 0;
note.alert = { title: 'Hello Ada', body: 'Your parcel arrives today' };
note.badge = 1;
note.sound = 'default';
note.payload = { id: 'a1b2c3d4' };

async function send(count) {
  let next = 0;
  let ok = 0;
  const worker = async () => {
    while (next < count) {
      const token = tokens[next++ % tokens.length];
      const { sent, failed } = await provider.send(note, token);
      ok += sent.length;
      if (failed.length) console.error(failed[0].status, failed[0].response?.reason, failed[0].error?.message);
    }
  };
  await Promise.all(Array.from({ length: number('BENCH_STREAMS') * connections }, worker));
  return ok;
}

// Not resourceUsage(): what that says includes the process that started us. 0 where there is no /proc.
function peakRssMb() {
  const status = existsSync('/proc/self/status') ? readFileSync('/proc/self/status', 'utf8') : '';
  return Number(/^VmHWM:\s*(\d+)/m.exec(status)?.[1] ?? 0) / 1024;
}

const n = number('BENCH_N');
await send(number('BENCH_WARM'));
const cpu = process.cpuUsage();
const started = process.hrtime.bigint();
const ok = await send(n);
const secs = Number(process.hrtime.bigint() - started) / 1e9;
const used = process.cpuUsage(cpu);
console.log(
  JSON.stringify({
    name: 'node-apn',
    version,
    n,
    ok,
    secs,
    cpu: (used.user + used.system) / 1e6,
    rss_mb: peakRssMb(),
  })
);
process.exit(ok === n ? 0 : 1);
