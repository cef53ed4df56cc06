/** The time and chance that a client depends on. Tests have their own. */
export interface Clock {
  /** Returns the monotonic time in milliseconds. */
  now: () => number;
  /** Calls `action` after `ms`, unless the returned function is called before. */
  after(ms: number, action: () => void, options?: TimerOptions): () => void;
  /** Returns a number from 0 to below 1. */
  random(): number;
}

export interface TimerOptions {
  /** Whether the timer keeps the program running. Only the timers of waiting callers do. */
  keepsAlive: boolean;
}

/** The longest time for which Node's timers can be set. */
const LONGEST_TIMER_MS = 2 ** 31 - 1;

export const systemClock: Clock = {
  now: () => performance.now(),
  random: () => Math.random(),
  after(ms, action, options) {
    const timer = setTimeout(action, Math.min(Math.max(0, ms), LONGEST_TIMER_MS));
    if (options?.keepsAlive !== true) {
      timer.unref();
    }
    return () => {
      clearTimeout(timer);
    };
  },
};
