import { readdirSync, readFileSync } from 'node:fs';
import { builtinModules } from 'node:module';
import { dirname, join, relative, resolve } from 'node:path';

// The architecture as a test: who may include or import whom, how long a file may be, what must never be committed.

const root = resolve(__dirname, '..');
const notOurs = /^(node_modules|build(-.*)?|dist|coverage|gpu-bundle|gpu-results|shared|\.git)$/;

function walk(folder: string): string[] {
  return readdirSync(join(root, folder), { withFileTypes: true }).flatMap((entry) => {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) return notOurs.test(entry.name) ? [] : walk(path);
    return entry.isFile() && !/\.log$|\.tar\.xz$/.test(entry.name) ? [path] : [];
  });
}

const files = walk('.');
const text = new Map(files.map((path) => [path, readFileSync(join(root, path), 'utf8')]));
const typescript = (folder: string) => files.filter((f) => f.startsWith(`${folder}/`) && f.endsWith('.ts'));
const native = files.filter((f) => /^native\/.*\.(h|cpp|cu|cuh|inc)$/.test(f));
const sources = files.filter((f) => /^\w+\/.*\.([cm]?[jt]s|h|cc|cpp|cu|cuh|inc)$/.test(f));

/** Every match of `pattern` in `paths` that `objection` answers with a reason, as "file:line: reason". */
function offences(
  paths: string[],
  pattern: RegExp,
  objection: (match: RegExpExecArray, path: string) => string | undefined,
): string[] {
  return paths.flatMap((path) =>
    [...text.get(path)!.matchAll(new RegExp(pattern, 'gm'))].flatMap((match) => {
      const reason = objection(match, path);
      const line = (match.input.slice(0, match.index) + match[0]).split('\n').length;
      return reason === undefined ? [] : [`${path}:${line}: ${reason}`];
    }),
  );
}

const imports = /(?:\bfrom\s*|\bimport\s*\(?\s*|\brequire\w*\(\s*)['"]([^'"\n]+)['"]/;
const includes = /^[ \t]*#[ \t]*include[ \t]*([<"])([^>"\n]+)[>"]/;
/** What `path` imports or includes by `name`, relative to `base` when the name is a relative one. */
const resolved = (base: string, path: string, name: string) =>
  name.startsWith('.') ? relative(join(root, base), resolve(root, dirname(path), name)) : name;

/** Folders of lib from the bottom up: each may import those before it. Types may be imported either way. */
const layers = ['oracle', 'policy', 'cache', 'model', 'eval', 'serve', 'cli'].map((name) => `lib/${name}`);
const level = (path: string) => layers.findIndex((layer) => path === layer || path.startsWith(`${layer}/`));

test('lib: one file loads the addon, arrows point down, oracles and policies are pure', () => {
  const found = offences(typescript('lib'), imports, (match, path) => {
    const name = resolved('.', path, match[1]!);
    if (path.startsWith('lib/cli/')) return;
    if (path !== 'lib/binding.ts' && /^bindings$|\.node$|^build\//.test(name))
      return `only lib/binding.ts may load ${name}`;
    if (/\b(import|export)\s+type\b[^;'"]*$/.test(match.input.slice(0, match.index))) return;
    if (/^lib\/(oracle|policy)\//.test(path) && name === 'lib/binding') return `${name} makes this impure`;
    if (level(path) >= 0 && level(name) > level(path)) return `${dirname(path)} must not import ${name}`;
    return;
  });
  expect(found).toEqual([]);
});

test('test/reference shares nothing with the code under test', () => {
  const found = offences(typescript('test/reference'), imports, (match, path) => {
    const name = resolved('.', path, match[1]!);
    const allowed = name.startsWith('test/reference/') || builtinModules.includes(name.replace(/^node:/, ''));
    return allowed ? undefined : `the reference must not import ${name}`;
  });
  expect(found).toEqual([]);
});

test('native: includes point down', () => {
  const intrinsics = /(^|\/)(\w*mmintrin|immintrin|x86intrin|arm_neon|arm_fp16|arm_acle)\.h$/;
  const found = offences(native, includes, (match, path) => {
    const quoted = match[1] === '"';
    const name = resolved('native', path, quoted && !match[2]!.includes('/') ? `./${match[2]!}` : match[2]!);
    const std = !quoted && /^\w+$/.test(name);
    if (
      /^native\/(format|numerics)\//.test(path) &&
      !std &&
      !/^((format|numerics)\/|platform\.h$)/.test(name)
    )
      return `format and numerics include only each other and std, not ${name}`;
    if (path.startsWith('native/core/') && /napi|node_api|cuda|^cpu\/isa_|^kernels\/|^addon\//.test(name))
      return `core knows neither a device nor Node, but includes ${name}`;
    if (!path.startsWith('native/addon/') && /(^|\/)(napi|node_api)/.test(name))
      return `only the addon may include ${name}`;
    if (!/^native\/(cpu|model)\/isa_/.test(path) && intrinsics.test(name))
      return `intrinsics belong to isa_* files, not ${name}`;
    if (/^native\/(core|cpu)\//.test(path) && name.startsWith('model/'))
      return `the cache knows nothing of models, but includes ${name}`;
    return;
  });
  expect(found).toEqual([]);
});

test('files stay readable: 400 lines, or a header comment with "Long file:" and the reason', () => {
  const found = sources.filter((path) => {
    const all = text.get(path)!.trimEnd().split('\n');
    return all.length > 400 && !/Long file:\s*\w+/.test(all.slice(0, 40).join('\n'));
  });
  expect(found.map((path) => `${path}:401: too long`)).toEqual([]);
});

test('nothing is left unfinished, and no path of one machine is committed', () => {
  const unfinished = new RegExp(`\\b${['TO', 'FIX'].join('DO\\b|\\b')}ME\\b`);
  const machine = new RegExp(`(?:^|[\\s"'\`=(:,<])/(?:${['work', 'home', 'root'].join('|')})\\b(?!-)`);
  const readable = files.filter((path) => !text.get(path)!.includes('\0'));
  const found = [
    ...offences(sources, unfinished, ([word]) => `${word} left in`),
    ...offences(readable, machine, ([path]) => `absolute path ${path.trim()}`),
  ];
  expect(found).toEqual([]);
});

test('native: at most 8 macros of our own, so #pragma once, constexpr and templates', () => {
  const seen = new Set<string>();
  const found = offences(native, /^[ \t]*#[ \t]*define[ \t]+(INNERKV_\w+)/, ([, name]) => {
    if (seen.has(name!)) return;
    seen.add(name!);
    return name;
  });
  expect(found.length > 8 ? found : []).toEqual([]);
});
