import type { Clock } from './clock.js';
import { readText, readTextSync, shown } from './files.js';
import type { Logger } from './log.js';
import { invalid } from './settings.js';

/** For how long the file is not read again. */
const FRESH_MS = 1000;

/** The bearer in a file, which is read again from time to time. */
export class Bearer {
  readonly #file: string;
  readonly #clock: Clock;
  readonly #log: Logger;
  #value: string;
  #readAt: number;
  #lastFailure = '';

  /** Throws an `INVALID_ARGUMENT` error if the file has no bearer. */
  constructor(file: string, clock: Clock, log: Logger) {
    this.#file = file;
    this.#clock = clock;
    this.#log = log;
    this.#value = parse(file, contents(file));
    this.#readAt = clock.now();
  }

  /** Returns the bearer, after reading the file again if it was last read over a second ago. */
  async current(): Promise<string> {
    return this.#clock.now() - this.#readAt > FRESH_MS ? await this.read() : this.#value;
  }

  /** Reads the file again, and returns its bearer. Returns the last one if the file cannot be used. */
  async read(): Promise<string> {
    this.#readAt = this.#clock.now();
    try {
      this.#value = parse(this.#file, await readText(this.#file));
      this.#lastFailure = '';
    } catch (error) {
      const failure = messageOf(error);
      if (failure !== this.#lastFailure) {
        this.#lastFailure = failure;
        this.#log.warn(`the file of the bearer cannot be used, the last bearer is kept: ${failure}`);
      }
    }
    return this.#value;
  }
}

function contents(file: string): string {
  try {
    return readTextSync(file);
  } catch (error) {
    throw invalid(`the file of the bearer cannot be used: ${messageOf(error)}`);
  }
}

/** Returns the bearer in the text of a file. Its errors do not quote the text. */
function parse(file: string, text: string): string {
  const bearer = text.trim();
  if (!/^[\x21-\x7e]+$/.test(bearer)) {
    throw invalid(`${shown(file)} must contain one bearer, and nothing else`);
  }
  return bearer;
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
