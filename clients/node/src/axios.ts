import { AxiosError, type AxiosInstance, type AxiosResponse, type InternalAxiosRequestConfig } from 'axios';

import type { TokenClient } from './client.js';
import { TokenBrokerError } from './errors.js';
import { checkHost, refusalCode, refusalIn } from './refusal.js';
import type { Token } from './token.js';

/** How `addTokens` waits. */
export interface AddTokensOptions {
  /** How long each request waits for a token, in milliseconds; as long as the client says, if it is absent. */
  timeoutMs?: number | undefined;
}

type Config = InternalAxiosRequestConfig & { tokenBroker?: { newer: Token } };

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
  const sent = new WeakMap<object, Token>();

  const onRequest = async (config: Config) => {
    const signal = config.signal as AbortSignal | undefined;
    const token = config.tokenBroker?.newer ?? (await client.token(account, { timeoutMs, signal }));
    checkHost(instance.getUri(config), token);
    config.headers.set('Authorization', `Bearer ${token.value}`);
    const beforeRedirect = config.beforeRedirect;
    config.beforeRedirect = (options, ...others) => {
      checkHost(String(options.href), token);
      beforeRedirect?.(options, ...others);
    };
    sent.set(config, token);
    return config;
  };

  /** Returns the answer of a second attempt, or nothing if the first answer is final. */
  const onAnswer = async (response: AxiosResponse): Promise<AxiosResponse | undefined> => {
    const config = response.config as Config;
    const token = sent.get(config);
    const code = refusalOf(response);
    if (code === undefined || token === undefined || config.tokenBroker) {
      return undefined;
    }
    const signal = config.signal as AbortSignal | undefined;
    const newer = await client.replace(token, code, { timeoutMs, signal });
    return newer && canRepeat(config)
      ? await instance.request({ ...config, tokenBroker: { newer } } as Config)
      : undefined;
  };

  const requests = instance.interceptors.request.use(onRequest);
  const responses = instance.interceptors.response.use(
    async (response) => (await onAnswer(response)) ?? response,
    async (error: unknown) => {
      if (error instanceof AxiosError) {
        throwCauseOfOurs(error);
        const second = error.response && (await onAnswer(error.response));
        if (second) {
          return second;
        }
      }
      throw error;
    },
  );
  return () => {
    instance.interceptors.request.eject(requests);
    instance.interceptors.response.eject(responses);
  };
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

function canRepeat({ data }: InternalAxiosRequestConfig<unknown>): boolean {
  return !(typeof data === 'object' && data !== null && ('pipe' in data || data instanceof ReadableStream));
}
