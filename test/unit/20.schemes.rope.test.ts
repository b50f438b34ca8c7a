import { ropeFrequencies } from '../../lib/schemes/rope';
import { type RopeOptions } from '../../lib/schemes/types';
import { failure } from '../support/failures';

const plain: RopeOptions = { base: 10000, layout: 'half' };
const llama3: RopeOptions = {
  base: 500000,
  layout: 'half',
  scaling: { type: 'llama3', factor: 8, lowFreqFactor: 1, highFreqFactor: 4, originalContext: 8192 },
};

test('frequencies fall geometrically from 1', () => {
  const theta = ropeFrequencies(plain, 128);
  expect(theta).toHaveLength(64);
  expect(theta[0]).toBe(1);
  expect(theta[32]).toBeCloseTo(0.01, 15);
  expect(theta[63]).toBeCloseTo(10000 ** (-126 / 128), 15);
});

test('partial rotation counts in rotary dimensions', () => {
  const theta = ropeFrequencies({ ...plain, rotaryDims: 32 }, 80);
  expect(theta).toHaveLength(16);
  expect(theta[8]).toBeCloseTo(0.01, 15);
});

test('linear scaling stretches every wave', () => {
  const scaled = ropeFrequencies({ ...plain, scaling: { type: 'linear', factor: 4 } }, 64);
  expect([...scaled]).toEqual([...ropeFrequencies(plain, 64)].map((theta) => theta / 4));
});

test('llama3 scaling keeps fast pairs, stretches slow ones and is continuous between', () => {
  const base = ropeFrequencies({ base: 500000, layout: 'half' }, 128);
  const scaled = ropeFrequencies(llama3, 128);
  // The rule as Llama 3.1 publishes it, by wavelength.
  base.forEach((theta, i) => {
    const wavelength = (2 * Math.PI) / theta;
    const smooth = (8192 / wavelength - 1) / (4 - 1);
    const expected =
      wavelength < 8192 / 4
        ? theta
        : wavelength > 8192
          ? theta / 8
          : (1 - smooth) * (theta / 8) + smooth * theta;
    expect(scaled[i]! / expected).toBeCloseTo(1, 12);
  });
  expect(scaled[0]).toBe(1);
  expect(scaled[63]).toBe(base[63]! / 8);
});

test('given frequencies win over the base, and are copied', () => {
  const theta = Float64Array.of(0.5, 0.25);
  const taken = ropeFrequencies({ ...plain, theta }, 64);
  expect(taken).toEqual(theta);
  expect(taken).not.toBe(theta);
});

test.each<[string, unknown, string]>([
  ['no base', { layout: 'half' }, 'rope.base'],
  ['negative base', { ...plain, base: -1 }, 'rope.base'],
  ['odd dimensions', { ...plain, rotaryDims: 7 }, 'even number'],
  ['more dimensions than channels', { ...plain, rotaryDims: 66 }, 'headDim (64)'],
  ['unknown layout', { ...plain, layout: 'interleaved' }, '"interleaved"'],
  ['unknown scaling', { ...plain, scaling: { type: 'yarn', factor: 2 } }, '"yarn"'],
  ['factor 0', { ...plain, scaling: { type: 'linear', factor: 0 } }, 'rope.scaling.factor'],
  [
    'thresholds that meet',
    { ...llama3, scaling: { ...llama3.scaling, highFreqFactor: 1 } },
    'highFreqFactor',
  ],
  ['too few frequencies', { ...plain, rotaryDims: 64, theta: Float64Array.of(1) }, '32 frequencies'],
  ['an infinite frequency', { ...plain, theta: Float64Array.of(Infinity) }, 'finite'],
])('%s is an invalid argument', (_, rope, message) => {
  expect(() => ropeFrequencies(rope as RopeOptions, 64)).toThrow(
    failure('ERR_INNERKV_INVALID_ARGUMENT', message),
  );
});
