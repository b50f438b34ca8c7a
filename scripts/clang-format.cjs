'use strict';
// Formats the native sources in place, or with --check reports what would change. The result differs between
// clang-format releases, so only release 19 is used; without it nothing is checked and this says so.
const { spawnSync } = require('node:child_process');
const { existsSync, readdirSync } = require('node:fs');
const { join } = require('node:path');

const RELEASE = 19;
const root = join(__dirname, '..');

const sources = ['native', 'test/native', 'benchmarks/native']
  .filter((folder) => existsSync(join(root, folder)))
  .flatMap((folder) => readdirSync(join(root, folder), { recursive: true }).map((name) => join(folder, name)))
  .filter((path) => /\.(h|cpp|cc|cu|cuh|inc)$/.test(path))
  .sort();

const tool = [`clang-format-${RELEASE}`, 'clang-format'].find((name) => {
  const { stdout } = spawnSync(name, ['--version'], { encoding: 'utf8' });
  return new RegExp(`version ${RELEASE}\\.`).test(stdout ?? '');
});

if (!tool) {
  console.error(
    `\n*** ${sources.length} native files were NOT checked: clang-format ${RELEASE} is not installed. ***\n`,
  );
} else if (sources.length > 0) {
  const mode = process.argv.includes('--check') ? ['--dry-run', '--Werror'] : ['-i'];
  const { status } = spawnSync(tool, [...mode, ...sources], { cwd: root, stdio: 'inherit' });
  if (status === 0) console.log(`${tool}: ${sources.length} native files in style`);
  process.exitCode = status ?? 1;
}
