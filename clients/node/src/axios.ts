import {
  Axios,
  type AxiosAdapter,
  type AxiosInstance,
  type AxiosResponse,
  getAdapter,
  type InternalAxiosRequestConfig,
  isAxiosError,
} from 'axios';

import type { TokenClient } from './client.js';
import { TokenBrokerError } from './errors.js';
import { checkHost, refusalCode, refusalIn } from './refusal.js';
import type { Token } from './token.js';

/** How `addTokens` waits. */
export interface AddTokensOptions {
  /** How long each request waits for a token, in milliseconds; as long as the client says, if it is absent. */
  timeoutMs?: number | undefined;
}

type Config = InternalAxiosRequestConfig<unknown>;

/** Builds the URL of a request from nothing but its own configuration, as what sends it does. */
const urls = new Axios({});

/**
 * Makes an instance of axios send the account's token with each request to the API, and send a request again,
 * once, if the API refused the token. A request or a redirect to another host fails with `WRONG_HOST`. Returns a
 * function that ends this.
 */
export function addTokens(
  instance: AxiosInstance,
  client: TokenClient,
  account: string,
  { timeoutMs }: AddTokensOptions = {},
): () => void {
  const send = async (config: Config, adapter: AxiosAdapter): Promise<AxiosResponse> => {
    const signal = config.signal as AbortSignal | undefined;
    const token = await client.token(account, { timeoutMs, signal });
    const first = await outcomeOf(sendWith(token, config, adapter));
    const code = first.response && refusalOf(first.response);
    const newer = code === undefined ? undefined : await client.replace(token, code, { timeoutMs, signal });
    if (newer === undefined || !canRepeat(config)) {
      return first.result();
    }
    return await sendWith(newer, config, adapter);
  };

  const requests = instance.interceptors.request.use((config) => {
    // Other interceptors may still change where the request goes, so the token is added behind them.
    const { adapter } = config;
    config.adapter = (last) => {
      // Whoever sends the configuration of an answer again gets one adapter around this, not two.
      last.adapter = adapter as AxiosAdapter;
      return send(last, getAdapter(adapter));
    };
    return config;
  });
  return () => {
    instance.interceptors.request.eject(requests);
  };
}

interface Outcome {
  response: AxiosResponse | undefined;
  /** Returns the response, or throws if axios did. */
  result: () => AxiosResponse;
}

async function outcomeOf(sending: Promise<AxiosResponse>): Promise<Outcome> {
  try {
    const response = await sending;
    return { response, result: () => response };
  } catch (error) {
    return {
      response: isAxiosError(error) ? error.response : undefined,
      result: () => {
        throw error;
      },
    };
  }
}

/** Sends a request with the token, which neither its configuration nor the text of the outcome contains. */
async function sendWith(token: Token, config: Config, adapter: AxiosAdapter): Promise<AxiosResponse> {
  checkHost(urls.getUri(config), token);
  const { beforeRedirect } = config;
  const authorized: Config = {
    ...config,
    headers: config.headers.concat({ Authorization: `Bearer ${token.value}` }),
    beforeRedirect: (options, ...others) => {
      checkHost(String(options.href), token);
      beforeRedirect?.(options, ...others);
    },
  };
  try {
    return withoutToken(await adapter(authorized), config);
  } catch (error) {
    if (isAxiosError(error)) {
      throwCauseOfOurs(error);
      withoutToken(error, config);
      if (error.response) {
        withoutToken(error.response, config);
      }
    }
    throw error;
  }
}

/** Gives a part of the outcome the program's configuration, and hides Node's request, which has all headers. */
function withoutToken<T extends { config?: Config; request?: unknown }>(part: T, config: Config): T {
  part.config = config;
  Object.defineProperty(part, 'request', {
    value: part.request,
    enumerable: false,
    writable: true,
    configurable: true,
  });
  return part;
}

/** Throws what `beforeRedirect` has thrown, which the libraries below wrap. */
function throwCauseOfOurs(error: Error): void {
  for (let cause = error.cause; cause instanceof Error; cause = cause.cause) {
    if (cause instanceof TokenBrokerError) {
      throw cause;
    }
  }
}

/** Returns the code with which the API refused the token. Bodies that are streams are not read. */
function refusalOf({ status, data }: AxiosResponse<unknown>): string | undefined {
  if (typeof data === 'string' || data instanceof Uint8Array) {
    return refusalIn(status, data);
  }
  return data instanceof ArrayBuffer ? refusalIn(status, new Uint8Array(data)) : refusalCode(status, data);
}

function canRepeat({ data }: Config): boolean {
  return !(typeof data === 'object' && data !== null && ('pipe' in data || data instanceof ReadableStream));
}
