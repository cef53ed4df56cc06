import { existsSync, readFileSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { dirname, sep } from 'node:path';
import { getSystemErrorMap } from 'node:util';

/**
 * Returns the text of a file, without a byte order mark. Throws an error that is safe to print: it does not quote the file,
 * and see {@link shown}.
 */
export function readTextSync(file: string): string {
  let bytes;
  try {
    bytes = readFileSync(file);
  } catch (error) {
    throw unreadable(file, error);
  }
  return textOf(file, bytes);
}

/** Does what {@link readTextSync} does, without blocking. */
export async function readText(file: string): Promise<string> {
  let bytes;
  try {
    bytes = await readFile(file);
  } catch (error) {
    throw unreadable(file, error);
  }
  return textOf(file, bytes);
}

/** People write files also with the tools of Windows, in UTF-16 with a byte order mark, or in UTF-8 with one. */
function textOf(file: string, bytes: Buffer): string {
  const mark = bytes.subarray(0, 2).toString('hex');
  if (mark !== 'fffe' && mark !== 'feff') {
    return new TextDecoder().decode(bytes);
  }
  const units = Buffer.from(bytes.subarray(2));
  try {
    // Node may have been built without a decoder of big endian.
    return new TextDecoder('utf-16le', { fatal: true }).decode(mark === 'feff' ? units.swap16() : units);
  } catch {
    throw new Error(`${shown(file)} is malformed UTF-16`);
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

/**
 * Returns whether the directory of a path exists, the root and the current one apart: neither base64 nor another key
 * names such a one.
 */
function isInDirectory(file: string): boolean {
  const directory = dirname(file);
  // On Linux a backslash separates nothing: a key on one line has it in front of each `n`.
  const isNamed = file.includes('/') || (sep === '\\' && file.includes('\\'));
  // The slash at the end makes a file be no directory. `existsSync` never fails, unlike `statSync`.
  return isNamed && !/^[/\\]+$/.test(directory) && existsSync(`${directory}/`);
}

/** The text and the properties of Node's own error contain the path. */
function unreadable(file: string, error: unknown): Error {
  const { code, errno } = error as NodeJS.ErrnoException;
  const why = errno === undefined ? undefined : getSystemErrorMap().get(errno)?.[1];
  return new Error(`${shown(file)} cannot be read: ${why ?? code ?? 'for an unknown reason'}`);
}
