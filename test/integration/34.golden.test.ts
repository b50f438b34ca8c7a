/** The page format is what it was: reference and native code still make the very bytes of test/golden. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { binding, supportedSpecs } from '../../lib/binding';
import {
  goldenBytes,
  goldenCases,
  goldenEntry,
  goldenInput,
  keySpecs,
  referencePage,
  sha256,
  valueSpecs,
  type GoldenManifest,
} from '../golden/golden';
import { backendOf, createCache, disposeBackends, interleave, isas } from '../support/native';

afterAll(disposeBackends);

const folder = join(__dirname, '..', 'golden');
const version = binding().formatVersion;
const manifest = JSON.parse(readFileSync(join(folder, `v${version}.json`), 'utf8')) as GoldenManifest;

test('there are golden pages of this version, of every storage of keys and values', () => {
  expect(manifest.formatVersion).toBe(version);
  expect(manifest.pages.map(({ name }) => name)).toEqual(goldenCases.map(({ name }) => name));
  expect(readFileSync(join(folder, '..', '..', 'docs', 'format.md'), 'utf8')).toContain(
    `# The page format, version ${version}\n`,
  );
  const name = ({ bits, group, mode }: (typeof keySpecs)[number]) => `${bits} ${group} ${mode}`;
  const supported = supportedSpecs();
  expect(keySpecs.map(name).sort()).toEqual(
    supported
      .filter((spec) => spec.key)
      .map(name)
      .sort(),
  );
  expect(valueSpecs.map(name).sort()).toEqual(
    supported
      .filter((spec) => spec.value)
      .map(name)
      .sort(),
  );
  const used = (tensor: 'key' | 'value') => new Set(goldenCases.map(({ scheme }) => name(scheme[tensor])));
  expect([used('key').size, used('value').size]).toEqual([keySpecs.length, valueSpecs.length]);
  const whole = goldenCases.filter((one) => one.whole).flatMap(({ scheme }) => [scheme.key, scheme.value]);
  const distinct = (part: 'bits' | 'group' | 'mode') => new Set(whole.map((spec) => spec[part])).size;
  expect([distinct('bits'), distinct('group'), distinct('mode')]).toEqual([6, 4, 6]);
});

test('the kept bytes are those of the manifest', () => {
  const kept = manifest.pages.filter(({ file }) => file !== undefined);
  expect(kept).toHaveLength(8);
  for (const { file, page } of kept) expect(sha256(readFileSync(join(folder, file!)))).toBe(page);
});

const golden = goldenCases.map((one, i) => ({ one, input: goldenInput(one), expected: manifest.pages[i] }));

test('the reference still makes these pages', () => {
  const made = golden.map(({ one, input }) =>
    goldenEntry(one, input, goldenBytes(referencePage(one, input))),
  );
  expect(made).toEqual(manifest.pages);
});

test.each(isas())('%s still makes these pages', (isa) => {
  const wrong = golden.filter(({ one, input, expected }) => {
    using cache = createCache(backendOf(isa), { heads: [[one.scheme]] });
    const sequence = cache.sequence();
    sequence.appendSync(0, interleave([input.keys]), interleave([input.values]));
    const { bytes, keyZeros, valueZeros } = sequence.pageBytes(0, 0, 0)!;
    return sha256(goldenBytes({ bytes, kZeros: keyZeros, vZeros: valueZeros })) !== expected?.page;
  });
  expect(wrong.map(({ one }) => one.name)).toEqual([]);
});
