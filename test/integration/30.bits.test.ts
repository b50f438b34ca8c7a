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

describe('every format', () => {
  const plain = (headDim: number, { key, value }: { key: TensorSpec; value: TensorSpec }) => ({
    headDim,
    key,
    value,
    sink: 3,
    recent: 5,
  });
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
