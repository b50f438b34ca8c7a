/** Example schemes and filled heads of the reference cache model. */
import { dot } from '../reference/attention';
import { deriveBasis, roundBasis, sampleMoments, type Basis32 } from '../reference/basis';
import { ReferenceHead, type HeadScheme } from '../reference/cache';
import { ropeFrequencies, type Rope } from '../reference/transform';
import { plantedTokens, Random } from './random';

export const RATIOS = [1, 0.92, 0.85, 0.78, 0.7, 0.62];

export function ropeOf(rotaryDims: number, layout: 'adjacent' | 'half'): Rope {
  return { theta: ropeFrequencies(rotaryDims, 10000), layout, rotaryDims };
}

/** A calibrated basis of correlated gaussian keys and queries. */
export function exampleBasis(dim: number, rope: Rope, seed = 1): Basis32 {
  const random = new Random(seed);
  const mix = random.gaussians(dim * dim, dim ** -0.5);
  const correlated = () => {
    const source = random.gaussians(dim);
    return Float64Array.from(
      { length: dim },
      (_, c) => source[c]! + 2 * dot(mix.subarray(c * dim, c * dim + dim), source),
    );
  };
  const queries = Array.from({ length: 3 * dim }, correlated);
  const moments = sampleMoments(plantedTokens(random, 3 * dim, dim), queries);
  return roundBasis(deriveBasis(moments, { rope, blockTokens: 128, contextTokens: 2048 }));
}

export const INNERQ: HeadScheme = {
  headDim: 64,
  key: { bits: 3, group: 'channels32', mode: 'hybrid' },
  value: { bits: 2, group: 'tokens32', mode: 'hybrid' },
  sink: 4,
  recent: 20,
  lam: 'sequence',
  statTokens: 40,
};

export const ROTATED: HeadScheme = {
  headDim: 64,
  key: { bits: 4, group: 'token', mode: 'midRise' },
  value: { bits: 2, group: 'token', mode: 'midRise' },
  sink: 4,
  recent: 12,
  mean: 'sequence',
  statTokens: 24,
  keyHadamard: true,
  valueHadamard: true,
  keyRounding: { unbiased: true },
  valueRounding: { clipRatios: RATIOS, unbiased: true },
};

/** Two bits with block-relative partial RoPE, half whitening and feedback. */
export function calibrated(layout: 'adjacent' | 'half', headDim = 64): HeadScheme {
  const rope = ropeOf(headDim - 16, layout);
  const { mu, lam, order, W, F, d } = exampleBasis(headDim, rope);
  const rounding = { clipRatios: RATIOS, unbiased: true };
  return {
    headDim,
    key: { bits: 2, group: 'token', mode: 'midRise' },
    value: { bits: 2, group: 'token', mode: 'midRise' },
    sink: 4,
    recent: 28,
    rotation: { blockTokens: 128, rope },
    mean: mu,
    lam,
    keyHadamard: true,
    valueHadamard: true,
    feedback: { order, W, F, d },
    keyRounding: rounding,
    valueRounding: rounding,
  };
}

/** A head after `tokens` appends, with what was appended. */
export function filled(scheme: HeadScheme, tokens: number, seed = 11) {
  const random = new Random(seed);
  const keys = plantedTokens(random, tokens, scheme.headDim);
  const values = plantedTokens(random, tokens, scheme.headDim);
  const head = new ReferenceHead(scheme);
  keys.forEach((key, t) => head.append(key, values[t]!));
  return { head, keys, values, random };
}
