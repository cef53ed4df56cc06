import type { Clock } from './clock.js';
import { reopeningPause } from './decisions.js';
import { TokenBrokerError } from './errors.js';
import {
  AccountEnded_Reason,
  type GetTokenResponse,
  type WatchTokensResponse,
} from './gen/token_broker/v1/token_broker_pb.js';
import type { Logger } from './log.js';
import type { Stream, Transport } from './transport.js';

/** The most accounts of one stream. The broker takes no more. */
const MOST_ACCOUNTS = 1000;
/** How long further additions are waited for before a stream is opened for the first. */
const ADDITION_DELAY_MS = 100;
/** The shortest time between two streams that are opened for additions. */
const ADDITION_INTERVAL_MS = 5000;
/** How long an account is watched for which nobody asks. */
const UNUSED_MS = 3_600_000;
/** When a stream is opened again whose bearer was refused. */
const UNAUTHENTICATED_PAUSE_MS = 10_000;
/** How long the broker may take to accept a stream. */
const OPENING_MS = 20_000;
/** A stream that ended sooner counts as failed, so that one that always breaks is not opened in a loop. */
const BRIEF_MS = 1000;
/** The longest pause that a broker can ask for before a stream is opened again. */
const LONGEST_PAUSE_MS = 30_000;

/** What a watch tells its client. */
export interface WatchEvents {
  /** The broker has another token of the account. */
  token(account: string, answer: GetTokenResponse): void;
  /** The caller can no longer use the account. */
  ended(account: string): void;
  /** These accounts are on no stream any more, so nothing is pushed for them: they are unused, or were refused. */
  left(accounts: Iterable<string>): void;
  /** The broker refuses the caller. */
  unauthenticated(): void;
  /** Returns when the program last asked for the account. */
  lastUsed(account: string): number;
}

interface OpenStream {
  accounts: ReadonlySet<string>;
  openedAt: number;
  hasDelivered: boolean;
  handle: Stream | undefined;
  /** Ends the time within which the broker must accept the stream. */
  stopTimer: (() => void) | undefined;
}

/** Keeps a stream open that has all watched accounts. */
export class Watch {
  readonly #clock: Clock;
  readonly #transport: Transport;
  readonly #events: WatchEvents;
  readonly #log: Logger;
  readonly #accounts = new Set<string>();
  /** The stream that the broker has accepted last. */
  #current: OpenStream | undefined;
  /** The stream that takes its place once the broker has accepted it. */
  #opening: OpenStream | undefined;
  #failures = 0;
  #nextAddition = 0;
  /** Cancels the timer of the next opening, if one is planned. */
  #planned: (() => void) | undefined;
  #plannedAt = Infinity;
  #closed = false;

  constructor(clock: Clock, transport: Transport, events: WatchEvents, log: Logger) {
    this.#clock = clock;
    this.#transport = transport;
    this.#events = events;
    this.#log = log;
  }

