import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { rootCertificates } from 'node:tls';

import { connectivityState as State, status as Code } from '@grpc/grpc-js';

import { Certificates } from '../src/certificates.js';
import { choose } from '../src/channels.js';
import { decide, replaces, reopeningPause, retryPause } from '../src/decisions.js';
import { TokenBrokerError } from '../src/errors.js';
import { checkHost, refusalCode, refusalIn } from '../src/refusal.js';
import { optionsFromEnvironment, settingsFrom } from '../src/settings.js';
import { type CallStatus, errorFromStatus } from '../src/status.js';
import { type Kept, keptFrom } from '../src/token.js';
import { silent, tokenAnswer } from './fakes.js';
import { refusal as refusalOfBroker } from './servers.js';

function kept(generation: bigint, reuseEnd: number, end: number): Kept {
  return { ...keptFrom('acme', tokenAnswer({ generation }), 0, () => 0), reuseEnd, end };
}

const refusal = { error: new TokenBrokerError('NOT_GRANTED', 'no'), until: 100 };

test('what to do follows from the kept token and the last error', () => {
  const token = kept(1n, 40_000, 60_000);
  assert.equal(decide({ kept: token, pausedUntil: 0 }, 39_999), 'use');
  assert.equal(decide({ kept: token, pausedUntil: 0 }, 40_000), 'renew');
  assert.equal(decide({ kept: token, pausedUntil: 50_000 }, 49_999), 'use');
  assert.equal(decide({ kept: token, pausedUntil: 70_000 }, 59_000), 'ask');
  assert.equal(decide({ pausedUntil: 0 }, 0), 'ask');
  assert.equal(decide({ refusal, pausedUntil: 0 }, 99), 'refuse');
  assert.equal(decide({ refusal, pausedUntil: 0 }, 100), 'ask');
});

test('a token replaces an older one, and itself if it may be kept for longer', () => {
  assert.ok(replaces(kept(2n, 1, 2000), undefined, 0));
  assert.ok(replaces(kept(2n, 1, 2000), kept(1n, 5, 6000), 0));
  assert.ok(replaces(kept(2n, 6, 7000), kept(2n, 5, 7000), 0));
  assert.ok(!replaces(kept(2n, 5, 7000), kept(2n, 5, 7000), 0));
  assert.ok(!replaces(kept(1n, 9, 9000), kept(2n, 5, 7000), 5999));
});

test('any token replaces one that has ended', () => {
  assert.ok(replaces(kept(1n, 9, 9000), kept(2n, 5, 7000), 6000));
});

test('pauses double up to a limit, and are shortened by up to half', () => {
  assert.deepEqual(
    [1, 2, 3, 4, 5, 100].map((failures) => retryPause(failures, 0)),
    [100, 200, 400, 800, 1000, 1000],
  );
  assert.equal(reopeningPause(50, 0), 10_000);
  assert.equal(retryPause(1, 0.5), 75);
});

test('only the codes of a refused token say that a token was refused', () => {
  for (const [status, body, code] of [
    [401, '{"error":{"code":"61003"}}', '61003'],
    [400, '{"error":{"code":61004}}', '61004'],
    [500, '{"code":"61003"}', '61003'],
    [200, '{"code":"61003"}', undefined],
    [401, '{"error":{"code":"63001"}}', undefined],
    [401, '{"error":{"message":"61003"}}', undefined],
    [401, 'null', undefined],
    [401, '61003', undefined],
    [401, `{"code":"61003","text":"${'x'.repeat(65_536)}"}`, undefined],
  ] as const) {
    assert.equal(refusalIn(status, body), code);
    assert.equal(refusalIn(status, Buffer.from(body)), code);
  }
  assert.equal(refusalCode(401, { error: { code: 61003 } }), '61003');
});

test('a token goes to the host of its API only', () => {
  const { token } = keptFrom('acme', tokenAnswer({ apiBaseUrl: 'https://api.example/v1' }), 0, () => 0);
  checkHost('https://API.example:443/other', token);
  for (const url of ['http://api.example/v1', 'https://api.example:444/', 'https://api.example.evil/', 'x']) {
    assert.throws(
      () => {
        checkHost(url, token);
      },
      { kind: 'WRONG_HOST' },
    );
  }
});

test('calls go to connected endpoints in turn', () => {
  const { READY, CONNECTING, TRANSIENT_FAILURE, IDLE } = State;
  assert.equal(choose([READY, READY], 0, false), 1);
  assert.equal(choose([READY, READY], 1, false), 0);
  assert.equal(choose([READY, TRANSIENT_FAILURE, READY], 0, false), 2);
  assert.equal(choose([TRANSIENT_FAILURE, CONNECTING], 0, false), undefined);
  assert.equal(choose([TRANSIENT_FAILURE, CONNECTING], 0, true), 1);
  assert.equal(choose([TRANSIENT_FAILURE, TRANSIENT_FAILURE], 0, false), 1);
  assert.equal(choose([IDLE], -1, false), 0, 'a single channel waits by itself');
});

