import { debuglog } from 'node:util';

/** Where a client writes what it does. `console` is one. No message contains a token or a bearer. */
export interface Logger {
  /** What happens in normal operation: tokens that were kept, streams that were opened. */
  debug(message: string): void;
  /** What somebody should look at: files that cannot be used, refusals. */
  warn(message: string): void;
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
