'use strict';
// Compiles every kernel for every architecture of a release, as CMakeLists.txt does, and holds registers, shared memory
// and stack of each against native/cuda/budget.json; spilled registers and warnings always fail.
// usage: node scripts/kernel-budget.cjs [--jobs N] [--notes DIRECTORY] [--update]
// --notes compiles nothing but reads what a build has said: NAME.cu.txt holds `ptxas -v` of NAME.cu (.ci/nvcc-notes).
// --update writes the table instead of comparing. Exit code 77 without nvcc.
const { execFile, spawnSync } = require('node:child_process');
const { existsSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } = require('node:fs');
const { availableParallelism, tmpdir } = require('node:os');
const { basename, join } = require('node:path');
const { parseArgs } = require('node:util');

const root = join(__dirname, '..');
const tablePath = join(root, 'native', 'cuda', 'budget.json');
const { values: given } = parseArgs({
  options: {
    jobs: { type: 'string', default: String(availableParallelism()) },
    notes: { type: 'string' },
    update: { type: 'boolean' },
  },
});
/** The architectures whose machine code comes from one PTX: [{ ptx: '80', archs: ['80', '86', ...] }, ...]. */
const groups = [
  ...readFileSync(join(root, 'CMakeLists.txt'), 'utf8').matchAll(
    /-gencode=arch=compute_(\d+),code=\[([\w,]+)\]/g,
  ),
].map(([, ptx, code]) => ({ ptx, archs: [...code.matchAll(/sm_(\d+)/g)].map(([, arch]) => arch) }));
const archs = groups.flatMap((group) => group.archs);
const home = process.env.CUDA_HOME ?? process.env.CUDA_PATH;
const nvcc = home && existsSync(join(home, 'bin', 'nvcc')) ? join(home, 'bin', 'nvcc') : 'nvcc';
if (!given.notes && spawnSync(nvcc, ['--version']).status !== 0) {
  console.error('*** NOT RUN: there is no nvcc, so the budget of kernels was not checked. ***');
  process.exit(77);
}

