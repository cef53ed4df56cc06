import { inspect } from 'node:util';

import type { Duration } from '@bufbuild/protobuf/wkt';

import { TokenBrokerError } from './errors.js';
import type { GetTokenResponse } from './gen/token_broker/v1/token_broker_pb.js';

/** An upstream token of an account. Its text forms do not contain the token itself. */
export class Token {
  readonly #value: string;
  readonly #remaining: () => number;
  /** The account's name. */
  readonly account: string;
  /** A number that grows with each new token of the account. */
  readonly generation: bigint;
  /** The address from which the API may accept the token; empty if the token names none. */
  readonly allowedIp: string;
  /** The base URL of the API for which the token is valid. */
  readonly apiBaseUrl: string;

  /** @internal */
  constructor(
    fields: { account: string; value: string; generation: bigint; allowedIp: string; apiBaseUrl: string },
    remaining: () => number,
  ) {
    this.#value = fields.value;
    this.#remaining = remaining;
    this.account = fields.account;
    this.generation = fields.generation;
    this.allowedIp = fields.allowedIp;
    this.apiBaseUrl = fields.apiBaseUrl;
  }

  /** The token itself, for the header `Authorization: Bearer …`. Do not print it. */
  get value(): string {
    return this.#value;
  }

  /** Returns for how many more milliseconds the token is valid; 0 if it has ended. */
  expiresInMs(): number {
    return Math.max(0, this.#remaining());
  }

  toString(): string {
    return `Token(account=${this.account}, generation=${this.generation.toString()})`;
  }

  toJSON(): object {
    const { account, allowedIp, apiBaseUrl } = this;
    return { account, generation: this.generation.toString(), allowedIp, apiBaseUrl };
  }

  [inspect.custom](): string {
    return this.toString();
  }
}

/** A token with the monotonic times, in milliseconds, until which it may be used. */
export interface Kept {
  token: Token;
  /** When the token should be asked for again. */
  reuseEnd: number;
  /** When the token ends. */
  end: number;
}

/**
 * Returns the token of an answer that counts as arrived at `arrival`.
 *
 * Throws an `INTERNAL` error if the answer cannot be used.
 */
export function keptFrom(
  account: string,
  answer: GetTokenResponse,
  arrival: number,
  now: () => number,
): Kept {
  const reuseFor = answer.reuseFor ? milliseconds(answer.reuseFor) : 0;
  const expiresIn = answer.expiresIn ? milliseconds(answer.expiresIn) : 0;
  if (answer.accessToken === '' || reuseFor <= 0 || expiresIn <= 0) {
    throw new TokenBrokerError('INTERNAL', 'the answer has no token, or no time for which to keep it', {
      account,
    });
  }
  const { accessToken: value, generation, allowedIp, apiBaseUrl } = answer;
  const end = arrival + expiresIn;
  return {
    token: new Token({ account, value, generation, allowedIp, apiBaseUrl }, () => end - now()),
    reuseEnd: arrival + reuseFor,
    end,
  };
}

export function milliseconds({ seconds, nanos }: Duration): number {
  return Number(seconds) * 1000 + nanos / 1e6;
}