  /** Adds an account, if there is room. */
  add(account: string): void {
    if (this.#closed || this.#accounts.has(account) || this.#accounts.size >= MOST_ACCOUNTS) {
      return;
    }
    this.#accounts.add(account);
    // A stream that is opened anyway, soon or after a pause, has the account too.
    if (this.#planned === undefined) {
      const now = this.#clock.now();
      this.#plan(Math.max(now + ADDITION_DELAY_MS, this.#nextAddition), () => {
        this.#nextAddition = this.#clock.now() + ADDITION_INTERVAL_MS;
      });
    }
  }

  has(account: string): boolean {
    return this.#accounts.has(account);
  }

  /** Opens a stream anew, for example on another connection. The present one ends when that works. */
  reopen(): void {
    if (this.#accounts.size > 0) {
      this.#plan(this.#clock.now());
    }
  }

  close(): void {
    this.#closed = true;
    this.#planned?.();
    this.#giveUpOpening();
    this.#current?.handle?.cancel();
    this.#current = undefined;
  }

  /** Opens a stream at `time`, unless one is opened before. */
  #plan(time: number, before?: () => void): void {
    if (this.#closed || time >= this.#plannedAt) {
      return;
    }
    this.#planned?.();
    this.#plannedAt = time;
    this.#planned = this.#clock.after(time - this.#clock.now(), () => {
      this.#planned = undefined;
      this.#plannedAt = Infinity;
      before?.();
      this.#open();
    });
  }

  #open(): void {
    this.#giveUpOpening();
    this.#dropUnused();
    if (this.#accounts.size === 0) {
      this.#current?.handle?.cancel();
      this.#current = undefined;
      return;
    }
    const stream: OpenStream = {
      accounts: new Set(this.#accounts),
      openedAt: this.#clock.now(),
      hasDelivered: false,
      handle: undefined,
      stopTimer: undefined,
    };
    this.#opening = stream;
    this.#log.debug(`a stream of ${this.#accounts.size} accounts is opened`);
    stream.stopTimer = this.#clock.after(OPENING_MS, () => {
      stream.handle?.cancel();
      this.#onEnded(stream, new TokenBrokerError('UNAVAILABLE', 'the broker does not accept it'), false);
    });
    stream.handle = this.#transport.watch([...stream.accounts], {
      opened: () => {
        this.#onOpened(stream);
      },
      message: (message) => {
        this.#onMessage(stream, message);
      },
      ended: (error, bearerChanged) => {
        this.#onEnded(stream, error, bearerChanged);
      },
    });
  }

  #giveUpOpening(): void {
    this.#opening?.stopTimer?.();
    this.#opening?.handle?.cancel();
    this.#opening = undefined;
  }

  #dropUnused(): void {
    const unusedSince = this.#clock.now() - UNUSED_MS;
    const unused = [...this.#accounts].filter((account) => this.#events.lastUsed(account) < unusedSince);
    for (const account of unused) {
      this.#accounts.delete(account);
    }
    this.#events.left(unused);
  }

  #onOpened(stream: OpenStream): void {
    if (this.#opening === stream) {
      stream.stopTimer?.();
      this.#current?.handle?.cancel();
      this.#current = stream;
      this.#opening = undefined;
    }
  }

  #onMessage(stream: OpenStream, { account, event }: WatchTokensResponse): void {
    this.#onOpened(stream);
    if (this.#current !== stream) {
      return;
    }
    stream.hasDelivered = true;
    switch (event.case) {
      case 'token':
        this.#events.token(account, event.value);
        break;
      case 'ended':
        this.#log.warn(
          `account ${account}: no longer available (${AccountEnded_Reason[event.value.reason]})`,
        );
        this.#accounts.delete(account);
        this.#events.ended(account);
        break;
      default:
    }
  }

  #onEnded(stream: OpenStream, error: TokenBrokerError | undefined, bearerChanged: boolean): void {
    if (stream === this.#current) {
      this.#current = undefined;
    } else if (stream === this.#opening) {
      this.#opening = undefined;
    } else {
      return;
    }
    stream.stopTimer?.();
    this.#log.debug(`a stream ended: ${error?.message ?? 'OK'}`);
    const now = this.#clock.now();
    switch (error?.kind) {
      case 'UNAUTHENTICATED':
        if (bearerChanged) {
          this.#plan(now);
        } else {
          this.#log.warn(`the broker refuses the caller: ${error.message}`);
          this.#events.unauthenticated();
          this.#plan(now + UNAUTHENTICATED_PAUSE_MS);
        }
        break;
      case 'NOT_GRANTED':
      case 'NO_SUCH_ACCOUNT':
      case 'INVALID_ARGUMENT':
      case 'ACCOUNT_DISABLED':
      case 'CREDENTIAL_REJECTED':
      case 'EGRESS_REJECTED':
        this.#refused(stream, error);
        break;
      default:
        this.#plan(now + this.#pauseAfter(stream, error));
    }
  }

  #refused(stream: OpenStream, error: TokenBrokerError): void {
    this.#log.warn(`the broker refuses a stream of ${stream.accounts.size} accounts: ${error.message}`);
    for (const account of stream.accounts) {
      this.#accounts.delete(account);
    }
    this.#current?.handle?.cancel();
    this.#current = undefined;
    this.#events.left(stream.accounts);
    if (this.#accounts.size > 0) {
      this.#plan(Math.max(this.#clock.now() + ADDITION_DELAY_MS, this.#nextAddition));
    }
  }

  #pauseAfter(stream: OpenStream, error: TokenBrokerError | undefined): number {
    const wanted = Math.min(error?.retryAfterMs ?? 0, LONGEST_PAUSE_MS);
    if (stream.hasDelivered && this.#clock.now() - stream.openedAt >= BRIEF_MS) {
      this.#failures = 0;
      return wanted;
    }
    this.#failures++;
    return Math.max(reopeningPause(this.#failures, this.#clock.random()), wanted);
  }
}
