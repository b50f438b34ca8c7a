import { readFileSync } from 'node:fs';
import { join } from 'node:path';

/** Version of this package, from its package.json. */
export function version(): string {
  const text = readFileSync(join(__dirname, '..', '..', 'package.json'), 'utf8');
  return (JSON.parse(text) as { version: string }).version;
}

/** What a measurement depends on, for JSON output. */
export function versions(): Record<string, string> {
  return { innerkv: version(), node: process.versions.node, platform: `${process.platform}-${process.arch}` };
}
