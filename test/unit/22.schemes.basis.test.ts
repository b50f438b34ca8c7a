import { PositionAverage, deriveBasis64, meanPhase, rotationOf, roundBasis } from '../../lib/schemes/basis';
import { type RopeOptions } from '../../lib/schemes/types';
import * as reference from '../reference/basis';
import { multiply, transpose } from '../reference/linear';
import { ropeFrequencies } from '../reference/transform';
import { plantedTokens, Random } from '../support/random';
import { failure } from '../support/failures';

/** Largest difference as a share of the largest number. */
function difference(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  const scale = Math.max(...Array.from(expected, Math.abs));
  return Math.max(...Array.from(expected, (value, i) => Math.abs(actual[i]! - value))) / scale;
}

const shapes = (['adjacent', 'half'] as const).flatMap((layout) =>
  [
    [64, 64],
    [80, 32],
    [96, 96],
    [128, 64],
  ].map(([headDim, dims]) => [layout, headDim!, dims!] as const),
);

function example(layout: 'adjacent' | 'half', headDim: number, rotaryDims: number) {
  const random = new Random(headDim);
  const keys = plantedTokens(random, 3 * headDim, headDim);
  const queries = plantedTokens(random, 3 * headDim, headDim);
  const rope: RopeOptions = { base: 10000, layout, rotaryDims };
  const truth = { layout, rotaryDims, theta: ropeFrequencies(rotaryDims, 10000) };
  return { moments: reference.sampleMoments(keys, queries), rope, truth };
}

test('the mean phase is a geometric sum, and exact where terms are equal', () => {
  for (const [phi, count] of [
    [0.3, 1],
    [1e-9, 8192],
    [3.1, 77],
    [2, 128],
  ] as const) {
    let [re, im] = [0, 0];
    for (let u = 0; u < count; u++) {
      re += Math.cos(u * phi) / count;
      im += Math.sin(u * phi) / count;
    }
    expect(meanPhase(phi, count)[0]).toBeCloseTo(re, 12);
    expect(meanPhase(phi, count)[1]).toBeCloseTo(im, 12);
  }
  expect(meanPhase(0, 8192)).toEqual([1, 0]);
});

test.each(shapes)(
  'averages over positions equal brute force: %s, head of %i, %i rotate',
  (layout, n, dims) => {
    const { moments, rope, truth } = example(layout, n, dims);
    const rotation = rotationOf(rope, n);
    for (const count of n === 64 ? [1, 2, 128] : [17]) {
      const average = new PositionAverage(rotation, n, count);
      const brute = reference.bruteForceAverages(moments.keyMean, moments.keySecond, truth, count);
      expect(difference(average.mean(moments.keyMean), brute.mean)).toBeLessThan(1e-11);
      expect(difference(average.second(moments.keySecond), brute.second)).toBeLessThan(1e-11);
    }
  },
);

test.each(shapes)('the basis equals the reference: %s, head of %i, %i rotate', (layout, n, dims) => {
  const { moments, rope, truth } = example(layout, n, dims);
  const expected = reference.deriveBasis(moments, { rope: truth, blockTokens: 128, contextTokens: 8192 });
  const rotation = rotationOf(rope, n);
  const basis = deriveBasis64(
    { keyMean: moments.keyMean, keyMoment: moments.keySecond, queryMoment: moments.querySecond },
    { keys: new PositionAverage(rotation, n, 128), queries: new PositionAverage(rotation, n, 8192) },
  );
  expect(difference(basis.mean, expected.mu)).toBeLessThan(1e-11);
  expect(difference(basis.lam, expected.lam)).toBeLessThan(1e-11);
  expect(difference(basis.metric, expected.W)).toBeLessThan(1e-11);
  expect(difference(basis.pivot, expected.d)).toBeLessThan(1e-9);
  expect(difference(basis.feedback, expected.F)).toBeLessThan(1e-9);

  // The identity behind error feedback: with U = diag(1/d) (I + F), Uᵀ U W is the identity.
  const U = basis.feedback.map((value, i) => {
    const [row, column] = [Math.floor(i / n), i % n];
    return (row === column ? 1 : value) / basis.pivot[row]!;
  });
  const product = multiply(multiply(transpose(U, n), U, n), basis.metric, n);
  expect(
    difference(
      product,
      Float64Array.from(U, (_, i) => Number(i % (n + 1) === 0)),
    ),
  ).toBeLessThan(1e-8);

  const rounded = roundBasis(basis);
  expect(rounded.metric).toEqual(Float32Array.from(basis.metric));
  expect(rounded.feedback!.every((value, i) => i % n > Math.floor(i / n) || value === 0)).toBe(true);
});

describe('moments that give no basis are refused', () => {
  const n = 64;
  const { moments, rope } = example('half', n, n);
  const rotation = rotationOf(rope, n);
  const average = new PositionAverage(rotation, n, 128);
  const derive = (keyScale: number, queryScale: number) =>
    roundBasis(
      deriveBasis64(
        {
          keyMean: moments.keyMean.map((value) => value * keyScale),
          keyMoment: moments.keySecond.map((value) => value * keyScale ** 2),
          queryMoment: moments.querySecond.map((value) => value * queryScale),
        },
        { keys: average, queries: average },
      ),
    );

  test.each([
    ['keys that are all zero', 0, 1, 'no variance'],
    ['queries that are all zero', 1, 0, 'positive definite'],
    ['a query moment of the wrong sign', 1, -1, 'positive definite'],
    ['numbers beyond float32', 1e120, 1, 'float32'],
  ])('%s', (_, keyScale, queryScale, message) => {
    expect(() => derive(keyScale, queryScale)).toThrow(failure('ERR_INNERKV_INVALID_ARGUMENT', message));
  });
});
