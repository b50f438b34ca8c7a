'use strict';
// Runs after `npm ci` and before packing, in this package's own checkout only (npm never runs it for dependants).
// `npx innerkv` inside the checkout links the package into npm's cache, which runs this too: then nothing is built.
// Both builds are tried, so one report shows everything that is wrong; any failure fails the installation.
const { spawnSync } = require('node:child_process');
const { existsSync } = require('node:fs');
const { availableParallelism } = require('node:os');
const { join } = require('node:path');

const root = join(__dirname, '..');
const failed = [];
process.env.CMAKE_BUILD_PARALLEL_LEVEL ??= String(availableParallelism()); // make, unlike ninja, defaults to one

function build(script, source) {
  if (!existsSync(join(root, source))) {
    console.error(`innerkv: SKIPPED ${script}: there is no ${source}`);
    return;
  }
  const { status, signal, error } = spawnSync('npm', ['run', script], { cwd: root, stdio: 'inherit' });
  if (status !== 0) failed.push(`npm run ${script}: ${error?.message ?? signal ?? `exit status ${status}`}`);
}

if (process.env.npm_command !== 'exec') {
  build('build:native', 'CMakeLists.txt');
  build('build:ts', 'lib/index.ts');
}
for (const line of failed) console.error(`innerkv: FAILED ${line}`);
process.exitCode = failed.length === 0 ? 0 : 1;
