import type { Clock } from './clock.js';
import { retryPause } from './decisions.js';
import { TokenBrokerError } from './errors.js';
import type { Token } from './token.js';
import { type Limits, type Outcome, waitFor } from './waiting.js';

/** What an ask needs from its client. */
export interface AskOwner {
  /** Calls the broker once, and keeps the token of its answer. */
  attempt(timeoutMs: number): Promise<Token>;
  /** Says whether an attempt that failed with this error is not to be repeated. */
  isFinal(error: TokenBrokerError): boolean;
  /** The ask takes no more callers. */
  onEnd(): void;
}

interface Waiter extends Outcome<Token> {
  deadline: number;
}

/**
 * One ask for the token of an account, which all callers that need it share. It is repeated after temporary
 * errors as long as somebody waits for it. It belongs to none of its callers: when one gives up, the others get
 * the answer.
 */
export class Ask {
  readonly #clock: Clock;
  readonly #owner: AskOwner;
  readonly #waiters = new Set<Waiter>();
  #lastError: TokenBrokerError | undefined;
  #nextAttempt = 0;
  /** Whether the client has counted this ask as one that failed while a kept token lived. */
  countsAsFailed = false;

  constructor(clock: Clock, owner: AskOwner) {
    this.#clock = clock;
    this.#owner = owner;
  }

  /** Waits for the token within the caller's limits. */
  wait(limits: Limits): Promise<Token> {
    const { deadline } = limits;
    if (this.#lastError && this.#nextAttempt > deadline) {
      return Promise.reject(this.#lastError);
    }
    return waitFor<Token>(
      this.#clock,
      limits,
      (outcome) => {
        const waiter = { ...outcome, deadline };
        this.#waiters.add(waiter);
        return () => this.#waiters.delete(waiter);
      },
      () => this.#lastError,
    );
  }

  /** Gives the token to all who wait, before the answer or instead of it. */
  settle(token: Token): void {
    for (const waiter of this.#waiters) {
      waiter.resolve(token);
    }
    this.#waiters.clear();
  }

  /** Asks until there is a token, a final error, or nobody who waits. The first attempt ends at `deadline`. */
  async run(deadline: number): Promise<void> {
    for (let failures = 1; ; failures++) {
      let error: TokenBrokerError;
      try {
        const token = await this.#owner.attempt(deadline - this.#clock.now());
        this.#owner.onEnd();
        this.settle(token);
        return;
      } catch (cause) {
        error = asError(cause);
      }
      const pause = this.#pauseAfter(error, failures);
      const now = this.#clock.now();
      if (error.kind === 'DEADLINE_EXCEEDED' && this.#lastError) {
        // The error before says why there was no answer.
        error = this.#lastError;
      }
      this.#lastError = error;
      this.#nextAttempt = now + pause;
      const leaving = [...this.#waiters].filter((waiter) => waiter.deadline < now + pause);
      if (leaving.length === this.#waiters.size) {
        this.#owner.onEnd();
      }
      for (const waiter of leaving) {
        this.#waiters.delete(waiter);
        waiter.reject(error);
      }
      if (this.#waiters.size > 0) {
        await new Promise<void>((resolve) => this.#clock.after(pause, resolve));
      }
      if (this.#waiters.size === 0) {
        this.#owner.onEnd();
        return;
      }
      deadline = Math.max(...[...this.#waiters].map((waiter) => waiter.deadline));
    }
  }

  #pauseAfter(error: TokenBrokerError, failures: number): number {
    if (error.noRetry || this.#owner.isFinal(error)) {
      return Infinity;
    }
    // A pause of zero, which a broker may send, would make this a loop without pauses.
    const { retryAfterMs = 0 } = error;
    return retryAfterMs > 0 ? retryAfterMs : retryPause(failures, this.#clock.random());
  }
}

function asError(cause: unknown): TokenBrokerError {
  return cause instanceof TokenBrokerError
    ? cause
    : new TokenBrokerError('INTERNAL', 'the ask failed unexpectedly', { cause });
}
