/** `innerkv inspect` as a user runs it, on a model written here. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { UsageError, helpOf, parseOptions } from '../../lib/cli/command';
import { doctor } from '../../lib/cli/doctor';
import { inspect } from '../../lib/cli/inspect';
import { openModel } from '../../lib/model';
import { innerkv } from '../support/command';
import { tinyGguf, tinyMetadata, tinyTensors, tinyTokens, writeGguf } from '../support/gguf';

const folder = mkdtempSync(join(tmpdir(), 'innerkv-'));
const model = join(folder, 'tiny.gguf');
beforeAll(() => writeFileSync(model, tinyGguf()));
afterAll(() => rmSync(folder, { recursive: true }));

test('--json: configuration, weights by stored type, tokenizer', () => {
  const { status, stdout, stderr } = innerkv(['inspect', model, '--json']);
  expect([status, stderr]).toEqual([0, '']);
  const embedding = tinyTokens.length * 32;
  expect(JSON.parse(stdout)).toMatchObject({
    ...{ name: 'tiny', format: 'GGUF', path: model, fingerprint: expect.stringMatching(/^[0-9a-f]{64}$/) },
    config: { layers: 2, queryHeads: 2, kvHeads: 1, headDim: 16, rope: { base: 50000, layout: 'adjacent' } },
    parameters: embedding + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32) + 32,
    stored: expect.arrayContaining([
      { type: 'F16', tensors: 2, parameters: 4096, bytes: 8192 },
      { type: 'F32', tensors: 5, parameters: 160, bytes: 640 },
      { type: 'Q4_0', tensors: 2, parameters: 1024, bytes: 576 },
    ]),
    tokenizer: { kind: 'byte-level BPE', tokens: tinyTokens.length, bos: 1, addsBos: false },
    chatTemplate: true,
  });
});

test('for people: one screen', () => {
  const { status, stdout } = innerkv(['inspect', model]);
  expect(status).toBe(0);
  for (const text of [
    'llama',
    '2 query, 1 key-value, of 16 channels',
    'byte-level BPE',
    'Q8_0',
    '8.50',
    'tied head',
  ])
    expect(stdout).toContain(text);
});

test('without a tokenizer it says so, and takes the one that is given', () => {
  const bare = join(folder, 'bare.gguf');
  writeFileSync(bare, writeGguf({ metadata: tinyMetadata, tensors: tinyTensors() }));
  expect(JSON.parse(innerkv(['inspect', bare, '--json']).stdout)).toMatchObject({
    tokenizer: { problem: { code: 'ERR_INNERKV_UNSUPPORTED' } },
    chatTemplate: false,
  });
  const given = openModel(bare, { tokenizer: model }); // the same path as --tokenizer, without another process
  expect(given.tokenizer.size).toBe(tinyTokens.length);
});

test('a broken file fails', () => {
  const broken = join(folder, 'broken.gguf');
  writeFileSync(broken, tinyGguf().subarray(0, 5000));
  expect(innerkv(['inspect', broken])).toMatchObject({
    status: 1,
    stdout: '',
    stderr: expect.stringContaining('ERR_INNERKV_CORRUPT'),
  });
});

test('the model must be named, once; other commands take no operand', () => {
  expect(parseOptions(inspect, ['m', '--json'])).toMatchObject({ MODEL: 'm', json: true });
  for (const args of [[], ['a', 'b'], [''], ['--nothing', 'a']])
    expect(() => parseOptions(inspect, args)).toThrow(UsageError);
  expect(parseOptions(inspect, ['--help'])).toMatchObject({ help: true });
  expect(() => parseOptions(doctor, ['m'])).toThrow(UsageError);
  expect(helpOf(inspect, 'innerkv')).toContain('innerkv inspect MODEL');
});
