'use strict';
// Makes gpu-bundle/ and gpu-bundle.tar.xz: everything that gpu/run.sh needs on a machine without a network: this Node.js
// with its N-API headers, the packages that run tests, and the tracked files of the project as they are now.
const { execFileSync } = require('node:child_process');
const {
  chmodSync,
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  readFileSync,
  rmSync,
  statSync,
} = require('node:fs');
const { dirname, join } = require('node:path');

const LIMIT = 40e6;
const root = join(__dirname, '..');
const bundle = join(root, 'gpu-bundle');
const archive = `${bundle}.tar.xz`;
const RUNNERS = ['fast-check', 'jest', 'node-addon-api', 'ts-jest', 'ts-node', 'typescript'];

/** Folders of the packages that `names` need, found as Node.js finds them; optional ones where they are installed. */
function closure(names) {
  const { packages } = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8'));
  const found = new Set();
  const find = (from, name) => {
    for (
      let folder = from;
      ;
      folder = folder.slice(0, Math.max(0, folder.lastIndexOf('node_modules/') - 1))
    ) {
      const path = join(folder, 'node_modules', name);
      if (packages[path]) return path;
      if (folder === '') return undefined;
    }
  };
  const add = (from, name) => {
    const path = find(from, name);
    if (path === undefined || found.has(path) || !existsSync(join(root, path))) return;
    found.add(path);
    const { dependencies, optionalDependencies, peerDependencies } = packages[path];
    for (const needed of Object.keys({ ...dependencies, ...optionalDependencies, ...peerDependencies }))
      add(path, needed);
  };
  for (const name of names) add('', name);
  return [...found];
}

const { dependencies } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
rmSync(bundle, { recursive: true, force: true });
mkdirSync(join(bundle, 'node', 'bin'), { recursive: true });

// Files that are new but not ignored belong to it too: the bundle is of the working tree.
const list = execFileSync('git', ['ls-files', '-z', '--cached', '--others', '--exclude-standard'], {
  cwd: root,
});
for (const path of list
  .toString()
  .split('\0')
  .filter((name) => name !== '' && existsSync(join(root, name)))) {
  mkdirSync(dirname(join(bundle, path)), { recursive: true });
  copyFileSync(join(root, path), join(bundle, path));
}
const skipped = /\.(map|md|markdown)$|\.d\.[cm]?ts$|\/node_modules$/;
for (const path of closure([...Object.keys(dependencies), ...RUNNERS]))
  cpSync(join(root, path), join(bundle, path), {
    recursive: true,
    filter: (from) =>
      from === join(root, path) || (!skipped.test(from) && !/typescript\/lib\/\w\w(-\w+)?$/.test(from)),
  });

copyFileSync(process.execPath, join(bundle, 'node', 'bin', 'node'));
chmodSync(join(bundle, 'node', 'bin', 'node'), 0o755);
const headers = join(dirname(dirname(process.execPath)), 'include', 'node');
if (!existsSync(join(headers, 'node_api.h')))
  throw new Error(`There are no headers of Node.js in ${headers}; install its development files.`);
mkdirSync(join(bundle, 'node', 'include'));
for (const name of ['js_native_api.h', 'js_native_api_types.h', 'node_api.h', 'node_api_types.h'])
  copyFileSync(join(headers, name), join(bundle, 'node', 'include', name));

const env = { ...process.env, XZ_OPT: '-6 -T0' };
execFileSync('tar', ['-cJf', archive, '--owner=0', '--group=0', '-C', root, 'gpu-bundle'], {
  env,
  stdio: 'inherit',
});
const { size } = statSync(archive);
console.log(`${archive}: ${(size / 1e6).toFixed(1)} MB`);
if (size > LIMIT) {
  console.error(`FAILED: the limit is ${LIMIT / 1e6} MB`);
  process.exitCode = 1;
}
