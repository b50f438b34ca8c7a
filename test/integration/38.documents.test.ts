/** What the documents say: their code compiles under the project's rules and runs, and their tables are whole. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import * as innerkv from '../../lib';
import { programOf, runProgram, typeErrors } from '../support/documents';
import { runnableGguf } from '../support/gguf';

const pages = ['README.md', 'docs/api.md', 'docs/runner.md'];
const folder = mkdtempSync(join(tmpdir(), 'innerkv-'));
const model = join(folder, 'model.gguf');
beforeAll(() => writeFileSync(model, runnableGguf()));
afterAll(() => rmSync(folder, { recursive: true }));

// What is a file in the reader's folder is a tiny model here.
const programs = new Map(
  pages.map((page) => [page, programOf(page).replaceAll("'model.gguf'", JSON.stringify(model))]),
);

test('the examples compile', () => {
  expect([...programs.values()].every((text) => /\bcreate(Cache)?\(/.test(text))).toBe(true);
  expect(typeErrors(programs)).toEqual([]);
}, 60_000);

test('the example of the README runs', async () => {
  await expect(runProgram(programs.get('README.md')!, innerkv)).resolves.toEqual([]);
});

test('the examples of docs/api.md run, and print what they say', async () => {
  const printed = await runProgram(programs.get('docs/api.md')!, innerkv);
  // The abort may come too late: that call is then simply done.
  expect(printed.filter((line) => line !== 'not needed any more')).toEqual([
    expect.stringMatching(/\w/),
    expect.stringMatching(/^0\.\d+ 3\.25$/),
    expect.stringContaining('integer dot products'),
    '300 32 172',
    '512 1024',
    expect.stringMatching(/^ERR_INNERKV_INVALID_ARGUMENT /),
    '8,128 2048',
    '256',
  ]);
});

test('the examples of docs/runner.md run', async () => {
  await expect(runProgram(programs.get('docs/runner.md')!, innerkv)).resolves.toEqual([
    expect.stringMatching(/^maxTokens 40 3\.25 \d+$/),
    '3 7',
  ]);
});

test('docs/cuda.md has the table of attend_mma as native/cuda/routes.h has it', () => {
  const read = (...path: string[]): string => readFileSync(join(__dirname, '..', '..', ...path), 'utf8');
  const scales = {
    Token: '`token`',
    Channels32: '`channels32`',
    Tokens32: '`tokens32`',
    Tokens32Hybrid: '`tokens32` hybrid',
  };
  const cell = (name: string, bits: string): string => `${bits} bits ${scales[name as keyof typeof scales]}`;
  const routes = read('native', 'cuda', 'routes.h').matchAll(
    /\{Scales::k(\w+), (\d), Scales::k(\w+), (\d)(, true)?\}/g,
  );
  const rows = read('docs', 'cuda.md').matchAll(/^\| (\d bits `[^|]+) \| (\d bits `[^|]+) \| (.+) \|$/gm);
  expect([...rows].map(([, k, v, schemes]) => [k, v, schemes!.endsWith(', outliers too')])).toEqual(
    [...routes].map(([, k, kBits, v, vBits, outliers]) => [
      ...[cell(k!, kBits!), cell(v!, vBits!)],
      outliers !== undefined,
    ]),
  );
});

test('docs/errors.md has every code once', () => {
  const text = readFileSync(join(__dirname, '..', '..', 'docs', 'errors.md'), 'utf8');
  const rows = [...text.matchAll(/^\| `(ERR_\w+)` \| .+ \| .+ \|$/gm)].map(([, code]) => code);
  expect(rows.sort()).toEqual([...innerkv.errorCodes].sort());
});
