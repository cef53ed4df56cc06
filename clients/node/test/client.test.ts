import assert from 'node:assert/strict';
import { test } from 'node:test';
import { inspect } from 'node:util';

import type { Token } from '../src/index.js';
import { errorOf, reportAnswer, settle, setUp, tokenAnswer } from './fakes.js';

/** Gives the client its first token, which is kept for 40 s and ends after 60 s. */
async function withToken() {
  const context = setUp();
  const call = context.client.token('acme');
  await settle();
  context.broker.ask.answer(tokenAnswer());
  const token = await call;
  return { ...context, token };
}

const kind = (expected: string) => (error: unknown) => (error as { kind: string }).kind === expected;

test('a token is used without a call until its reuse end', async () => {
  const { client, broker, clock, token } = await withToken();
  await clock.advance(39_999);
  assert.equal(await client.token('acme'), token);
  assert.equal(broker.asks.length, 1);
});

test('a hundred callers cause one ask', async () => {
  const { client, broker } = setUp();
  const calls = Array.from({ length: 100 }, () => client.token('acme'));
  await settle();
  assert.equal(broker.asks.length, 1);
  broker.ask.answer(tokenAnswer());
  assert.equal(new Set(await Promise.all(calls)).size, 1);
});

test('a caller that gives up does not disturb the others', async () => {
  const { client, broker } = setUp();
  const cancellation = new AbortController();
  const first = client.token('acme', { signal: cancellation.signal });
  const second = client.token('acme');
  await settle();
  cancellation.abort();
  await assert.rejects(first, kind('CANCELLED'));
  broker.ask.answer(tokenAnswer());
  assert.equal((await second).generation, 1n);
});

test('a caller whose signal times out hears why there was no answer', async () => {
  const { client, broker } = setUp();
  const cancellation = new AbortController();
  const call = client.token('acme', { signal: cancellation.signal });
  await settle();
  broker.ask.fail(errorOf('UNAVAILABLE'));
  await settle();
  // This is how `AbortSignal.timeout` aborts.
  cancellation.abort(new DOMException('', 'TimeoutError'));
  await assert.rejects(call, kind('UNAVAILABLE'));
});

test('a caller with a longer timeout causes another ask after the first one has timed out', async () => {
  const { client, broker, clock } = setUp();
  const short = client.token('acme', { timeoutMs: 1000 });
  const long = client.token('acme', { timeoutMs: 9000 });
  const refused = assert.rejects(short, kind('DEADLINE_EXCEEDED'));
  await settle();
  assert.equal(broker.ask.timeoutMs, 1000);
  await clock.advance(1000);
  await refused;
  broker.ask.fail(errorOf('DEADLINE_EXCEEDED'));
  await clock.advance(100);
  assert.equal(broker.asks.length, 2);
  assert.equal(broker.ask.timeoutMs, 7900);
  broker.ask.answer(tokenAnswer());
  await long;
});

test('an ask that fails for the time being is repeated, with growing pauses', async () => {
  const { client, broker, clock } = setUp();
  const call = client.token('acme');
  for (const pause of [100, 200, 400, 800, 1000]) {
    await settle();
    const count = broker.asks.length;
    broker.ask.fail(errorOf('UNAVAILABLE'));
    await clock.advance(pause - 1);
    assert.equal(broker.asks.length, count);
    await clock.advance(1);
    assert.equal(broker.asks.length, count + 1);
  }
  broker.ask.answer(tokenAnswer());
  await call;
});

test('the last error is told at the timeout', async () => {
  const { client, broker, clock } = setUp();
  const call = assert.rejects(client.token('acme', { timeoutMs: 1000 }), kind('OVERLOADED'));
  await settle();
  broker.ask.fail(errorOf('OVERLOADED'));
  await clock.advance(1000);
  await call;
});

test('an error is told at once if the pause is longer than the time that is left', async () => {
  const { client, broker } = setUp();
  const call = assert.rejects(client.token('acme'), kind('UNAVAILABLE'));
  await settle();
  broker.ask.fail(errorOf('UNAVAILABLE', { retryAfterMs: 5001 }));
  await call;
});

