import { setMaxListeners } from 'node:events';
import { inspect } from 'node:util';

import { Ask } from './ask.js';
import { type Clock, systemClock } from './clock.js';
import {
  decide,
  isUsable,
  type Knowledge,
  renewalPause,
  RENEWAL_WAIT_MS,
  REFUSAL_MS,
  replaces,
} from './decisions.js';
import { TokenBrokerError } from './errors.js';
import {
  type ReportRejectedTokenResponse,
  ReportRejectedTokenResponse_Outcome,
} from './gen/token_broker/v1/token_broker_pb.js';
import { GrpcTransport } from './grpc.js';
import { optionsFromEnvironment, type Settings, settingsFrom, type TokenClientOptions } from './settings.js';
import { type Kept, keptFrom, milliseconds, type Token } from './token.js';
import type { Transport } from './transport.js';
import { type Limits, pause, throwIfClosed, throwIfOver, waitForShared } from './waiting.js';
import { Watch } from './watch.js';

/** How long one call waits. */
export interface CallOptions {
  /** The timeout in milliseconds; the client's, if it is absent. */
  timeoutMs?: number | undefined;
  /** Ends the wait of this call. What it waits for goes on for other callers. */
  signal?: AbortSignal | undefined;
}

/** What the broker does after a report, and what the caller should do next. */
export type ReportOutcome = 'REISSUING' | 'ALREADY_REPLACED' | 'TOO_SOON' | 'NOT_A_TOKEN_FAULT';

/** The answer to a report. */
export interface Report {
  outcome: ReportOutcome;
  /** How long to wait before another report, in milliseconds. */
  retryAfterMs: number | undefined;
}

/** How long is waited at least before a report that came too soon is repeated. */
const SHORTEST_REPORT_PAUSE_MS = 100;

/** Up to how many accounts are never forgotten. */
const MOST_UNPRUNED = 1000;

/** The report of one refused token, for all who had it. */
class SharedReport {
  users = 0;
  answer: Promise<Report>;

  constructor(
    private readonly call: (timeoutMs: number) => Promise<Report>,
    timeoutMs: number,
  ) {
    this.answer = this.send(timeoutMs);
  }

  send(timeoutMs: number): Promise<Report> {
    this.answer = this.call(timeoutMs);
    // All who waited may have given up, and a rejection that nobody handles ends the program.
    this.answer.catch(() => undefined);
    return this.answer;
  }
}

/** What the client knows of an account, and what it does for it at present. */
class AccountState implements Knowledge {
  kept: Kept | undefined;
  refusal: { error: TokenBrokerError; until: number } | undefined;
  pausedUntil = 0;
  /** How many asks in a row have failed while a kept token lived. */
  failedRenewals = 0;
  lastUsed = 0;
  /** The asks in flight, by the generation that their answer must exceed. */
  readonly asks = new Map<bigint, Ask>();
  /** The reports of refused tokens, by generation, as long as somebody replaces that token. */
  readonly reports = new Map<bigint, SharedReport>();

  constructor(readonly name: string) {}
}

/**
 * Gives a program the live tokens of accounts. A program makes one client, and shares it.
 *
 * The client keeps each token for as long as the broker says, and hears of replacements at once. It opens
 * connections with the first call, and does not keep the program running.
 */
export class TokenClient {
  readonly #settings: Settings;
  readonly #clock: Clock;
  readonly #transport: Transport;
  readonly #watch: Watch;
  readonly #accounts = new Map<string, AccountState>();
  readonly #closing = new AbortController();
  #isStarted = false;
  /** How many accounts are known when those are forgotten next of which there is nothing to know. */
  #pruneAt = MOST_UNPRUNED;

  /** Throws an `INVALID_ARGUMENT` error if the options cannot be used. */
  constructor(options: TokenClientOptions);
  /** @internal */
  // eslint-disable-next-line @typescript-eslint/unified-signatures -- this one is not published
  constructor(options: TokenClientOptions, clock?: Clock, makeTransport?: (settings: Settings) => Transport);
  constructor(
    options: TokenClientOptions,
    clock: Clock = systemClock,
    makeTransport: (settings: Settings) => Transport = (settings) => new GrpcTransport(settings, clock),
  ) {
    this.#settings = settingsFrom(options);
    this.#clock = clock;
    this.#transport = makeTransport(this.#settings);
    // Each waiting call listens.
    setMaxListeners(0, this.#closing.signal);
    this.#watch = new Watch(
      clock,
      this.#transport,
      {
        token: (account, answer) => {
          this.#pushed(account, () => keptFrom(account, answer, clock.now(), clock.now));
        },
        ended: (account) => {
          this.#account(account).kept = undefined;
        },
        left: (accounts) => {
          this.#expire(accounts);
        },
        unauthenticated: () => {
          for (const state of this.#accounts.values()) {
            state.kept = undefined;
          }
        },
        lastUsed: (account) => this.#account(account).lastUsed,
      },
      this.#settings.logger,
    );
  }

