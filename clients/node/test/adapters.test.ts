import assert from 'node:assert/strict';
import type { ServerResponse } from 'node:http';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, beforeEach, describe, test } from 'node:test';
import { inspect } from 'node:util';

import axios from 'axios';

import { addTokens } from '../src/axios.js';
import { createFetch, TokenClient } from '../src/index.js';
import { silent } from './fakes.js';
import { Api, type Received, WireBroker } from './servers.js';

const folder = mkdtempSync(join(tmpdir(), 'token-broker-'));
const bearerFile = join(folder, 'bearer');
writeFileSync(bearerFile, 'tbk_first');
const broker = await new WireBroker().start();

/** The answers to requests with the first token and with its successor. */
let answers: ((response: ServerResponse, request: Received) => void)[];
const api = await new Api((request, response) => {
  const answer = request.authorization === 'Bearer secret-1' ? answers[0] : answers[1];
  answer?.(response, request);
}).start();
const stranger = await new Api((_request, response) => response.end('stranger')).start();
broker.apiBaseUrl = `${api.url}/api`;

let client: TokenClient;
beforeEach(() => {
  broker.generation = 1n;
  broker.reports = [];
  api.received.length = 0;
  answers = [fine, fine];
  client = new TokenClient({ endpoints: broker.endpoint, bearerFile, logger: silent });
});
after(() => {
  broker.stop();
  api.stop();
  stranger.stop();
  rmSync(folder, { recursive: true });
});

const fine = (response: ServerResponse, { body }: Received) => {
  response.end(`fine ${body}`);
};
const failing = (body: string) => (response: ServerResponse) => {
  response.writeHead(401, { 'content-type': 'application/json' }).end(body);
};
const refused = failing('{"error":{"code":"61003"}}');
const redirect =
  (status: number, location: () => string) =>
  (response: ServerResponse, { url }: Received) => {
    if (url === '/target') {
      response.end('target');
    } else {
      response.writeHead(status, { location: location() }).end();
    }
  };

type Send = (url: string, body?: string | ReadableStream) => Promise<{ status: number; body: string }>;

const adapters: Record<string, () => Send> = {
  fetch: () => {
    const send = createFetch(client, 'acme');
    return async (url, body) => {
      const init = body === undefined ? {} : { method: 'POST', body, duplex: 'half' as const };
      const response = await send(url, init);
      return { status: response.status, body: await response.text() };
    };
  },
  axios: () => {
    const instance = axios.create({ responseType: 'text' });
    addTokens(instance, client, 'acme');
    return async (url, data) => {
      const response = await instance.request<string>({
        url,
        method: data === undefined ? 'GET' : 'POST',
        data,
        validateStatus: () => true,
      });
      return { status: response.status, body: response.data };
    };
  },
};

for (const [name, adapter] of Object.entries(adapters)) {
  describe(name, () => {
    const using = async <T>(use: (send: Send) => Promise<T>): Promise<T> => {
      try {
        return await use(adapter());
      } finally {
        client.close();
      }
    };

    test('a request has the token', async () => {
      const answer = await using((send) => send(`${api.url}/x`));
      assert.deepEqual(answer, { status: 200, body: 'fine ' });
      assert.equal(api.received[0]?.authorization, 'Bearer secret-1');
    });

    test('a refused token is reported, and the request is sent again with the next one', async () => {
      answers[0] = refused;
      const answer = await using((send) => send(`${api.url}/x`, 'a body'));
      assert.deepEqual(answer, { status: 200, body: 'fine a body' });
      assert.deepEqual(
        broker.reports.map(({ generation, upstreamCode }) => [generation, upstreamCode]),
        [[1n, '61003']],
      );
    });

    test('a request is sent again only once', async () => {
      answers = [refused, refused];
      const answer = await using((send) => send(`${api.url}/x`));
      assert.deepEqual(answer, { status: 401, body: '{"error":{"code":"61003"}}' });
      assert.equal(api.received.length, 2);
      assert.equal(broker.reports.length, 1);
    });

    test('the program gets other answers as they are', async () => {
      for (const body of ['{"error":{"code":"63001"}}', 'no JSON', '', `"${'x'.repeat(100_000)}"`]) {
        answers[0] = failing(body);
        client = new TokenClient({ endpoints: broker.endpoint, bearerFile, logger: silent });
        assert.deepEqual(await using((send) => send(`${api.url}/x`)), { status: 401, body });
      }
      assert.equal(broker.reports.length, 0);
    });

    test('no other host gets the token', async () => {
      await using((send) => assert.rejects(send(stranger.url), { kind: 'WRONG_HOST' }));
    });

    test('no other host gets the token by a redirect', async () => {
      answers[0] = redirect(302, () => stranger.url);
      await using((send) => assert.rejects(send(`${api.url}/x`), { kind: 'WRONG_HOST' }));
      assert.equal(stranger.received.length, 0);
    });

    test('a redirect within the host of the API is followed', async () => {
      answers[0] = redirect(302, () => '/target');
      const answer = await using((send) => send(`${api.url}/x`, 'a body'));
      assert.deepEqual(answer, { status: 200, body: 'target' });
      assert.deepEqual(
        api.received.map(({ method, authorization }) => [method, authorization]),
        [
          ['POST', 'Bearer secret-1'],
          ['GET', 'Bearer secret-1'],
        ],
      );
    });
  });
}