test('an error is told at once if the broker wants no other call', async () => {
  const { client, broker } = setUp();
  const call = assert.rejects(client.token('acme'), kind('UNAVAILABLE'));
  await settle();
  broker.ask.fail(errorOf('UNAVAILABLE', { noRetry: true }));
  await call;
});

test('after its reuse end a token is used while the broker is away', async () => {
  const { client, broker, clock, token } = await withToken();
  await clock.advance(40_000);
  const call = client.token('acme');
  await settle();
  broker.ask.fail(errorOf('UNAVAILABLE'));
  assert.equal(await call, token);

  // During the pause nothing is asked.
  await clock.advance(999);
  assert.equal(await client.token('acme'), token);
  assert.equal(broker.asks.length, 2);

  // The next pause is twice as long.
  await clock.advance(1);
  const next = client.token('acme');
  await settle();
  assert.equal(broker.asks.length, 3);
  broker.ask.fail(errorOf('UNAVAILABLE'));
  assert.equal(await next, token);
  await clock.advance(1999);
  assert.equal(await client.token('acme'), token);
  assert.equal(broker.asks.length, 3);
});

test('a slow broker delays a caller by two seconds at most while a token lives', async () => {
  const { client, broker, clock, token } = await withToken();
  await clock.advance(40_000);
  const call = client.token('acme', { timeoutMs: 10_000 });
  await clock.advance(2000);
  assert.equal(await call, token);
  // Later callers are not delayed, although the ask is still in flight.
  assert.equal(await client.token('acme'), token);
  broker.ask.answer(tokenAnswer({ generation: 2n }));
  await settle();
  assert.equal((await client.token('acme')).generation, 2n);
});

test('a token counts as ended one second before its end', async () => {
  const { client, broker, clock } = await withToken();
  await clock.advance(59_000);
  const call = assert.rejects(client.token('acme', { timeoutMs: 500 }), kind('UNAVAILABLE'));
  await settle();
  broker.ask.fail(errorOf('UNAVAILABLE'));
  await clock.advance(500);
  await call;
});

test('a token that is about to end when it arrives is not used', async () => {
  const { client, broker, clock } = setUp();
  const call = client.token('acme');
  await settle();
  broker.ask.answer(tokenAnswer({ reuseFor: { nanos: 1 }, expiresIn: { nanos: 900_000_000 } }));
  await clock.advance(100);
  broker.ask.answer(tokenAnswer({ generation: 2n }));
  assert.equal((await call).generation, 2n);
});

test('the life of a token counts from the time when it was asked for', async () => {
  const { client, broker, clock } = setUp();
  const call = client.token('acme');
  await clock.advance(4000);
  broker.ask.answer(tokenAnswer());
  assert.equal((await call).expiresInMs(), 56_000);
});

test('an answer with an older token is not used', async () => {
  const { client, broker, clock } = await withToken();
  await clock.advance(100);
  broker.stream.push('acme', { generation: 3n, reuseFor: { seconds: 1n } });
  await clock.advance(1000);
  const call = client.token('acme');
  await settle();
  broker.ask.answer(tokenAnswer({ generation: 2n }));
  assert.equal((await call).generation, 3n);
});

test('a refusal makes the client forget the token, and is remembered for a second', async () => {
  const { client, broker, clock } = await withToken();
  await clock.advance(40_000);
  const call = assert.rejects(client.token('acme'), kind('NOT_GRANTED'));
  await settle();
  broker.ask.fail(errorOf('NOT_GRANTED'));
  await call;
  await clock.advance(999);
  await assert.rejects(client.token('acme'), kind('NOT_GRANTED'));
  assert.equal(broker.asks.length, 2);
  await clock.advance(1);
  void client.token('acme').catch(() => undefined);
  await settle();
  assert.equal(broker.asks.length, 3);
  client.close();
});

test('an answer without a time for which to keep the token is an error', async () => {
  const { client, broker, clock } = setUp();
  const call = assert.rejects(client.token('acme', { timeoutMs: 50 }), kind('INTERNAL'));
  await settle();
  broker.ask.answer(tokenAnswer({ reuseFor: { seconds: 0n } }));
  await clock.advance(50);
  await call;
});

