import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, beforeEach, test } from 'node:test';
import { rootCertificates } from 'node:tls';
import { inspect } from 'node:util';

import { status } from '@grpc/grpc-js';

import { TokenClient } from '../src/index.js';
import { serviceConfig } from '../src/service-config.js';
import { silent } from './fakes.js';
import { run } from './programs.js';
import { refusal, WireBroker } from './servers.js';

const folder = mkdtempSync(join(tmpdir(), 'token-broker-'));
const bearerFile = join(folder, 'bearer');
const broker = await new WireBroker().start();
after(() => {
  broker.stop();
  rmSync(folder, { recursive: true });
});
beforeEach(() => {
  writeFileSync(bearerFile, ' tbk_first\n');
  Object.assign(broker, { bearer: 'tbk_first', failures: [], asks: 0 });
});

async function using<T>(use: (client: TokenClient) => Promise<T>, endpoints = [broker.endpoint]): Promise<T> {
  const client = new TokenClient({ endpoints, bearerFile, logger: silent });
  try {
    return await use(client);
  } finally {
    client.close();
  }
}

test('a token comes from the broker', async () => {
  const token = await using((client) => client.token('acme'));
  assert.equal(token.value, 'secret-1');
});

test('a refusal has what the broker says about it', async () => {
  broker.failures = [refusal(status.FAILED_PRECONDITION, 'CREDENTIAL_REJECTED')];
  await using((client) =>
    assert.rejects(client.token('acme'), {
      kind: 'CREDENTIAL_REJECTED',
      account: 'acme',
      code: 'FAILED_PRECONDITION',
      reason: 'CREDENTIAL_REJECTED',
      upstreamCode: '61006',
    }),
  );
});

test('the pause of a retry is read from the status', async () => {
  broker.failures = [refusal(status.UNAVAILABLE, 'UPSTREAM_UNAVAILABLE', 7n)];
  await using((client) => assert.rejects(client.token('acme'), { kind: 'UNAVAILABLE', retryAfterMs: 7000 }));
  assert.equal(broker.asks, 1);
});

test('a bearer that was replaced in its file is used after the old one was refused', async () => {
  await using(async (client) => {
    broker.bearer = 'tbk_second';
    writeFileSync(bearerFile, 'tbk_second');
    await client.token('acme');
  });
  assert.equal(broker.asks, 2);
});

test('a bearer that is still the old one is refused', async () => {
  broker.bearer = 'tbk_second';
  await using((client) => assert.rejects(client.token('acme'), { kind: 'UNAUTHENTICATED' }));
  assert.equal(broker.asks, 1);
});

test('an endpoint that is away costs no error while another one answers', async () => {
  const away = await new WireBroker().start();
  away.stop();
  await using((client) => client.token('acme'), [away.endpoint, broker.endpoint]);
});

test('a client of a broker that is away can be made, and says what is wrong', async () => {
  const away = await new WireBroker().start();
  away.stop();
  await using(
    (client) => assert.rejects(client.token('acme', { timeoutMs: 300 }), { kind: 'UNAVAILABLE' }),
    [away.endpoint],
  );
});

test('a client without a usable bearer cannot be made, and does not quote the file', () => {
  writeFileSync(bearerFile, 'two words');
  assert.throws(
    () => new TokenClient({ endpoints: broker.endpoint, bearerFile }),
    (error: Error) => !error.message.includes('two words'),
  );
  assert.throws(() => new TokenClient({ endpoints: broker.endpoint, bearerFile: join(folder, 'none') }), {
    kind: 'INVALID_ARGUMENT',
    message: /none cannot be read: no such file/,
  });
});

test('a report that fails is not sent again', async () => {
  broker.reports = [];
  await using(async (client) => {
    const { generation } = await client.token('acme');
    broker.failures = [refusal(status.UNAVAILABLE, 'UPSTREAM_UNAVAILABLE')];
    await assert.rejects(client.report('acme', generation, '61003'), { kind: 'UNAVAILABLE' });
  });
  assert.equal(broker.reports.length, 1);
});

test('files are read in every encoding with a byte order mark', () => {
  const ca = Buffer.from(rootCertificates[0] ?? '').toString();
  const encodings: [string, (text: string) => Buffer][] = [
    ['UTF-8', (text) => Buffer.from(text)],
    ['UTF-8 with a mark', (text) => Buffer.from(`\ufeff${text}`)],
    ['UTF-16 little endian', (text) => Buffer.from(`\ufeff${text}`, 'utf16le')],
    ['UTF-16 big endian', (text) => Buffer.from(`\ufeff${text}`, 'utf16le').swap16()],
  ];
  const caFile = join(folder, 'ca');
  for (const [name, encode] of encodings) {
    writeFileSync(bearerFile, encode('tbk_x\r\n'));
    writeFileSync(caFile, encode(ca));
    assert.doesNotThrow(() => {
      new TokenClient({ endpoints: 'https://localhost:1', bearerFile, caFile }).close();
    }, name);
  }
  for (const malformed of ['\xff\xfet', '\xff\xfe\x00\xd8', '\xff\xfe\0\0t\0\0\0', 't\0b\0']) {
    writeFileSync(bearerFile, malformed, 'latin1');
    assert.throws(() => new TokenClient({ endpoints: broker.endpoint, bearerFile }), {
      kind: 'INVALID_ARGUMENT',
    });
  }
});

test('a secret that is given instead of a path is not quoted', () => {
  const pem = '-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----';
  const long = `canary/${'x'.repeat(300)}/y`;
  for (const secret of [
    'tbk_canary',
    'can/ary',
    'can\\nary',
    '/canary',
    '//canary',
    '///canary',
    '/canary/canary',
    'canary\0',
    '/etc/canary\n',
    'https://canary',
    `${bearerFile}/canary`,
    pem,
    pem.replaceAll('\n', '\\n'),
    long,
  ]) {
    for (const options of [
      { endpoints: broker.endpoint, bearerFile: secret },
      { endpoints: 'https://localhost:1', caFile: secret },
      { endpoints: 'https://localhost:1', clientCertFile: secret, clientKeyFile: bearerFile },
      { endpoints: 'https://localhost:1', clientCertFile: bearerFile, clientKeyFile: secret },
    ]) {
      assert.throws(
        () => new TokenClient(options),
        (error: Error) => !/canary|can\/ary|can\\+nary|BEGIN/.test(inspect(error)),
      );
    }
  }
});

test('a program ends by itself although its client is open', async () => {
  const program = `
    import { TokenClient } from '@token-broker/client';
    const client = new TokenClient({ endpoints: process.argv[1], bearerFile: process.argv[2] });
    const token = await client.token('acme');
    // By now the stream is open.
    await new Promise((resolve) => setTimeout(resolve, 500));
    console.log(token.value);`;
  const { code, output } = await run('module', program, [broker.endpoint, bearerFile]);
  assert.deepEqual([code, output], [0, 'secret-1\n']);
});

test('the package can be required too', async () => {
  const program = `
    const { TokenClient } = require('@token-broker/client');
    require('@token-broker/client/axios').addTokens;
    console.log(String(new TokenClient({ endpoints: 'http://127.0.0.1:1' })));`;
  const { output } = await run('commonjs', program);
  assert.equal(output, 'TokenClient(http://127.0.0.1:1)\n');
});

test('the service config is that of all clients', () => {
  const common = JSON.parse(readFileSync('../service_config.json', 'utf8')) as unknown;
  assert.deepEqual(serviceConfig, common);
});