  /**
   * Makes a client with the settings of `TOKEN_BROKER_ENDPOINT`, `TOKEN_BROKER_BEARER_FILE`,
   * `TOKEN_BROKER_CA_FILE`, `TOKEN_BROKER_CLIENT_CERT` and `TOKEN_BROKER_CLIENT_KEY`, and the given ones.
   */
  static fromEnvironment(others: Partial<TokenClientOptions> = {}): TokenClient {
    return new TokenClient(optionsFromEnvironment(process.env, others));
  }

  /** Returns a live token of the account: the kept one if it may be used, otherwise the broker's. */
  async token(account: string, options: CallOptions = {}): Promise<Token> {
    const limits = this.#limits(account, options);
    for (;;) {
      const state = this.#account(account);
      state.lastUsed = this.#clock.now();
      throwIfClosed(account, limits.closing);
      const now = this.#clock.now();
      switch (decide(state, now)) {
        case 'use':
          return (state.kept as Kept).token;
        case 'refuse':
          throw (state.refusal as { error: TokenBrokerError }).error;
        case 'ask':
          return await this.#ask(state, 0n, limits).wait(limits);
        case 'renew': {
          const renewed = await this.#renew(state, limits);
          if (renewed) {
            return renewed;
          }
        }
      }
    }
  }

  /** Tells the broker that the API refused the token of this generation, with the API's code. */
  async report(
    account: string,
    generation: bigint,
    upstreamCode: string,
    options: CallOptions = {},
  ): Promise<Report> {
    const limits = this.#limits(account, options);
    const state = this.#account(account);
    return await this.#withReport(state, generation, upstreamCode, limits, (report) =>
      waitForShared(this.#clock, limits, report.answer),
    );
  }

