/** Codes, scales, zero points and windows: native code stores the very bits of the reference, on every instruction set. */
import { type TensorSpec } from '../reference/types';
import { disposeBackends } from '../support/native';
import { storageDifferences } from '../support/storage';
import { keySpecs, specName, specPairs, valueSpecs } from '../support/specs';

afterAll(disposeBackends);

test('the table of formats is whole', () => {
  const count = (specs: TensorSpec[], bits: number) => specs.filter((spec) => spec.bits === bits).length;
  expect([1, 2, 3, 4, 8, 16].map((bits) => count(keySpecs(), bits))).toEqual([0, 18, 18, 18, 18, 1]);
  expect([1, 2, 3, 4, 8, 16].map((bits) => count(valueSpecs(), bits))).toEqual([8, 24, 24, 24, 24, 1]);
  const pairs = specPairs();
  expect(new Set(pairs.map(({ key }) => specName(key))).size).toBe(73);
  expect(new Set(pairs.map(({ value }) => specName(value))).size).toBe(105);
});

const plain = (headDim: number, { key, value }: { key: TensorSpec; value: TensorSpec }) => ({
  headDim,
  key,
  value,
  sink: 3,
  recent: 5,
});

/** Every group of channels and mode of keys and of values, every width, one to eight outliers. */
const outlierPairs = () => {
  const able = (specs: TensorSpec[]) =>
    specs.filter(({ bits, group }) => bits !== 16 && group !== 'tokens32');
  const [keys, values] = [able(keySpecs()), able(valueSpecs())];
  const keep = (spec: TensorSpec, i: number) => ({ ...spec, outliers: 1 + (i % 8) });
  return values.map((value, i) => ({
    key: keep(keys[(5 * i + 2) % keys.length]!, 3 * i),
    value: keep(value, i),
  }));
};

describe('every format with outliers', () => {
  test('is there', () => {
    const pairs = outlierPairs();
    expect([
      new Set(pairs.map(({ key }) => specName({ ...key, outliers: 0 }))).size,
      new Set(pairs.map(({ value }) => specName({ ...value, outliers: 0 }))).size,
    ]).toEqual([72, 78]);
    expect(new Set(pairs.flatMap(({ key, value }) => [key.outliers, value.outliers])).size).toBe(8);
  });
  const cases = [
    ...[0, 1, 2, 3].map((part) => ({ headDim: [64, 80, 64, 128][part]!, part, parts: 4, tokens: 140 })),
    { headDim: 96, part: 3, parts: 7, tokens: 140 },
    { headDim: 256, part: 1, parts: 6, tokens: 60 },
  ];
  test.each(cases)('$headDim channels, part $part of $parts', ({ headDim, part, parts, tokens }) => {
    const chosen = outlierPairs().filter((_, i) => i % parts === part);
    expect(
      chosen.flatMap((pair) => storageDifferences([plain(headDim, pair)], tokens, headDim + part)),
    ).toEqual([]);
  });
});

describe('every format', () => {
  const pairs = specPairs();
  const cases = [
    ...[0, 1, 2].map((part) => ({ headDim: 64, part, parts: 3, tokens: 145 })),
    ...[0, 1, 2].map((part) => ({ headDim: 96, part, parts: 3, tokens: 145 })),
    { headDim: 80, part: 1, parts: 4, tokens: 145 },
    { headDim: 128, part: 2, parts: 5, tokens: 145 },
    { headDim: 256, part: 3, parts: 8, tokens: 75 },
  ];
  test.each(cases)('$headDim channels, part $part of $parts', ({ headDim, part, parts, tokens }) => {
    const chosen = pairs.filter((_, i) => i % parts === part);
    expect(
      chosen.flatMap((pair) => storageDifferences([plain(headDim, pair)], tokens, headDim + part)),
    ).toEqual([]);
  });
});
