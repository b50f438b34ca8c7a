/** What the documents say: their code compiles under the project's rules and runs, and their tables are whole. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import * as innerkv from '../../lib';
import { programOf, runProgram, typeErrors } from '../support/documents';

const pages = ['README.md', 'docs/api.md'];
const programs = new Map(pages.map((page) => [page, programOf(page)]));

test('the examples compile', () => {
  expect([...programs.values()].every((text) => text.includes('KvCache.create'))).toBe(true);
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
    '256',
  ]);
});

test('docs/errors.md has every code once', () => {
  const text = readFileSync(join(__dirname, '..', '..', 'docs', 'errors.md'), 'utf8');
  const rows = [...text.matchAll(/^\| `(ERR_\w+)` \| .+ \| .+ \|$/gm)].map(([, code]) => code);
  expect(rows.sort()).toEqual([...innerkv.errorCodes].sort());
});
