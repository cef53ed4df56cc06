import type { Clock } from './clock.js';
import { TokenBrokerError } from './errors.js';

/** How long somebody waits. */
export interface Limits {
  account: string;
  /** The monotonic time of the caller's timeout. */
  deadline: number;
  /** The caller's own cancellation. */
  signal?: AbortSignal | undefined;
  /** Aborted when the client is closed. */
  closing: AbortSignal;
}

export interface Outcome<T> {
  resolve: (value: T) => void;
  reject: (error: TokenBrokerError) => void;
}

/**
 * Waits for the outcome that `subscribe` announces, but not beyond the limits. Whatever is waited for goes on
 * without the caller. `subscribe` returns the function that ends the subscription. At the timeout, the error is
 * the one that `lastError` returns, if any.
 */
export async function waitFor<T>(
  clock: Clock,
  limits: Limits,
  subscribe: (outcome: Outcome<T>) => () => void,
  lastError?: () => TokenBrokerError | undefined,
): Promise<T> {
  const { account, deadline, signal, closing } = limits;
  throwIfOver(limits);
  let release: (() => void) | undefined;
  try {
    return await new Promise<T>((resolve, reject) => {
      const onTimeout = () => {
        reject(lastError?.() ?? timedOut(account));
      };
      const onAbort = () => {
        // `AbortSignal.timeout` is another way to say how long to wait.
        if (isTimeout(signal)) {
          onTimeout();
        } else {
          reject(cancelled(account, signal));
        }
      };
      const onClose = () => {
        reject(closed(account));
      };
      const stopTimer = clock.after(deadline - clock.now(), onTimeout, { keepsAlive: true });
      signal?.addEventListener('abort', onAbort);
      closing.addEventListener('abort', onClose);
      const unsubscribe = subscribe({ resolve, reject });
      release = () => {
        unsubscribe();
        stopTimer();
        signal?.removeEventListener('abort', onAbort);
        closing.removeEventListener('abort', onClose);
      };
    });
  } finally {
    release?.();
  }
}

/** Throws if the caller has cancelled already, or the client was closed. */
export function throwIfOver({ account, signal, closing }: Limits): void {
  throwIfClosed(account, closing);
  if (signal?.aborted) {
    throw cancelled(account, signal);
  }
}

/** Throws if the client was closed. */
export function throwIfClosed(account: string, closing: AbortSignal): void {
  if (closing.aborted) {
    throw closed(account);
  }
}

/** Waits within the limits for a promise that others may wait for too. */
export function waitForShared<T>(clock: Clock, limits: Limits, shared: Promise<T>): Promise<T> {
  return waitFor(clock, limits, ({ resolve, reject }) => {
    shared.then(resolve, reject);
    return () => undefined;
  });
}

/** Waits for `ms`, unless one of the limits ends first. */
export function pause(clock: Clock, limits: Limits, ms: number): Promise<void> {
  return waitFor(clock, limits, ({ resolve }) => clock.after(ms, resolve));
}

/** Returns the error of a call to a client that was closed. */
export function closed(account: string): TokenBrokerError {
  return new TokenBrokerError('CLOSED', 'the client is closed', { account });
}

function timedOut(account: string): TokenBrokerError {
  return new TokenBrokerError('DEADLINE_EXCEEDED', 'no answer within the timeout', { account });
}

function cancelled(account: string, signal: AbortSignal | undefined): TokenBrokerError {
  return isTimeout(signal)
    ? timedOut(account)
    : new TokenBrokerError('CANCELLED', 'the caller cancelled', { account, cause: signal?.reason });
}

function isTimeout(signal: AbortSignal | undefined): boolean {
  return signal?.reason instanceof DOMException && signal.reason.name === 'TimeoutError';
}
