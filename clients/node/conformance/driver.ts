// The driver of the conformance scenarios: requests are JSON lines on standard input, answers on standard output.
import { createInterface } from 'node:readline';
import { inspect } from 'node:util';

import { createFetch, type Logger, type Token, TokenBrokerError, TokenClient } from '@token-broker/client';
import { addTokens } from '@token-broker/client/axios';
import axios from 'axios';

interface Request {
  id: number | string;
  op: string;
  client: string;
  account: string;
  timeout_ms?: number;
  [key: string]: unknown;
}

interface Opened {
  client: TokenClient;
  options: object;
  lastToken?: Token;
  lastError?: unknown;
}

const logger: Logger = {
  debug: (message) => process.stderr.write(`debug: ${message}\n`),
  warn: (message) => process.stderr.write(`warn: ${message}\n`),
};
const clients = new Map<string, Opened>();
const cancellations = new Map<Request['id'], AbortController>();

const operations: Record<string, (request: Request) => unknown> = {
  hello: () => ({ language: 'node', adapters: ['fetch', 'axios'] }),

  open(request) {
    const options = {
      endpoints: request.endpoints as string[],
      bearerFile: request.bearer_file as string | undefined,
      caFile: request.ca_file as string | undefined,
      clientCertFile: request.client_cert as string | undefined,
      clientKeyFile: request.client_key as string | undefined,
      timeoutMs: request.timeout_ms,
      logger,
    };
    clients.set(request.client, { client: new TokenClient(options), options });
    return {};
  },

  token: (request) => tokenOf(request),

  async tokens(request) {
    const calls = Array.from({ length: Number(request.threads) }, () =>
      tokenOf(request).catch((error: unknown) => ({ error: describe(error) })),
    );
    return { results: await Promise.all(calls) };
  },

  cancel(request) {
    cancellations.get(request.request as Request['id'])?.abort();
    return {};
  },

  async report(request) {
    const { outcome, retryAfterMs } = await opened(request).client.report(
      request.account,
      BigInt(request.generation as string),
      request.upstream_code as string,
      { timeoutMs: request.timeout_ms },
    );
    return { outcome, retry_after_ms: rounded(retryAfterMs) };
  },

  async api(request) {
    const { client } = opened(request);
    const { account, timeout_ms: timeoutMs } = request;
    const method = request.method as string;
    const url = request.url as string;
    const body = request.body as string | undefined;
    if (request.adapter === 'axios') {
      const instance = axios.create({ validateStatus: () => true, responseType: 'text' });
      addTokens(instance, client, account, { timeoutMs });
      const response = await instance.request<string>({ method, url, data: body });
      return { status: response.status, body: response.data };
    }
    const response = await createFetch(client, account, { timeoutMs })(url, {
      method,
      ...(body !== undefined && { body }),
    });
    return { status: response.status, body: await response.text() };
  },

  async load(request) {
    const end = performance.now() + Number(request.stop_after_ms);
    const errors: Record<string, number> = {};
    const generations = new Set<string>();
    let calls = 0;
    const caller = async () => {
      while (performance.now() < end) {
        calls++;
        try {
          const token = await tokenOf(request);
          generations.add(token.generation);
        } catch (error) {
          const { kind } = describe(error);
          errors[kind] = (errors[kind] ?? 0) + 1;
        }
        // Calls that are answered from memory would not let the program do anything else.
        await new Promise(setImmediate);
      }
    };
    await Promise.all(Array.from({ length: Number(request.threads) }, caller));
    return { calls, errors, generations: [...generations] };
  },

  show(request) {
    const { client, options, lastToken, lastError } = opened(request);
    const things = [client, options, lastToken, lastError];
    const texts = things.flatMap((thing) => [
      inspect(thing, { depth: null }),
      String(thing),
      JSON.stringify(thing),
    ]);
    return { text: texts.join('\n') };
  },

  close(request) {
    opened(request).client.close();
    return {};
  },
};

function opened({ client }: Request): Opened {
  const found = clients.get(client);
  if (found === undefined) {
    throw new TokenBrokerError('INVALID_ARGUMENT', 'no such client is open');
  }
  return found;
}

async function tokenOf(request: Request) {
  const entry = opened(request);
  const cancellation = new AbortController();
  if (request.op === 'token') {
    cancellations.set(request.id, cancellation);
  }
  try {
    const token = await entry.client.token(request.account, {
      timeoutMs: request.timeout_ms,
      signal: cancellation.signal,
    });
    entry.lastToken = token;
    return {
      token: token.value,
      generation: token.generation.toString(),
      allowed_ip: token.allowedIp,
      api_base_url: token.apiBaseUrl,
      expires_in_ms: Math.round(token.expiresInMs()),
    };
  } catch (error) {
    entry.lastError = error;
    throw error;
  } finally {
    cancellations.delete(request.id);
  }
}

function describe(error: unknown) {
  if (!(error instanceof TokenBrokerError)) {
    return { kind: 'INTERNAL', message: String(error) };
  }
  const { kind, code, reason, message, upstreamCode, retryAfterMs } = error;
  return { kind, code, reason, message, upstream_code: upstreamCode, retry_after_ms: rounded(retryAfterMs) };
}

function rounded(ms: number | undefined): number | undefined {
  return ms === undefined ? undefined : Math.round(ms);
}

async function handle(line: string): Promise<void> {
  const request = JSON.parse(line) as Request;
  let answer: object;
  try {
    const operation = operations[request.op];
    if (operation === undefined) {
      throw new TokenBrokerError('INVALID_ARGUMENT', `the driver has no operation ${request.op}`);
    }
    answer = { ok: await operation(request) };
  } catch (error) {
    answer = { error: describe(error) };
  }
  process.stdout.write(`${JSON.stringify({ id: request.id, ...answer })}\n`);
}

const lines = createInterface({ input: process.stdin });
lines.on('line', (line) => void handle(line));
lines.on('close', () => {
  for (const { client } of clients.values()) {
    client.close();
  }
});
