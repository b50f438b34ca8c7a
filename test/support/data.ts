/**
 * Evaluation data that are no part of the project: the folder INNERKV_DATA, by default ../shared/data beside the
 * repository. Tests that need them say so when they are skipped.
 */
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';

const root = resolve(process.env.INNERKV_DATA ?? join(__dirname, '..', '..', '..', 'shared', 'data'));

export function dataPath(...names: string[]): string {
  return join(root, ...names);
}

/** `describe` where all `paths` (relative to the data folder) are there, else a skipped test and a line on stderr. */
export function describeWithData(title: string, paths: readonly string[], body: () => void): void {
  const missing = paths.filter((path) => !existsSync(dataPath(path)));
  if (missing.length === 0) {
    describe(title, body);
    return;
  }
  process.stderr.write(`SKIPPED: ${title}: no ${missing.join(', ')} in ${root} (INNERKV_DATA)\n`);
  test.skip(`${title}: no data`, () => undefined);
}
