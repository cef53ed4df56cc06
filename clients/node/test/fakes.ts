// A clock that tests set, and a broker that answers from a script.
import { create } from '@bufbuild/protobuf';

import { TokenClient } from '../src/client.js';
import type { Clock } from '../src/clock.js';
import { type ErrorDetails, type ErrorKind, TokenBrokerError } from '../src/errors.js';
import {
  AccountEnded_Reason,
  type GetTokenResponse,
  GetTokenResponseSchema,
  type ReportRejectedTokenResponse,
  ReportRejectedTokenResponse_Outcome,
  ReportRejectedTokenResponseSchema,
  WatchTokensResponseSchema,
} from '../src/gen/token_broker/v1/token_broker_pb.js';
import type { Logger } from '../src/log.js';
import type { Stream, StreamEvents, Transport } from '../src/transport.js';

/** Lets everything happen that needs no time. */
export async function settle(): Promise<void> {
  for (let turn = 0; turn < 20; turn++) {
    await new Promise<void>((resolve) => setImmediate(resolve));
  }
}

export class FakeClock implements Clock {
  #time = 0;
  #timers: { at: number; action: () => void }[] = [];
  readonly now = () => this.#time;
  random = () => 0;

  after(ms: number, action: () => void): () => void {
    const timer = { at: this.#time + ms, action };
    this.#timers.push(timer);
    return () => {
      this.#timers = this.#timers.filter((other) => other !== timer);
    };
  }

  /** Lets time pass, with all timers that end meanwhile. */
  async advance(ms: number): Promise<void> {
    await settle();
    const end = this.#time + ms;
    for (;;) {
      const next = this.#timers.filter(({ at }) => at <= end).sort((a, b) => a.at - b.at)[0];
      if (next === undefined) {
        break;
      }
      this.#timers = this.#timers.filter((other) => other !== next);
      this.#time = Math.max(this.#time, next.at);
      next.action();
      await settle();
    }
    this.#time = end;
  }
}

export interface Call<T> {
  account: string;
  newerThan: bigint;
  timeoutMs: number;
  answer(value: T): void;
  fail(error: TokenBrokerError): void;
}

export class FakeStream {
  isCancelled = false;
  constructor(
    readonly accounts: readonly string[],
    readonly events: StreamEvents,
  ) {}

  push(account: string, fields: TokenFields): void {
    this.events.message(
      create(WatchTokensResponseSchema, { account, event: { case: 'token', value: tokenAnswer(fields) } }),
    );
  }

  end(account: string): void {
    const value = { reason: AccountEnded_Reason.REMOVED };
    this.events.message(create(WatchTokensResponseSchema, { account, event: { case: 'ended', value } }));
  }
}

export class FakeBroker implements Transport {
  readonly asks: Call<GetTokenResponse>[] = [];
  readonly reports: Call<ReportRejectedTokenResponse>[] = [];
  readonly streams: FakeStream[] = [];
  isClosed = false;

  getToken(account: string, newerThan: bigint, timeoutMs: number): Promise<GetTokenResponse> {
    return record(this.asks, account, newerThan, timeoutMs);
  }

  report(
    account: string,
    generation: bigint,
    _upstreamCode: string,
    timeoutMs: number,
  ): Promise<ReportRejectedTokenResponse> {
    return record(this.reports, account, generation, timeoutMs);
  }

  watch(accounts: readonly string[], events: StreamEvents): Stream {
    const stream = new FakeStream(accounts, events);
    this.streams.push(stream);
    return {
      cancel() {
        stream.isCancelled = true;
      },
    };
  }

  start(): void {
    // There are no files to look at.
  }

  close(): void {
    this.isClosed = true;
  }

  /** Returns the ask that the client has made last. */
  get ask(): Call<GetTokenResponse> {
    return this.asks.at(-1) ?? fail('nothing was asked');
  }

  get lastReport(): Call<ReportRejectedTokenResponse> {
    return this.reports.at(-1) ?? fail('nothing was reported');
  }

  get stream(): FakeStream {
    return this.streams.at(-1) ?? fail('no stream was opened');
  }
}

function record<T>(calls: Call<T>[], account: string, newerThan: bigint, timeoutMs: number): Promise<T> {
  return new Promise((resolve, reject) => {
    calls.push({ account, newerThan, timeoutMs, answer: resolve, fail: reject });
  });
}

function fail(text: string): never {
  throw new Error(text);
}

export interface TokenFields {
  generation?: bigint;
  apiBaseUrl?: string;
  reuseFor?: { seconds?: bigint; nanos?: number };
  expiresIn?: { seconds?: bigint; nanos?: number };
}

/** Returns an answer with a token of generation 1 for 60 s, which is to be kept for 40 s, unless told otherwise. */
export function tokenAnswer(fields: TokenFields = {}): GetTokenResponse {
  return create(GetTokenResponseSchema, {
    accessToken: `secret-${(fields.generation ?? 1n).toString()}`,
    generation: 1n,
    reuseFor: { seconds: 40n },
    expiresIn: { seconds: 60n },
    apiBaseUrl: 'http://127.0.0.1:9/api',
    ...fields,
  });
}

export function reportAnswer(
  outcome: keyof typeof ReportRejectedTokenResponse_Outcome,
  retryAfterSeconds = 0n,
): ReportRejectedTokenResponse {
  return create(ReportRejectedTokenResponseSchema, {
    outcome: ReportRejectedTokenResponse_Outcome[outcome],
    retryAfter: { seconds: retryAfterSeconds },
  });
}

export function errorOf(kind: ErrorKind, details: ErrorDetails = {}): TokenBrokerError {
  return new TokenBrokerError(kind, 'as the test says', { code: kind, ...details });
}

export const silent: Logger = { debug: () => undefined, warn: () => undefined };

/** Returns a client of a fake broker, with a fake clock. */
export function setUp(logger = silent): { client: TokenClient; broker: FakeBroker; clock: FakeClock } {
  const broker = new FakeBroker();
  const clock = new FakeClock();
  const client = new TokenClient({ endpoints: 'http://127.0.0.1:1', logger }, clock, () => broker);
  return { client, broker, clock };
}
