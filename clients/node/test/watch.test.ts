import assert from 'node:assert/strict';
import { test } from 'node:test';

import type { TokenClient } from '../src/client.js';
import { errorOf, type FakeBroker, settle, setUp, tokenAnswer } from './fakes.js';

async function getToken(client: TokenClient, broker: FakeBroker, account: string) {
  const call = client.token(account);
  await settle();
  broker.ask.answer(tokenAnswer());
  return await call;
}

/** A client that watches `acme` on a stream that the broker has accepted. */
async function watching() {
  const context = setUp();
  await getToken(context.client, context.broker, 'acme');
  await context.clock.advance(100);
  context.broker.stream.push('acme', {});
  return context;
}

const kind = (expected: string) => (error: unknown) => (error as { kind: string }).kind === expected;

test('accounts are watched after their first token, those of 100 ms together', async () => {
  const { client, broker, clock } = setUp();
  await getToken(client, broker, 'acme');
  await clock.advance(99);
  await getToken(client, broker, 'other');
  assert.equal(broker.streams.length, 0);
  await clock.advance(1);
  assert.deepEqual(broker.stream.accounts, ['acme', 'other']);
});

test('a stream has a thousand accounts, and the next one is asked for at its reuse end', async () => {
  const { client, broker, clock } = setUp();
  for (let number = 0; number <= 1000; number++) {
    await getToken(client, broker, `acme-${String(number)}`);
  }
  await clock.advance(100);
  assert.equal(broker.stream.accounts.length, 1000);
  assert.ok(!broker.stream.accounts.includes('acme-1000'));
  const asks = broker.asks.length;
  await client.token('acme-1000');
  assert.equal(broker.asks.length, asks, 'it is kept all the same');
  broker.stream.push('acme-0', {});
  // An end makes room for the next addition.
  broker.stream.end('acme-0');
  await getToken(client, broker, 'other');
  await clock.advance(5000);
  assert.equal(broker.stream.accounts.length, 1000);
  assert.ok(broker.stream.accounts.includes('other'));
});

test('a pushed token is used at once', async () => {
  const { client, broker } = await watching();
  broker.stream.push('acme', { generation: 2n });
  assert.equal((await client.token('acme')).generation, 2n);
  assert.equal(broker.asks.length, 1);
});

test('a stream for additions takes the place of the old one when the broker has accepted it', async () => {
  const { client, broker, clock } = await watching();
  const old = broker.stream;
  await getToken(client, broker, 'other');
  await clock.advance(4999);
  assert.equal(broker.streams.length, 1, 'not within 5 s of the last one');
  await clock.advance(1);
  assert.deepEqual(broker.stream.accounts, ['acme', 'other']);
  assert.ok(!old.isCancelled);
  broker.stream.events.opened();
  assert.ok(old.isCancelled);
});

test('the end of an account makes the client forget its token', async () => {
  const { client, broker } = await watching();
  broker.stream.end('acme');
  const call = assert.rejects(client.token('acme'), kind('NO_SUCH_ACCOUNT'));
  await settle();
  broker.ask.fail(errorOf('NO_SUCH_ACCOUNT'));
  await call;
});

test('a stream that had delivered something is opened again at once', async () => {
  const { client, broker, clock } = await watching();
  await clock.advance(1000);
  broker.stream.events.ended(errorOf('UNAVAILABLE'), false);
  await clock.advance(0);
  assert.equal(broker.streams.length, 2);
  assert.equal((await client.token('acme')).generation, 1n, 'the kept token stays in use');
});

test('a stream that had delivered nothing is opened again after growing pauses', async () => {
  const { broker, clock } = await watching();
  broker.stream.events.ended(undefined, false);
  await clock.advance(0);
  for (const pause of [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]) {
    const count = broker.streams.length;
    broker.stream.events.ended(errorOf('UNAVAILABLE'), false);
    await clock.advance(pause - 1);
    assert.equal(broker.streams.length, count);
    await clock.advance(1);
    assert.equal(broker.streams.length, count + 1);
  }
});