test('settings that contradict each other are refused', () => {
  for (const options of [
    { endpoints: [] },
    { endpoints: 'broker:50051' },
    { endpoints: 'ftp://broker' },
    { endpoints: 'http://user:password@127.0.0.1:1' },
    { endpoints: 'http://127.0.0.1:1/path' },
    { endpoints: 'http://127.0.0.1' },
    { endpoints: 'https://broker' },
    { endpoints: 'https://broker:' },
    { endpoints: 'https://[::1]/' },
    { endpoints: ['http://127.0.0.1:1', 'http://127.0.0.1'] },
    { endpoints: ['http://127.0.0.1:1', 'https://127.0.0.1:2'] },
    { endpoints: 'https://127.0.0.1:1', clientCertFile: 'cert' },
    { endpoints: 'http://127.0.0.1:1', caFile: 'ca' },
    { endpoints: 'http://broker.example:50051', bearerFile: 'bearer' },
    { endpoints: 'http://[::ffff:128.0.0.1]:1', bearerFile: 'bearer' },
    { endpoints: 'http://[::ffff:7f:1]:1', bearerFile: 'bearer' },
    { endpoints: 'http://[2001:db8::ffff:7f00:1]:1', bearerFile: 'bearer' },
    { endpoints: 'http://127.0.0.1:1', timeoutMs: 0 },
  ]) {
    assert.throws(() => settingsFrom(options), { kind: 'INVALID_ARGUMENT' });
  }
  for (const host of ['localhost', '127.1.2.3', '[::1]', '[::ffff:127.0.0.1]', '[::FFFF:7f01:203]']) {
    settingsFrom({ endpoints: `http://${host}:1`, bearerFile: 'bearer' });
  }
  for (const [endpoints, address] of [
    ['https://broker:443', 'broker:443'],
    ['http://broker:80/', 'broker:80'],
    ['https://[::1]:443', '[::1]:443'],
  ] as const) {
    assert.equal(settingsFrom({ endpoints }).endpoints[0]?.address, address);
  }
  settingsFrom({ endpoints: 'http://broker.example:1', bearerFile: 'bearer', allowPlaintextBearer: true });
});

test('settings come from the environment', () => {
  const options = optionsFromEnvironment(
    { TOKEN_BROKER_ENDPOINT: 'https://a:1, https://b:2', TOKEN_BROKER_CA_FILE: 'ca' },
    { timeoutMs: 7 },
  );
  const { endpoints, caFile, timeoutMs } = settingsFrom(options);
  assert.deepEqual(
    endpoints.map(({ address }) => address),
    ['a:1', 'b:2'],
  );
  assert.deepEqual([caFile, timeoutMs], ['ca', 7]);
});

test('an empty variable is one that is not set', () => {
  const environment = { TOKEN_BROKER_ENDPOINT: 'https://broker:443', TOKEN_BROKER_CA_FILE: '' };
  assert.equal(optionsFromEnvironment(environment, {}).caFile, undefined);
});

test('only the reasons of the broker itself count', () => {
  for (const [domain, kind, reason] of [
    ['token-broker', 'ACCOUNT_DISABLED', 'ACCOUNT_DISABLED'],
    ['proxy.example', 'INTERNAL', undefined],
    ['', 'INTERNAL', undefined],
  ] as const) {
    const status = {
      ...refusalOfBroker(Code.FAILED_PRECONDITION, 'ACCOUNT_DISABLED', 7n, domain),
      details: '',
    };
    const error = errorFromStatus(status as CallStatus, 'acme');
    assert.deepEqual([error.kind, error.reason, error.retryAfterMs], [kind, reason, 7000]);
    assert.equal(error.upstreamCode, reason && '61006');
  }
});

test('files for TLS that cannot be used are logged once, and again after they were well', () => {
  const folder = mkdtempSync(join(tmpdir(), 'token-broker-'));
  try {
    const caFile = join(folder, 'ca.pem');
    const good = rootCertificates[0] as string;
    writeFileSync(caFile, good);
    const warnings: string[] = [];
    const logger = { ...silent, warn: (message: string) => warnings.push(message) };
    const certificates = new Certificates(settingsFrom({ endpoints: 'https://broker:1', caFile, logger }));
    let expected = 0;
    for (const spoil of [
      () => {
        writeFileSync(caFile, 'nothing');
      },
      () => {
        rmSync(caFile);
      },
    ]) {
      for (let time = 0; time < 2; time++) {
        spoil();
        expected++;
        for (let look = 0; look < 3; look++) {
          assert.ok(!certificates.reload());
          assert.equal(warnings.length, expected);
        }
        writeFileSync(caFile, good);
        certificates.reload();
      }
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
});
