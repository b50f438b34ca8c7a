/** The page format is what it was: reference and native code still make the very bytes of test/golden. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { binding, supportedSpecs } from '../../lib/binding';
import {
  goldenBytes,
  goldenCases,
  goldenEntry,
  goldenInput,
  goldenSets,
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
const manifestOf = (set: string) =>
  JSON.parse(readFileSync(join(folder, `${set}.json`), 'utf8')) as GoldenManifest;
const manifest = manifestOf(`v${version}`);

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

test('there are golden pages of outliers with every group of channels and mode, up to eight of a token', () => {
  const cases = goldenSets[`v${version}.outliers`]!;
  for (const tensor of ['key', 'value'] as const) {
    const specs = cases.map(({ scheme }) => scheme[tensor]).filter(({ outliers = 0 }) => outliers > 0);
    expect(new Set(specs.map(({ group, mode }) => `${group} ${mode}`)).size).toBe(18);
    expect(new Set(specs.map(({ outliers }) => outliers)).size).toBe(8);
  }
  expect(new Set(cases.map(({ scheme }) => scheme.headDim)).size).toBe(5);
});

const sets = Object.entries(goldenSets).map(([set, cases]) => {
  const { formatVersion, pages } = manifestOf(set);
  const golden = cases.map((one, i) => ({ one, input: goldenInput(one), expected: pages[i] }));
  return { set, golden, formatVersion, pages };
});

test('the kept bytes are those of the manifests', () => {
  const kept = sets.flatMap(({ pages }) => pages.filter(({ file }) => file !== undefined));
  expect(kept).toHaveLength(10);
  for (const { file, page } of kept) expect(sha256(readFileSync(join(folder, file!)))).toBe(page);
});

test.each(sets)('$set: the reference still makes these pages', ({ golden, formatVersion, pages }) => {
  const made = golden.map(({ one, input }) =>
    goldenEntry(one, input, goldenBytes(referencePage(one, input))),
  );
  expect([made, formatVersion]).toEqual([pages, version]);
});

test.each(isas())('%s still makes these pages', (isa) => {
  const wrong = sets
    .flatMap(({ golden }) => golden)
    .filter(({ one, input, expected }) => {
      using cache = createCache(backendOf(isa), { heads: [[one.scheme]] });
      const sequence = cache.sequence();
      sequence.appendSync(0, interleave([input.keys]), interleave([input.values]));
      const { bytes, keyZeros, valueZeros } = sequence.pageBytes(0, 0, 0)!;
      return sha256(goldenBytes({ bytes, kZeros: keyZeros, vZeros: valueZeros })) !== expected?.page;
    });
  expect(wrong.map(({ one }) => one.name)).toEqual([]);
});
