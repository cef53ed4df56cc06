import { existsSync, readFileSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { dirname } from 'node:path';
import { getSystemErrorMap } from 'node:util';

/** Returns the text of a file, or throws an error that is safe to print: see {@link shown}. */
export function readTextSync(file: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch (error) {
    throw unreadable(file, error);
  }
}

/** Does what {@link readTextSync} does, without blocking. */
export async function readText(file: string): Promise<string> {
  try {
    return await readFile(file, 'utf8');
  } catch (error) {
    throw unreadable(file, error);
  }
}

/**
 * Returns a path for an error or a log message: as it is if it exists or if its directory does, and otherwise a text
 * that does not contain it. A frequent mistake is to give the content of a file, such as a bearer, instead of its path.
 */
export function shown(file: string): string {
  // eslint-disable-next-line no-control-regex -- A private key in PEM has line feeds.
  const isContent = /[\x00-\x1f\x7f]|:\/\//.test(file);
  return !isContent && (existsSync(file) || isInDirectory(file))
    ? file
    : '(path not shown: nothing is there)';
}

/** Neither base64 nor another key names a directory that exists, except the root and the current one. */
function isInDirectory(file: string): boolean {
  const directory = dirname(file);
  // The slash at the end makes a file be no directory. `existsSync` never fails, unlike `statSync`.
  return /[/\\]/.test(file) && directory !== '/' && existsSync(`${directory}/`);
}

/** The text and the properties of Node's own error contain the path. */
function unreadable(file: string, error: unknown): Error {
  const { code, errno } = error as NodeJS.ErrnoException;
  const why = errno === undefined ? undefined : getSystemErrorMap().get(errno)?.[1];
  return new Error(`${shown(file)} cannot be read: ${why ?? code ?? 'for an unknown reason'}`);
}
