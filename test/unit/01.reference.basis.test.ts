/** The reference tests itself: linear algebra, the calibrated basis, rounding with error feedback. */
import {
  averageMean,
  averageSecond,
  bruteForceAverages,
  deriveBasis,
  sampleMoments,
} from '../reference/basis';
import { quantiseKeyFeedback } from '../reference/feedback';
import { identity, invertPositive, multiply, quadraticForm } from '../reference/linear';
import { transpose, upperFactorOfInverse } from '../reference/linear';
import { decodeGroup, quantiseGroup } from '../reference/quantise';
import { applyRope, hadamard64 } from '../reference/transform';
import { type TensorSpec } from '../reference/types';
import { exampleBasis, RATIOS, ropeOf } from '../support/heads';
import { plantedTokens, Random } from '../support/random';

function largestDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  return Math.max(...Array.from(a, (value, i) => Math.abs(value - b[i]!)));
}

describe('linear algebra and the basis', () => {
  test('Cholesky, inverse and the upper factor of the inverse', () => {
    const n = 12;
    const root = Float64Array.from(new Random(1).gaussians(n * n));
    const A = multiply(root, transpose(root, n), n).map((value, i) => value + identity(n)[i]!);
    expect(largestDifference(multiply(A, invertPositive(A, n), n), identity(n))).toBeLessThan(1e-11);
    const U = upperFactorOfInverse(A, n);
    expect(largestDifference(multiply(transpose(U, n), U, n), invertPositive(A, n))).toBeLessThan(1e-12);
    expect(U.every((value, i) => i % n >= Math.floor(i / n) || value === 0)).toBe(true);
    expect(() => upperFactorOfInverse(new Float64Array(n * n), n)).toThrow('positive definite');
  });

  test.each([
    ['adjacent', 16],
    ['half', 16],
    ['adjacent', 12],
    ['half', 10],
  ] as const)(
    'position averages in closed form equal the sum over positions: %s, %i rotary channels',
    (layout, dims) => {
      const random = new Random(2);
      const rope = ropeOf(dims, layout);
      const moments = sampleMoments(plantedTokens(random, 40, 16), plantedTokens(random, 40, 16));
      for (const count of [1, 2, 128, 1000]) {
        const brute = bruteForceAverages(moments.keyMean, moments.keySecond, rope, count);
        expect(largestDifference(averageMean(moments.keyMean, rope, count), brute.mean)).toBeLessThan(1e-10);
        expect(
          largestDifference(averageSecond(moments.keySecond, 16, rope, count), brute.second),
        ).toBeLessThan(1e-9);
      }
    },
  );

  test('the average is what rotated samples show', () => {
    const random = new Random(3);
    const rope = ropeOf(8, 'half');
    const keys = plantedTokens(random, 30, 8);
    const rotated = keys.flatMap((key) => Array.from({ length: 16 }, (_, u) => applyRope(key, u, rope)));
    const [before, after] = [sampleMoments(keys, keys), sampleMoments(rotated, rotated)];
    expect(largestDifference(averageMean(before.keyMean, rope, 16), after.keyMean)).toBeLessThan(1e-10);
    expect(largestDifference(averageSecond(before.keySecond, 8, rope, 16), after.keySecond)).toBeLessThan(
      1e-9,
    );
  });

  test('W is the moment of transformed queries', () => {
    const random = new Random(4);
    const rope = ropeOf(16, 'half');
    const queries = plantedTokens(random, 25, 16);
    const options = { rope, blockTokens: 8, contextTokens: 8 };
    const { lam, order, W, d, F, U } = deriveBasis(
      sampleMoments(plantedTokens(random, 40, 16), queries),
      options,
    );
    const met = queries.flatMap((q) =>
      Array.from({ length: 8 }, (_, u) =>
        hadamard64(applyRope(q, u, rope).map((value, c) => value * lam[c]!)),
      ),
    );
    const M = sampleMoments(met, met).querySecond;
    const ridge = (0.01 * identity(16).reduce((sum, one, i) => sum + one * M[i]!, 0)) / 16;
    expect(
      largestDifference(
        W,
        M.map((_, i) => M[order[Math.floor(i / 16)]! * 16 + order[i % 16]!]! + ridge * identity(16)[i]!),
      ),
    ).toBeLessThan(1e-9);
    for (let c = 0; c < 16; c++) {
      expect(d[c]).toBe(1 / U[c * 16 + c]!);
      if (c < 15) expect(W[c * 17]).toBeGreaterThanOrEqual(W[(c + 1) * 17]!);
      expect(F[c * 16 + c]).toBe(0);
      if (c < 15) expect(F[c * 16 + c + 1]).toBeCloseTo(U[c * 16 + c + 1]! / U[c * 16 + c]!, 12);
    }
  });
});