const folder = mkdtempSync(join(tmpdir(), 'kernel-budget-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

/** With the flags of CMakeLists.txt that reach device code. */
function compile(source, { ptx, archs }) {
  const flags = ['-std=c++20', '--fmad=false', '-lineinfo', '-Werror', 'all-warnings', '-Xptxas', '-v'];
  const code = archs.map((arch) => `sm_${arch}`).join(',');
  const args = [
    ...flags,
    '-I',
    join(root, 'native'),
    `-gencode=arch=compute_${ptx},code=[${code}]`,
    '--compress-mode=none',
    '--fatbin',
    '-o',
    join(folder, `${basename(source)}.${ptx}.fatbin`),
    join(root, source),
  ];
  return new Promise((resolve) =>
    execFile(nvcc, args, { maxBuffer: 2 ** 26 }, (error, stdout, stderr) =>
      resolve({ source, code, failed: error !== null, text: stdout + stderr }),
    ),
  );
}

/** What the build of a source has said. */
function notesOf(name) {
  const path = join(given.notes, `${name}.txt`);
  const failed = !existsSync(path);
  return {
    source: name,
    code: groups.flatMap((group) => group.archs).join(','),
    failed,
    text: failed ? `There is no ${path}` : readFileSync(path, 'utf8'),
  };
}

/** What ptxas -v said of each kernel. */
function kernelsOf(text) {
  const pattern =
    /Compiling entry function '(\w+)' for 'sm_(\d+)'\n[^\n]*Function properties[^\n]*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n[^\n]*Used (\d+) registers([^\n]*)/g;
  return [...text.matchAll(pattern)].map(([, mangled, arch, stack, stores, loads, registers, rest]) => ({
    mangled,
    arch,
    stack: Number(stack),
    spilled: Number(stores) + Number(loads),
    registers: Number(registers),
    shared: Number(/(\d+) bytes smem/.exec(rest)?.[1] ?? 0),
  }));
}

/** attend_mma<kToken, 4, kToken, 4, 128, 2>, from a mangled name; demanglers print enumerators as numbers. */
function readable(names) {
  const routes = readFileSync(join(root, 'native', 'cuda', 'routes.h'), 'utf8');
  const scales = [.../enum class Scales[^{]*\{([^}]*)\}/.exec(routes)[1].matchAll(/^\s*(k\w+)/gm)].map(
    ([, name]) => name,
  );
  const { status, stdout } = spawnSync('c++filt', { input: names.join('\n'), encoding: 'utf8' });
  if (status !== 0) throw new Error('c++filt failed; it belongs to binutils, as ld does');
  return stdout
    .trim()
    .split('\n')
    .map((line) => line.replaceAll(/\(int\)/g, '').replaceAll(/\([\w:]*Scales\)(\d+)/g, (_, i) => scales[i]))
    .map((line) => line.replaceAll(/\([\w:]+\)(?=\d)/g, ''))
    .map((line) => /(\w+(?:<[^()]*>)?)\(/.exec(line)?.[1] ?? line);
}

async function main() {
  const sources = readdirSync(join(root, 'native', 'cuda')).filter((name) => name.endsWith('.cu'));
  const results = [];
  if (given.notes) {
    for (const name of sources) results.push(notesOf(name));
  } else {
    const waiting = groups.flatMap((group) => sources.map((name) => [join('native', 'cuda', name), group]));
    const work = async () => {
      for (let next = waiting.shift(); next; next = waiting.shift()) results.push(await compile(...next));
    };
    await Promise.all(Array.from({ length: Number(given.jobs) }, work));
  }

  const wrong = [];
  const found = {};
  for (const { source, code, failed, text } of results) {
    if (failed) {
      console.error(text);
      wrong.push(`${source} does not compile for ${code} without warnings`);
      continue;
    }
    const kernels = kernelsOf(text);
    const names = kernels.length ? readable(kernels.map(({ mangled }) => mangled)) : [];
    kernels.forEach(({ arch, registers, shared, stack, spilled }, i) => {
      if (spilled > 0) wrong.push(`${names[i]} spills ${spilled} bytes on sm_${arch}`);
      (found[names[i]] ??= {})[`sm_${arch}`] = { registers, shared, stack };
    });
  }
  const kernels = Object.keys(found).length;
  if (kernels === 0) wrong.push('no kernel was found: has the output of ptxas -v changed?');
  for (const [name, of] of Object.entries(found))
    for (const arch of archs) if (!of[`sm_${arch}`]) wrong.push(`${name} was not compiled for sm_${arch}`);

  const table = existsSync(tablePath) ? JSON.parse(readFileSync(tablePath, 'utf8')) : {};
  if (given.update) {
    const merged = Object.keys(found)
      .sort()
      .map((name) => [name, found[name]]);
    // Sorted by architecture, one line each: the table is read in reviews.
    const rows = merged.map(([name, of]) => {
      const lines = Object.keys(of)
        .sort((a, b) => Number(a.slice(3)) - Number(b.slice(3)))
        .map(
          (a) =>
            `    "${a}": { "registers": ${of[a].registers}, "shared": ${of[a].shared}, "stack": ${of[a].stack} }`,
        );
      return `  ${JSON.stringify(name)}: {\n${lines.join(',\n')}\n  }`;
    });
    if (wrong.length === 0) writeFileSync(tablePath, `{\n${rows.join(',\n')}\n}\n`);
  } else {
    for (const name of Object.keys(table))
      if (!found[name]) wrong.push(`${name} is in the table but not in the code`);
    for (const [name, of] of Object.entries(found))
      for (const [arch, now] of Object.entries(of)) {
        const allowed = table[name]?.[arch];
        if (!allowed) wrong.push(`${name} for ${arch} is not in the table`);
        else
          for (const what of ['registers', 'shared', 'stack'])
            if (now[what] > allowed[what])
              wrong.push(`${name} for ${arch}: ${now[what]} ${what}, allowed are ${allowed[what]}`);
      }
  }
  for (const line of wrong) console.error(`FAILED ${line}`);
  if (wrong.length > 0 && !given.update)
    console.error('If this is wanted: node scripts/kernel-budget.cjs --update');
  console.log(`${kernels} kernels for ${archs.map((a) => `sm_${a}`).join(', ')}: ${wrong.length} failures`);
  process.exitCode = wrong.length > 0 ? 1 : 0;
}

void main();