test('fetch: a stream is not sent again, but its token is reported', async () => {
  answers[0] = refused;
  const body = new Blob(['a stream']).stream();
  const answer = await adapters.fetch?.()(`${api.url}/x`, body);
  client.close();
  assert.equal(answer?.status, 401);
  assert.equal(broker.reports.length, 1);
  assert.deepEqual(
    api.received.map((request) => request.body),
    ['a stream'],
  );
});

test('fetch: the body of a Request is sent as a stream', async () => {
  const send = createFetch(client, 'acme');
  const response = await send(new Request(`${api.url}/x`, { method: 'POST', body: 'a body' }));
  client.close();
  assert.equal(await response.text(), 'fine a body');
});

test('fetch: an answer whose body breaks off keeps its status', async () => {
  answers[0] = (response) => {
    response.writeHead(502, { 'content-length': 10 }).write('x', () => response.destroy());
  };
  const response = await createFetch(client, 'acme')(`${api.url}/x`);
  client.close();
  assert.equal(response.status, 502);
  await assert.rejects(response.text());
});

test('fetch: who cancels gets the reason back', async () => {
  const signal = AbortSignal.abort(new RangeError('enough'));
  await assert.rejects(createFetch(client, 'acme')(api.url, { signal }), RangeError);
  client.close();
});

test('axios: an interceptor that runs later cannot send the token to another host', async () => {
  const instance = axios.create({ baseURL: api.url });
  instance.interceptors.request.use((config) => {
    config.baseURL = stranger.url;
    return config;
  });
  addTokens(instance, client, 'acme');
  stranger.received.length = 0;
  await assert.rejects(instance.get('/x'), { kind: 'WRONG_HOST' });
  client.close();
  assert.equal(stranger.received.length, 0);
});

test('axios: no answer and no error contains the token', async () => {
  answers[0] = failing('{}');
  const instance = axios.create();
  addTokens(instance, client, 'acme');
  const withAnswer: unknown = await instance.get(`${api.url}/x`).catch((error: unknown) => error);
  const answer = await instance.get(`${api.url}/x`, { validateStatus: () => true });
  answers[0] = (response) => response.destroy();
  const withoutAnswer: unknown = await instance.get(`${api.url}/x`).catch((error: unknown) => error);
  client.close();
  assert.equal((withAnswer as { response: { status: number } }).response.status, 401);
  assert.equal(answer.status, 401);
  assert.ok(withoutAnswer instanceof Error);
  for (const outcome of [withAnswer, answer, withoutAnswer]) {
    assert.doesNotMatch(inspect(outcome, { depth: Infinity }), /secret-1/);
  }
  assert.doesNotMatch(JSON.stringify([withAnswer, withoutAnswer, answer.config]), /secret-1/);
});

test('axios: the interceptors can be removed', async () => {
  const instance = axios.create();
  const remove = addTokens(instance, client, 'acme');
  remove();
  await instance.get(`${api.url}/x`);
  client.close();
  assert.equal(api.received[0]?.authorization, undefined);
});
