import { spawn } from 'node:child_process';
import { once } from 'node:events';

/** Runs a program, which may import this package by its name, in a process of its own. */
export async function run(
  type: 'module' | 'commonjs',
  program: string,
  args: string[] = [],
  environment: Record<string, string> = {},
): Promise<{ code: number; output: string }> {
  const child = spawn(process.execPath, [`--input-type=${type}`, '--eval', program, ...args], {
    stdio: ['ignore', 'pipe', 'inherit'],
    env: { ...process.env, ...environment },
  });
  let output = '';
  child.stdout.on('data', (chunk: Buffer) => (output += chunk.toString()));
  const [code] = (await once(child, 'close')) as [number];
  return { code, output };
}
