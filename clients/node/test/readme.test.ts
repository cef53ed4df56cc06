import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';

import { run } from './programs.js';
import { Api, WireBroker } from './servers.js';

const folder = mkdtempSync(join(tmpdir(), 'token-broker-'));
const bearerFile = join(folder, 'bearer');
writeFileSync(bearerFile, 'tbk_first');
const broker = await new WireBroker().start();
const api = await new Api((_request, response) => response.end('{}')).start();
broker.apiBaseUrl = api.url;
after(() => {
  broker.stop();
  api.stop();
  rmSync(folder, { recursive: true });
});

const programs = [...readFileSync('README.md', 'utf8').matchAll(/^```js\n(.*?)^```/gms)];

for (const [index, [, program]] of programs.entries()) {
  test(`example ${index + 1} of the README sends the token`, async () => {
    const environment = { TOKEN_BROKER_ENDPOINT: broker.endpoint, TOKEN_BROKER_BEARER_FILE: bearerFile };
    const { code, output } = await run('module', program ?? '', [], environment);
    assert.deepEqual([code, output], [0, '200\n']);
    const { url, authorization } = api.received.at(-1) ?? {};
    assert.deepEqual([url, authorization], ['/whoami', 'Bearer secret-1']);
  });
}

test('the lines in the documents are those of the first example', () => {
  const [, lines = ''] = /^```js\n(.*?)^```/ms.exec(readFileSync('../../docs/clients.md', 'utf8')) ?? [];
  for (const line of lines.trim().split('\n')) {
    assert.ok(line !== '' && programs[0]?.[1]?.includes(line), line);
  }
});

test('the README has examples', () => {
  assert.equal(programs.length, 2);
});
