import { TokenBrokerError } from './errors.js';
import { defaultLogger, type Logger, unfailing } from './log.js';

/** How a client reaches the broker, and as whom. */
export interface TokenClientOptions {
  /** One or more URLs with a port, `http://host:port` or `https://host:port`, all with the same scheme. */
  endpoints: string | readonly string[];
  /** The file with the bearer. It is read again when it has changed. */
  bearerFile?: string | undefined;
  /** The file with the certificates to trust, instead of Node's. It is read again when it has changed. */
  caFile?: string | undefined;
  /** The file with the client's certificate. It is read again when it has changed. */
  clientCertFile?: string | undefined;
  /** The file with the key of the client's certificate. */
  clientKeyFile?: string | undefined;
  /** How long a call waits that has no timeout of its own, in milliseconds. The default is 5,000. */
  timeoutMs?: number | undefined;
  /** Sends the bearer unencrypted, also to other hosts than loopback. */
  allowPlaintextBearer?: boolean | undefined;
  /** Where the client writes what it does. */
  logger?: Logger | undefined;
}

/** Options that were checked, with the defaults filled in. */
export interface Settings {
  endpoints: readonly Endpoint[];
  secure: boolean;
  bearerFile: string | undefined;
  caFile: string | undefined;
  clientCertFile: string | undefined;
  clientKeyFile: string | undefined;
  timeoutMs: number;
  allowPlaintextBearer: boolean;
  logger: Logger;
}

export interface Endpoint {
  url: string;
  /** Host and port. */
  address: string;
  isLoopback: boolean;
}

const DEFAULT_TIMEOUT_MS = 5000;

/** Returns the options that the environment sets; those of `others` take precedence. */
export function optionsFromEnvironment(
  environment: NodeJS.ProcessEnv,
  others: Partial<TokenClientOptions>,
): TokenClientOptions {
  const endpoints = (environment.TOKEN_BROKER_ENDPOINT ?? '').split(',').map((url) => url.trim());
  const fromEnvironment: TokenClientOptions = {
    endpoints: endpoints.filter((url) => url !== ''),
    bearerFile: file(environment.TOKEN_BROKER_BEARER_FILE),
    caFile: file(environment.TOKEN_BROKER_CA_FILE),
    clientCertFile: file(environment.TOKEN_BROKER_CLIENT_CERT),
    clientKeyFile: file(environment.TOKEN_BROKER_CLIENT_KEY),
  };
  return { ...fromEnvironment, ...others };
}

/** An empty variable is one that is not set. */
function file(variable: string | undefined): string | undefined {
  return variable === '' ? undefined : variable;
}

/** Checks options. Throws an `INVALID_ARGUMENT` error if they contradict each other. */
export function settingsFrom(options: TokenClientOptions): Settings {
  const urls = typeof options.endpoints === 'string' ? [options.endpoints] : options.endpoints;
  const [first, ...others] = urls.map(parseEndpoint);
  if (first === undefined) {
    throw invalid('no endpoint is set: set TOKEN_BROKER_ENDPOINT or endpoints');
  }
  const secure = first.secure;
  if (others.some((other) => other.secure !== secure)) {
    throw invalid('all endpoints must have the same scheme');
  }
  const endpoints = [first, ...others].map(({ endpoint }) => endpoint);
  const { bearerFile, caFile, clientCertFile, clientKeyFile } = options;
  if ((clientCertFile === undefined) !== (clientKeyFile === undefined)) {
    throw invalid("the client's certificate and its key must be set together");
  }
  if (!secure && (caFile !== undefined || clientCertFile !== undefined)) {
    throw invalid('certificates are set, but the endpoints are not https');
  }
  const allowPlaintextBearer = options.allowPlaintextBearer ?? false;
  const exposed = endpoints.find((endpoint) => !secure && !endpoint.isLoopback);
  if (bearerFile !== undefined && exposed !== undefined && !allowPlaintextBearer) {
    throw invalid(
      `the bearer would be sent unencrypted to ${exposed.address}: use https, or set allowPlaintextBearer`,
    );
  }
  const timeoutMs = options.timeoutMs ?? DEFAULT_TIMEOUT_MS;
  if (!(timeoutMs > 0)) {
    throw invalid('the timeout must be above zero');
  }
  const logger = unfailing(options.logger ?? defaultLogger);
  return {
    endpoints,
    secure,
    bearerFile,
    caFile,
    clientCertFile,
    clientKeyFile,
    timeoutMs,
    allowPlaintextBearer,
    logger,
  };
}

function parseEndpoint(text: string): { endpoint: Endpoint; secure: boolean } {
  const url = URL.canParse(text) ? new URL(text) : undefined;
  if (
    url === undefined ||
    !/^https?:$/.test(url.protocol) ||
    // A parsed URL does not tell: it lacks the port that its scheme implies.
    !/:\d+\/?\s*$/.test(text) ||
    url.pathname !== '/' ||
    url.search ||
    url.hash
  ) {
    throw invalid('an endpoint must have the form http://host:port or https://host:port');
  }
  if (url.username !== '' || url.password !== '') {
    throw invalid('an endpoint must not contain a user name or a password');
  }
  const secure = url.protocol === 'https:';
  const address = `${url.hostname}:${url.port || (secure ? '443' : '80')}`;
  // The last one is ::ffff:127.0.0.1 and so on, as a parsed URL writes it: the system takes it for 127.0.0.1.
  const isLoopback = /^(localhost|127(\.\d+){3}|\[::1\]|\[::ffff:7f[\da-f]{2}:[\da-f]{1,4}\])$/.test(
    url.hostname,
  );
  return { endpoint: { url: url.origin, address, isLoopback }, secure };
}

export function invalid(text: string, cause?: unknown): TokenBrokerError {
  return new TokenBrokerError('INVALID_ARGUMENT', text, { cause });
}
