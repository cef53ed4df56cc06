import { X509Certificate } from 'node:crypto';
import { createSecureContext, type SecureContext } from 'node:tls';

import { readTextSync } from './files.js';
import type { Logger } from './log.js';
import { invalid, type Settings } from './settings.js';

/** The files for TLS, and the last contents of them that could be used. */
export class Certificates {
  readonly #settings: Settings;
  readonly #log: Logger;
  /** The contents that were looked at last, usable or not. */
  #seen: string;
  #isSeenUsable = true;
  #context: SecureContext;
  #lastFailure = '';

  /** Throws an `INVALID_ARGUMENT` error if the files cannot be used. */
  constructor(settings: Settings) {
    this.#settings = settings;
    this.#log = settings.logger;
    try {
      const files = readAll(settings);
      this.#seen = JSON.stringify(files);
      this.#context = contextFrom(files);
    } catch (error) {
      throw invalid(`the files for TLS cannot be used: ${String(error)}`);
    }
  }

  get context(): SecureContext {
    return this.#context;
  }

  /** Looks at the files. Returns whether there is another context now. */
  reload(): boolean {
    try {
      const files = readAll(this.#settings);
      const seen = JSON.stringify(files);
      if (seen === this.#seen) {
        // Contents that could not be used are still a failure that was logged.
        if (this.#isSeenUsable) {
          this.#lastFailure = '';
        }
        return false;
      }
      this.#seen = seen;
      this.#isSeenUsable = false;
      this.#context = contextFrom(files);
      this.#isSeenUsable = true;
      this.#lastFailure = '';
      this.#log.debug('the files for TLS have changed');
      return true;
    } catch (error) {
      // A file that is missing has no contents to compare, so the error stands for them.
      const failure = String(error);
      if (failure !== this.#lastFailure) {
        this.#lastFailure = failure;
        this.#log.warn(
          `the files for TLS have changed and cannot be used, the last ones are kept: ${failure}`,
        );
      }
      return false;
    }
  }
}

interface Files {
  ca: string | undefined;
  cert: string | undefined;
  key: string | undefined;
}

/** Reads the files without yielding, so that they are of one moment as far as possible. They are small. */
function readAll({ caFile, clientCertFile, clientKeyFile }: Settings): Files {
  const read = (file: string | undefined) => (file === undefined ? undefined : readTextSync(file));
  return { ca: read(caFile), cert: read(clientCertFile), key: read(clientKeyFile) };
}

/** Fails if a file is no PEM, or if the key is not that of the certificate. */
function contextFrom({ ca, cert, key }: Files): SecureContext {
  if (ca !== undefined) {
    // OpenSSL takes a text without certificates for an empty list.
    new X509Certificate(ca);
  }
  return createSecureContext({ ca, cert, key, minVersion: 'TLSv1.2' });
}
