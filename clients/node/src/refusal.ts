// The rules of the adapters: where a token may go, and which answers say that it was refused.
import { TokenBrokerError } from './errors.js';
import type { Token } from './token.js';

/** The longest body in which a code is looked for. */
export const LONGEST_BODY = 64 * 1024;

const TOKEN_CODES: ReadonlySet<string> = new Set(['61003', '61004']);

/** Throws a `WRONG_HOST` error if the URL is not on the host of the token's API. */
export function checkHost(url: string, { account, apiBaseUrl }: Token): void {
  const origin = URL.canParse(url) ? new URL(url).origin : undefined;
  const expected = URL.canParse(apiBaseUrl) ? new URL(apiBaseUrl).origin : undefined;
  if (origin === undefined || origin !== expected) {
    const place = origin ?? 'an address that is no URL';
    throw new TokenBrokerError(
      'WRONG_HOST',
      `the token is for ${expected ?? 'another host'}, and is not sent to ${place}`,
      { account },
    );
  }
}

/** Returns the code that says that the API refused the token, or nothing if the body says something else. */
export function refusalIn(status: number, body: Uint8Array | string): string | undefined {
  if (status < 400 || Buffer.byteLength(body) > LONGEST_BODY) {
    return undefined;
  }
  try {
    const text = typeof body === 'string' ? body : new TextDecoder().decode(body);
    return refusalCode(status, JSON.parse(text));
  } catch {
    return undefined;
  }
}

/** Does the same for a body that was parsed already. */
export function refusalCode(status: number, body: unknown): string | undefined {
  if (status < 400) {
    return undefined;
  }
  const code = property(property(body, 'error'), 'code') ?? property(body, 'code');
  const text = typeof code === 'number' || typeof code === 'string' ? String(code) : '';
  return TOKEN_CODES.has(text) ? text : undefined;
}

function property(value: unknown, name: string): unknown {
  return typeof value === 'object' && value !== null && name in value
    ? (value as Record<string, unknown>)[name]
    : undefined;
}
