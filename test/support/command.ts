import { spawnSync } from 'node:child_process';
import { join } from 'node:path';

const root = join(__dirname, '..', '..');

/** Runs bin/innerkv.js from source, as a user would. */
export function innerkv(args: readonly string[], environment: Readonly<Record<string, string>> = {}) {
  return node([join('bin', 'innerkv.js'), ...args], environment);
}

/** Runs Node.js in the package's folder. */
export function node(args: readonly string[], environment: Readonly<Record<string, string>> = {}) {
  const { status, stdout, stderr } = spawnSync(process.execPath, args, {
    cwd: root,
    encoding: 'utf8',
    env: { ...process.env, INNERKV_SOURCE: '1', ...environment },
    maxBuffer: 2 ** 26,
  });
  return { status, stdout, stderr };
}

/** Runs JavaScript that may require('./lib') in a process of its own. */
export function script(
  code: string,
  flags: readonly string[] = [],
  environment: Readonly<Record<string, string>> = {},
) {
  const prelude = "require('ts-node').register({ transpileOnly: true });";
  return node([...flags, '-e', prelude + code], environment);
}
