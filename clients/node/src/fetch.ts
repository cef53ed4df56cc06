import type { TokenClient } from './client.js';
import { TokenBrokerError } from './errors.js';
import { checkHost, LONGEST_BODY, refusalIn } from './refusal.js';
import type { Token } from './token.js';

/** How `createFetch` sends requests. */
export interface FetchOptions {
  /** What sends the requests; Node's `fetch`, if it is absent. */
  fetch?: typeof fetch | undefined;
  /** How long each request waits for a token, in milliseconds; as long as the client says, if it is absent. */
  timeoutMs?: number | undefined;
}

/** The most redirects that are followed, as in `fetch` itself. */
const MOST_REDIRECTS = 20;

const REDIRECTS: ReadonlySet<number> = new Set([301, 302, 303, 307, 308]);

/**
 * Returns a `fetch` that sends the account's token with each request to the API, and sends a request again, once,
 * if the API refused the token. A request or a redirect to another host fails with `WRONG_HOST`.
 *
 * A body that is a stream, as that of a `Request` is, is not sent again. Other bodies are held in memory until the answer has come.
 */
export function createFetch(client: TokenClient, account: string, options: FetchOptions = {}): typeof fetch {
  const send = options.fetch ?? fetch;
  const { timeoutMs } = options;

  return async (input, init) => {
    const request = new Request(input, init);
    const { signal } = request;
    const isStream = request.body !== null && isSingleUse(init?.body ?? input);
    const message = await messageOf(request, init, isStream);
    try {
      const token = await client.token(account, { timeoutMs, signal });
      const response = await sendWith(token, message, send);
      const code = await refusalOf(response);
      const newer = code === undefined ? undefined : await client.replace(token, code, { timeoutMs, signal });
      if (newer === undefined || !message.canRepeat) {
        return response;
      }
      await response.body?.cancel();
      return await sendWith(newer, message, send);
    } catch (error) {
      if (error instanceof TokenBrokerError && error.kind === 'CANCELLED') {
        // Who cancels a `fetch` expects the reason that was given.
        signal.throwIfAborted();
      }
      throw error;
    }
  };
}

/** A request whose body can be sent more than once, unless it is a stream. */
interface Message {
  url: string;
  init: RequestInit;
  redirect: Request['redirect'];
  canRepeat: boolean;
}

async function messageOf(
  request: Request,
  given: RequestInit | undefined,
  isStream: boolean,
): Promise<Message> {
  const { url, method, headers, signal, redirect } = request;
  const init: RequestInit = { ...given, method, headers, signal, redirect: 'manual' };
  if (isStream) {
    init.body = request.body;
    init.duplex = 'half';
  } else if (request.body !== null) {
    init.body = await request.arrayBuffer();
  }
  return { url, init, redirect, canRepeat: !isStream };
}

/** Says whether a body, or a request with one, is a stream or another source that is read once. */
function isSingleUse(body: unknown): boolean {
  return (
    typeof body === 'object' &&
    body !== null &&
    (body instanceof Request || body instanceof ReadableStream || Symbol.asyncIterator in body)
  );
}

/** Sends a message with the token, and follows redirects within the host of the API. */
async function sendWith(token: Token, message: Message, send: typeof fetch): Promise<Response> {
  let { url, init } = message;
  const headers = new Headers(init.headers);
  headers.set('authorization', `Bearer ${token.value}`);
  init = { ...init, headers };
  for (let redirects = 0; ; redirects++) {
    checkHost(url, token);
    const response = await send(url, init);
    const location = REDIRECTS.has(response.status) ? response.headers.get('location') : null;
    if (location === null || message.redirect === 'manual') {
      return response;
    }
    await response.body?.cancel();
    if (message.redirect === 'error' || redirects === MOST_REDIRECTS) {
      throw new TypeError(message.redirect === 'error' ? 'unexpected redirect' : 'too many redirects');
    }
    url = new URL(location, url).href;
    init = redirected(init, response.status);
    if (init.body !== undefined && !message.canRepeat) {
      throw new TypeError('a stream cannot be sent again to the target of a redirect');
    }
  }
}

/** Returns the request for the target of a redirect: most statuses make a GET of what was a POST. */
function redirected(init: RequestInit, status: number): RequestInit {
  const becomesGet =
    status === 303
      ? init.method !== 'GET' && init.method !== 'HEAD'
      : status <= 302 && init.method === 'POST';
  if (!becomesGet) {
    return init;
  }
  const { body, ...others } = init;
  const headers = new Headers(init.headers);
  for (const name of [
    'content-encoding',
    'content-language',
    'content-location',
    'content-type',
    'content-length',
  ]) {
    headers.delete(name);
  }
  return { ...others, method: 'GET', headers };
}

/** Returns the code with which the API refused the token. The body can still be read afterwards. */
async function refusalOf(response: Response): Promise<string | undefined> {
  if (response.status < 400 || response.body === null) {
    return undefined;
  }
  try {
    const body = await start(response.clone());
    return body && refusalIn(response.status, body);
  } catch {
    // The program has the status, and hears what is wrong with the body when it reads it.
    return undefined;
  }
}

/** Returns the body, or nothing if it is too long. */
async function start({ body }: Response): Promise<Uint8Array | undefined> {
  const chunks: Uint8Array[] = [];
  let length = 0;
  const reader = (body as ReadableStream<Uint8Array>).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) {
      return Buffer.concat(chunks);
    }
    length += value.byteLength;
    if (length > LONGEST_BODY) {
      // The other branch of the body goes on, so this never settles before it is read.
      void reader.cancel();
      return undefined;
    }
    chunks.push(value);
  }
}