test('a refused bearer that was replaced is used at once', async () => {
  const { client, broker, clock } = await watching();
  broker.stream.events.ended(errorOf('UNAUTHENTICATED'), true);
  await clock.advance(0);
  assert.equal(broker.streams.length, 2);
  assert.equal((await client.token('acme')).generation, 1n);
});

test('a refused bearer makes the client forget all tokens, and try again after 10 s', async () => {
  const { client, broker, clock } = await watching();
  broker.stream.events.ended(errorOf('UNAUTHENTICATED'), false);
  const call = assert.rejects(client.token('acme'), kind('UNAUTHENTICATED'));
  await settle();
  broker.ask.fail(errorOf('UNAUTHENTICATED'));
  await call;
  await clock.advance(9999);
  assert.equal(broker.streams.length, 1);
  await clock.advance(1);
  assert.equal(broker.streams.length, 2);
});

test('a refused stream makes the client ask for each of its accounts', async () => {
  const { client, broker, clock } = await watching();
  broker.stream.events.ended(errorOf('NOT_GRANTED'), false);
  await clock.advance(20_000);
  assert.equal(broker.streams.length, 1, 'no account is left to watch');
  const call = client.token('acme');
  await settle();
  broker.ask.answer(tokenAnswer({ generation: 2n }));
  await call;
  await clock.advance(100);
  assert.deepEqual(broker.stream.accounts, ['acme']);
  assert.equal(broker.streams.length, 2);
});

test('an account that nobody has used for an hour is watched no longer', async () => {
  const { client, broker, clock } = await watching();
  await clock.advance(3_600_001);
  await getToken(client, broker, 'other');
  await clock.advance(100);
  assert.deepEqual(broker.stream.accounts, ['other']);
});

test('an account that leaves the watch unused is asked for when it is used again', async () => {
  const { client, broker, clock } = setUp();
  const call = client.token('acme');
  await settle();
  const day = { seconds: 86_400n };
  broker.ask.answer(tokenAnswer({ reuseFor: day, expiresIn: day }));
  await call;
  await clock.advance(100);
  broker.stream.events.opened();
  await clock.advance(3_600_001);
  await getToken(client, broker, 'other');
  await clock.advance(100);
  assert.deepEqual(broker.stream.accounts, ['other']);
  const again = client.token('acme');
  await settle();
  assert.equal(broker.asks.length, 3, 'a revocation of the kept token would not have been heard');
  broker.ask.answer(tokenAnswer({ generation: 2n }));
  assert.equal((await again).generation, 2n);
});

test('an opening that the broker does not answer is given up after 20 s', async () => {
  const { client, broker, clock } = setUp();
  await getToken(client, broker, 'acme');
  await clock.advance(100);
  await clock.advance(19_999);
  assert.ok(!broker.stream.isCancelled);
  await clock.advance(1);
  assert.ok(broker.stream.isCancelled);
  await clock.advance(100);
  assert.equal(broker.streams.length, 2);
  broker.stream.events.opened();
  await clock.advance(20_000);
  assert.ok(!broker.stream.isCancelled, 'a stream that was accepted may be silent');
});

test('a closed client has no stream', async () => {
  const { client, broker, clock } = await watching();
  client.close();
  assert.ok(broker.stream.isCancelled);
  await clock.advance(100_000);
  assert.equal(broker.streams.length, 1);
});

test('streams that end soon after they were opened are not opened again in a loop', async () => {
  const { broker, clock } = await watching();
  for (const pause of [100, 200, 400]) {
    const count = broker.streams.length;
    broker.stream.events.ended(undefined, false);
    await clock.advance(pause - 1);
    assert.equal(broker.streams.length, count);
    await clock.advance(1);
    assert.equal(broker.streams.length, count + 1);
    broker.stream.push('acme', {});
  }
});

test('the broker can ask for a pause before a stream is opened again, of 30 s at most', async () => {
  const { broker, clock } = await watching();
  await clock.advance(1000);
  broker.stream.events.ended(errorOf('UNAVAILABLE', { retryAfterMs: 3_600_000 }), false);
  await clock.advance(29_999);
  assert.equal(broker.streams.length, 1);
  await clock.advance(1);
  assert.equal(broker.streams.length, 2);
});