test('a closed client fails waiting and later calls, each with its account', async () => {
  const { client, broker, token } = await withToken();
  const closed = (account: string) => ({ kind: 'CLOSED', account });
  const waiting = assert.rejects(client.token('other'), closed('other'));
  const reporting = assert.rejects(client.report('acme', 1n, '61003'), closed('acme'));
  await settle();
  client.close();
  client.close();
  await waiting;
  await reporting;
  for (const call of [
    client.token('acme'),
    client.report('acme', 1n, '61003'),
    client.replace(token, '61003'),
  ]) {
    await assert.rejects(call, closed('acme'));
  }
  assert.ok(broker.isClosed);
});

test('a pushed token ends the wait for an answer', async () => {
  const { client, broker, clock } = await withToken();
  await clock.advance(59_500);
  const call = client.token('acme');
  await settle();
  broker.stream.push('acme', { generation: 2n });
  assert.equal((await call).generation, 2n);
});

test('a refused token is reported once for all who had it, and replaced', async () => {
  const { client, broker, token } = await withToken();
  const calls = Array.from({ length: 10 }, () => client.replace(token, '61003'));
  await settle();
  assert.equal(broker.reports.length, 1);
  broker.lastReport.answer(reportAnswer('REISSUING'));
  await settle();
  assert.equal(broker.asks.length, 2);
  assert.equal(broker.ask.newerThan, 1n);
  broker.ask.answer(tokenAnswer({ generation: 2n }));
  const found = new Set((await Promise.all(calls)).map((newer) => newer?.generation));
  assert.deepEqual(found, new Set([2n]));
});

test('a refused token that was replaced already is not reported', async () => {
  const { client, broker, clock, token } = await withToken();
  await clock.advance(100);
  broker.stream.push('acme', { generation: 2n });
  assert.equal((await client.replace(token, '61003'))?.generation, 2n);
  assert.equal(broker.reports.length, 0);
});

test('a report that comes too soon is repeated after the pause', async () => {
  const { client, broker, clock, token } = await withToken();
  const call = client.replace(token, '61003');
  await settle();
  broker.lastReport.answer(reportAnswer('TOO_SOON', 3n));
  await clock.advance(3000);
  assert.equal(broker.reports.length, 2);
  broker.lastReport.answer(reportAnswer('ALREADY_REPLACED'));
  await settle();
  broker.ask.answer(tokenAnswer({ generation: 2n }));
  assert.equal((await call)?.generation, 2n);
});

for (const [situation, act] of [
  ['the pause is longer than the timeout', reportAnswer('TOO_SOON', 6n)],
  ['the token is not at fault', reportAnswer('NOT_A_TOKEN_FAULT')],
  ['the report fails', errorOf('NOT_GRANTED')],
] as const) {
  test(`a refused token is not replaced if ${situation}`, async () => {
    const { client, broker, token } = await withToken();
    const call = client.replace(token, '61003');
    await settle();
    if (act instanceof Error) {
      broker.lastReport.fail(act);
    } else {
      broker.lastReport.answer(act);
    }
    assert.equal(await call, undefined);
    // Nobody forgets a token because of that.
    assert.equal(await client.token('acme'), token);
  });
}

test('no text form and no message contains a token', async () => {
  const messages: string[] = [];
  const { client, broker, clock } = setUp({
    debug: (message) => messages.push(message),
    warn: (message) => messages.push(message),
  });
  const call = client.token('acme');
  await settle();
  broker.ask.answer(tokenAnswer());
  const token: Token = await call;
  await clock.advance(40_000);
  const refused = client.token('acme').catch((error: unknown) => error);
  await settle();
  broker.ask.fail(errorOf('NOT_GRANTED'));
  for (const thing of [client, token, await refused, { token }]) {
    messages.push(inspect(thing, { showHidden: true, depth: null }), String(thing), JSON.stringify(thing));
  }
  assert.ok(messages.length > 12);
  assert.doesNotMatch(messages.join('\n'), /secret/);
});