  /**
   * Reports a token that the API refused, and returns a newer one. Returns `undefined` if there is none within
   * the timeout, or if the broker says that the token was not at fault; the API's answer is then final.
   *
   * `createFetch` and the interceptor for axios do this on their own.
   */
  async replace(refused: Token, upstreamCode: string, options: CallOptions = {}): Promise<Token | undefined> {
    const { account, generation } = refused;
    const limits = this.#limits(account, options);
    const state = this.#account(account);
    try {
      const newer = this.#newerThan(state, generation);
      if (newer) {
        return newer;
      }
      return await this.#withReport(state, generation, upstreamCode, limits, (report) =>
        this.#successor(state, generation, report, limits),
      );
    } catch (error) {
      if (isKind(error, 'CANCELLED') || isKind(error, 'CLOSED')) {
        throw error;
      }
      this.#settings.logger.warn(`account ${account}: a refused token was not replaced: ${String(error)}`);
      return undefined;
    }
  }

  /** Ends the stream and the connections. Calls that wait, and later ones, fail with `CLOSED`. */
  close(): void {
    if (!this.#closing.signal.aborted) {
      this.#closing.abort();
      this.#watch.close();
      this.#transport.close();
    }
  }

  /** @internal */
  get knownAccounts(): number {
    return this.#accounts.size;
  }

  toString(): string {
    return `TokenClient(${this.#settings.endpoints.map(({ url }) => url).join(',')})`;
  }

  toJSON(): object {
    const { endpoints, secure, logger, ...others } = this.#settings;
    return { endpoints: endpoints.map(({ url }) => url), ...others };
  }

  [inspect.custom](_depth: number, options: object): string {
    return `TokenClient ${inspect(this.toJSON(), options)}`;
  }

  #limits(account: string, { timeoutMs = this.#settings.timeoutMs, signal }: CallOptions): Limits {
    throwIfClosed(account, this.#closing.signal);
    if (!(timeoutMs > 0)) {
      throw new TokenBrokerError('INVALID_ARGUMENT', 'the timeout must be above zero', { account });
    }
    if (!this.#isStarted) {
      this.#isStarted = true;
      this.#transport.start(() => {
        this.#watch.reopen();
      });
    }
    return { account, deadline: this.#clock.now() + timeoutMs, signal, closing: this.#closing.signal };
  }

  #account(name: string): AccountState {
    let state = this.#accounts.get(name);
    if (state === undefined) {
      if (this.#accounts.size >= this.#pruneAt) {
        this.#prune();
      }
      state = new AccountState(name);
      this.#accounts.set(name, state);
    }
    return state;
  }

  /** Forgets the accounts of which there is nothing to know, so that names that users type fill no memory. */
  #prune(): void {
    const now = this.#clock.now();
    for (const [name, state] of this.#accounts) {
      if (isIdle(state, now) && !this.#watch.has(name)) {
        this.#accounts.delete(name);
      }
    }
    this.#pruneAt = Math.max(MOST_UNPRUNED, 2 * this.#accounts.size);
  }

  /** Asks although the kept token still lives. Returns nothing if what to do is to be decided again. */
  async #renew(state: AccountState, limits: Limits): Promise<Token | undefined> {
    const deadline = Math.min(limits.deadline, this.#clock.now() + RENEWAL_WAIT_MS);
    const ask = this.#ask(state, 0n, limits);
    try {
      return await ask.wait({ ...limits, deadline });
    } catch (error) {
      if (!(error instanceof TokenBrokerError) || !error.temporary) {
        throw error;
      }
      this.#countFailedRenewal(state, ask);
      if (isUsable(state.kept, this.#clock.now())) {
        return state.kept.token;
      }
      if (this.#clock.now() >= limits.deadline) {
        throw error;
      }
      return undefined;
    }
  }

  #countFailedRenewal(state: AccountState, ask: Ask): void {
    if (!ask.countsAsFailed) {
      ask.countsAsFailed = true;
      state.failedRenewals++;
      state.pausedUntil = this.#clock.now() + renewalPause(state.failedRenewals, this.#clock.random());
    }
  }

  /** Returns the ask in flight for a token of a later generation, or starts one. */
  #ask(state: AccountState, newerThan: bigint, { deadline }: Limits): Ask {
    const present = state.asks.get(newerThan);
    if (present) {
      return present;
    }
    const ask = new Ask(this.#clock, {
      attempt: (timeoutMs) => this.#attempt(state, newerThan, timeoutMs),
      isFinal: (error) => !error.temporary || (newerThan === 0n && isUsable(state.kept, this.#clock.now())),
      onEnd: () => {
        if (state.asks.get(newerThan) === ask) {
          state.asks.delete(newerThan);
        }
      },
    });
    state.asks.set(newerThan, ask);
    void ask.run(deadline);
    return ask;
  }

  async #attempt(state: AccountState, newerThan: bigint, timeoutMs: number): Promise<Token> {
    const sent = this.#clock.now();
    try {
      const answer = await this.#transport.getToken(state.name, newerThan, timeoutMs);
      const kept = this.#keep(state, keptFrom(state.name, answer, sent, this.#clock.now));
      this.#watch.add(state.name);
      if (newerThan > 0n && kept.token.generation <= newerThan) {
        throw new TokenBrokerError('INTERNAL', 'the answer has no newer token', { account: state.name });
      }
      if (!isUsable(kept, this.#clock.now())) {
        throw new TokenBrokerError('UNAVAILABLE', "the broker's token has ended, or is about to", {
          account: state.name,
        });
      }
      return kept.token;
    } catch (error) {
      if (error instanceof TokenBrokerError && !error.temporary && error.kind !== 'CLOSED') {
        state.kept = undefined;
        state.refusal = { error, until: this.#clock.now() + REFUSAL_MS };
        this.#settings.logger.warn(error.message);
      }
      throw error;
    }
  }

  /** Keeps a token if it is newer than the kept one. Returns the one that is kept then. */
  #keep(state: AccountState, next: Kept): Kept {
    if (state.kept && !replaces(next, state.kept, this.#clock.now())) {
      return state.kept;
    }
    const known = state.kept?.token.generation;
    state.kept = next;
    state.refusal = undefined;
    state.failedRenewals = 0;
    state.pausedUntil = 0;
    if (next.token.generation !== known) {
      this.#settings.logger.debug(
        `account ${state.name}: generation ${next.token.generation.toString()} is kept`,
      );
    }
    for (const [newerThan, ask] of state.asks) {
      const token = this.#newerThan(state, newerThan);
      if (token) {
        ask.settle(token);
      }
    }
    return next;
  }

  #pushed(account: string, make: () => Kept): void {
    try {
      this.#keep(this.#account(account), make());
    } catch (error) {
      this.#settings.logger.warn(String(error));
    }
  }

  /** Makes the kept tokens of these accounts be asked for again. */
  #expire(accounts: Iterable<string>): void {
    const now = this.#clock.now();
    for (const name of accounts) {
      const state = this.#account(name);
      const { kept } = state;
      if (kept) {
        kept.reuseEnd = Math.min(kept.reuseEnd, now);
        state.pausedUntil = now;
      }
    }
  }

  #newerThan({ kept }: AccountState, generation: bigint): Token | undefined {
    return isUsable(kept, this.#clock.now()) && kept.token.generation > generation ? kept.token : undefined;
  }

  /** Waits for what a report brings. */
  async #successor(
    state: AccountState,
    generation: bigint,
    report: SharedReport,
    limits: Limits,
  ): Promise<Token | undefined> {
    for (;;) {
      const { answer } = report;
      const { outcome, retryAfterMs = 0 } = await waitForShared(this.#clock, limits, answer);
      if (outcome === 'NOT_A_TOKEN_FAULT') {
        return undefined;
      }
      const newer = this.#newerThan(state, generation);
      if (newer) {
        return newer;
      }
      if (outcome !== 'TOO_SOON') {
        return await this.#ask(state, generation, limits).wait(limits);
      }
      const wait = Math.max(retryAfterMs, SHORTEST_REPORT_PAUSE_MS);
      if (this.#clock.now() + wait >= limits.deadline) {
        return undefined;
      }
      await pause(this.#clock, limits, wait);
      const meanwhile = this.#newerThan(state, generation);
      if (meanwhile) {
        return meanwhile;
      }
      // The broker forgets a report that came too soon. The first who has waited reports again for all.
      if (report.answer === answer) {
        void report.send(limits.deadline - this.#clock.now());
      }
    }
  }

  /** Reports a token once for all who call this for its generation before the last of them has finished. */
  async #withReport<T>(
    state: AccountState,
    generation: bigint,
    upstreamCode: string,
    limits: Limits,
    use: (report: SharedReport) => Promise<T>,
  ): Promise<T> {
    throwIfOver(limits);
    let report = state.reports.get(generation);
    if (report === undefined) {
      report = new SharedReport(
        (timeoutMs) =>
          this.#transport.report(state.name, generation, upstreamCode, timeoutMs).then(reportFrom),
        limits.deadline - this.#clock.now(),
      );
      state.reports.set(generation, report);
    }
    report.users++;
    try {
      return await use(report);
    } finally {
      report.users--;
      if (report.users === 0) {
        state.reports.delete(generation);
      }
    }
  }
}

function reportFrom(answer: ReportRejectedTokenResponse): Report {
  const outcome = OUTCOMES[answer.outcome];
  if (outcome === undefined) {
    throw new TokenBrokerError('INTERNAL', 'the answer to the report has an unknown outcome');
  }
  return { outcome, retryAfterMs: answer.retryAfter && milliseconds(answer.retryAfter) };
}

const OUTCOMES: Partial<Record<ReportRejectedTokenResponse_Outcome, ReportOutcome>> = {
  [ReportRejectedTokenResponse_Outcome.REISSUING]: 'REISSUING',
  [ReportRejectedTokenResponse_Outcome.ALREADY_REPLACED]: 'ALREADY_REPLACED',
  [ReportRejectedTokenResponse_Outcome.TOO_SOON]: 'TOO_SOON',
  [ReportRejectedTokenResponse_Outcome.NOT_A_TOKEN_FAULT]: 'NOT_A_TOKEN_FAULT',
};

function isIdle({ kept, refusal, asks, reports }: AccountState, now: number): boolean {
  return (
    !isUsable(kept, now) &&
    (refusal === undefined || refusal.until <= now) &&
    asks.size === 0 &&
    reports.size === 0
  );
}

function isKind(error: unknown, kind: string): boolean {
  return error instanceof TokenBrokerError && error.kind === kind;
}
