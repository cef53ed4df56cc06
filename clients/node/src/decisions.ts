// The rules for tokens and pauses, as functions without effects. Times are monotonic, in milliseconds.
import type { TokenBrokerError } from './errors.js';
import type { Kept } from './token.js';

/** A token counts as ended so long before its end, because a request needs time to reach the API. */
const END_MARGIN_MS = 1000;

/** For how long the error of an account is given to callers without another call. */
export const REFUSAL_MS = 1000;

/** For how long a caller waits for a newer token while the kept one still lives. */
export const RENEWAL_WAIT_MS = 2000;

/** What is known of an account when somebody needs its token. */
export interface Knowledge {
  kept?: Kept | undefined;
  /** The last error that was not temporary, until when it counts. */
  refusal?: { error: TokenBrokerError; until: number } | undefined;
  /** Until when the kept token is used after its reuse end because asking has failed. */
  pausedUntil: number;
}

/**
 * What `token` does: `use` the kept token; `renew` it, and use it if that fails; `ask`, and wait for the
 * answer; or `refuse` with the remembered error.
 */
export type Decision = 'use' | 'renew' | 'ask' | 'refuse';

export function decide({ kept, refusal, pausedUntil }: Knowledge, now: number): Decision {
  if (isUsable(kept, now)) {
    return now < kept.reuseEnd || now < pausedUntil ? 'use' : 'renew';
  }
  return refusal !== undefined && now < refusal.until ? 'refuse' : 'ask';
}

export function isUsable(kept: Kept | undefined, now: number): kept is Kept {
  return kept !== undefined && now < kept.end - END_MARGIN_MS;
}

/**
 * Returns whether `next` takes the place of the kept token. Anything takes the place of one that has ended,
 * because generations start again at a lower number when the broker's database was restored.
 */
export function replaces(next: Kept, kept: Kept | undefined, now: number): boolean {
  return (
    !isUsable(kept, now) ||
    next.token.generation > kept.token.generation ||
    (next.token.generation === kept.token.generation && next.reuseEnd > kept.reuseEnd)
  );
}

/** Returns the pause before an ask is repeated for which callers wait, after so many failures in a row. */
export function retryPause(failures: number, random: number): number {
  return growing(failures, 100, 1000, random);
}

/** Returns for how long a living token is used without asking, after so many failures in a row. */
export function renewalPause(failures: number, random: number): number {
  return growing(failures, 1000, 30_000, random);
}

/** Returns the pause before a stream is opened again, after so many in a row that failed. */
export function reopeningPause(failures: number, random: number): number {
  return growing(failures, 100, 10_000, random);
}

/** Doubles `first` with each further failure up to `longest`, and shortens the result by up to half. */
function growing(failures: number, first: number, longest: number, random: number): number {
  const pause = Math.min(first * 2 ** Math.min(failures - 1, 30), longest);
  return pause * (1 - random / 2);
}