test('a report whose caller has cancelled already is not sent', async () => {
  const { client, broker, token } = await withToken();
  const signal = AbortSignal.abort();
  await assert.rejects(client.report('acme', 1n, '61003', { signal }), kind('CANCELLED'));
  await assert.rejects(client.replace(token, '61003', { signal }), kind('CANCELLED'));
  assert.equal(broker.reports.length, 0);
});

test('a report that fails after its caller has cancelled does not end the program', async () => {
  const { client, broker } = await withToken();
  const cancellation = new AbortController();
  const { signal } = cancellation;
  const call = assert.rejects(client.report('acme', 1n, '61003', { signal }), kind('CANCELLED'));
  await settle();
  cancellation.abort();
  await call;
  broker.lastReport.fail(errorOf('UNAVAILABLE'));
  await settle();
});

test('a pause of zero that the broker asks for does not make a loop without pauses', async () => {
  const { client, broker, clock } = setUp();
  const call = client.token('acme');
  await settle();
  broker.ask.fail(errorOf('UNAVAILABLE', { retryAfterMs: 0 }));
  await clock.advance(99);
  assert.equal(broker.asks.length, 1);
  await clock.advance(1);
  broker.ask.answer(tokenAnswer());
  await call;
});

test('an answer that is not newer than the refused token does not replace it', async () => {
  const { client, broker, clock, token } = await withToken();
  const call = client.replace(token, '61003', { timeoutMs: 1000 });
  await settle();
  broker.lastReport.answer(reportAnswer('REISSUING'));
  await settle();
  broker.ask.answer(tokenAnswer());
  await clock.advance(1000);
  assert.equal(await call, undefined);
});

test('accounts of which there is nothing to know are forgotten', async () => {
  const { client, broker, clock, token } = await withToken();
  for (let index = 0; index < 2000; index++) {
    const call = assert.rejects(client.token(`name-${index.toString()}`), kind('NO_SUCH_ACCOUNT'));
    await Promise.resolve();
    broker.ask.fail(errorOf('NO_SUCH_ACCOUNT'));
    await call;
    if (index === 1500) {
      await clock.advance(1000);
    }
  }
  assert.equal(client.knownAccounts, 499 + 1);
  assert.equal(await client.token('acme'), token);
});

test('a timeout must be above zero', async () => {
  const { client } = setUp();
  for (const timeoutMs of [0, -1, NaN]) {
    await assert.rejects(client.token('acme', { timeoutMs }), kind('INVALID_ARGUMENT'));
  }
});

const brokenLogs: Record<string, () => unknown> = {
  throws: () => {
    throw new Error('as the test says');
  },
  'returns a promise that is rejected': () => Promise.reject(new Error('as the test says')),
};
for (const [what, fail] of Object.entries(brokenLogs)) {
  test(`a logger that ${what} keeps no caller waiting and does not end the watch`, async () => {
    const { client, broker, clock } = setUp({ debug: fail, warn: fail });
    const call = client.token('acme');
    await settle();
    broker.ask.answer(tokenAnswer());
    await call;
    const refused = assert.rejects(client.token('other'), kind('NOT_GRANTED'));
    await settle();
    broker.ask.fail(errorOf('NOT_GRANTED'));
    await refused;
    await clock.advance(100);
    broker.stream.push('acme', { generation: 2n, reuseFor: { seconds: 0n } });
    broker.stream.push('acme', { generation: 3n });
    assert.equal((await client.token('acme')).generation, 3n);
    broker.stream.events.ended(errorOf('UNAUTHENTICATED'), false);
    await clock.advance(10_000);
    assert.equal(broker.streams.length, 2);
    broker.stream.push('acme', { generation: 4n });
    assert.equal((await client.token('acme')).generation, 4n);
    broker.stream.end('acme');
    const ended = assert.rejects(client.token('acme'), kind('NO_SUCH_ACCOUNT'));
    await settle();
    broker.ask.fail(errorOf('NO_SUCH_ACCOUNT'));
    await ended;
  });
}
