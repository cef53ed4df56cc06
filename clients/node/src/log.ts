import { debuglog } from 'node:util';

/** Where a client writes what it does. `console` is one. No message contains a token or a bearer. */
export interface Logger {
  /** What happens in normal operation: tokens that were kept, streams that were opened. */
  debug(message: string): void;
  /** What somebody should look at: files that cannot be used, refusals. */
  warn(message: string): void;
}

/** Returns a logger that never fails, because a broken log must neither end the watch nor keep a caller waiting. */
export function unfailing(logger: Logger): Logger {
  const given: Record<keyof Logger, (message: string) => unknown> = logger;
  const write = (level: keyof Logger) => (message: string) => {
    try {
      // It may be an `async` function, whose rejection would end the program.
      void Promise.resolve(given[level](message)).catch(() => undefined);
    } catch {
      // There is nowhere to say so.
    }
  };
  return { debug: write('debug'), warn: write('warn') };
}

const debug = debuglog('token-broker');

/** Shows debug messages with `NODE_DEBUG=token-broker`, and makes warnings of the process of the others. */
export const defaultLogger: Logger = {
  debug(message) {
    debug('%s', message);
  },
  warn(message) {
    process.emitWarning(message, 'TokenBrokerWarning');
  },
};