describe('rounding with error feedback', () => {
  const dim = 64;
  const basis = exampleBasis(dim, ropeOf(dim, 'half'));
  const { order, F, d } = basis;
  /** W with rows and columns in the order of channels. */
  const W = new Float64Array(dim * dim);
  order.forEach((a, i) => order.forEach((b, j) => (W[a * dim + b] = basis.W[i * dim + j]!)));
  const matrices = { order, W: basis.W, F, d };
  const spec: TensorSpec = { bits: 2, group: 'token', mode: 'midRise' };

  test('the running loss equals the quadratic form of the final error', () => {
    const random = new Random(5);
    for (const bits of [1, 2, 3, 4, 8] as const) {
      const x = random.gaussians(dim);
      const { loss, decoded } = quantiseKeyFeedback(x, bits, { ...matrices, clipRatios: RATIOS });
      const exact = quadraticForm(
        W,
        x.map((value, c) => value - decoded[c]!),
      );
      expect(Math.abs(loss / exact - 1)).toBeLessThan(1e-3);
    }
  });

  test('without correlations feedback is plain rounding', () => {
    const x = new Random(6).gaussians(dim);
    const plain = {
      W: Float32Array.from(identity(dim)),
      F: new Float32Array(dim * dim),
      d: new Float32Array(dim).fill(1),
    };
    for (const bits of [1, 2, 3, 4, 8] as const) {
      const { codes, scaleBits } = quantiseKeyFeedback(x, bits, plain);
      expect({ codes, scaleBits, zeroBits: undefined }).toEqual(quantiseGroup(x, { ...spec, bits }));
    }
  });

  test('on average it beats plain rounding in the W metric, and an unbiased scale is unbiased', () => {
    const random = new Random(7);
    const metric = (x: Float32Array, group: { codes: Uint8Array; scaleBits: number }) =>
      quadraticForm(
        W,
        decodeGroup(group.codes, group.scaleBits, undefined, spec).map((value, c) => value - x[c]!),
      );
    let [plain, fed] = [0, 0];
    for (let trial = 0; trial < 40; trial++) {
      const x = random.gaussians(dim);
      plain += metric(x, quantiseGroup(x, spec, { clipRatios: RATIOS }));
      fed += metric(x, quantiseKeyFeedback(x, 2, { ...matrices, clipRatios: RATIOS }));
      const { codes, scaleBits } = quantiseKeyFeedback(x, 2, {
        ...matrices,
        clipRatios: RATIOS,
        unbiased: true,
      });
      const decoded = decodeGroup(codes, scaleBits, undefined, spec);
      const cross =
        quadraticForm(
          W,
          x.map((value, c) => value + decoded[c]!),
        ) - quadraticForm(W, decoded);
      const own = quadraticForm(W, x);
      expect(Math.abs((cross - own) / 2 / own - 1)).toBeLessThan(2e-3);
    }
    expect(fed).toBeLessThan(0.8 * plain);
  });

  test('a key of zeros has scale 0 and code n/2', () => {
    const { codes, scaleBits } = quantiseKeyFeedback(new Float32Array(dim), 2, {
      ...matrices,
      clipRatios: RATIOS,
      unbiased: true,
    });
    expect([codes.every((code) => code === 2), scaleBits]).toEqual([true, 0]);
  });
});
