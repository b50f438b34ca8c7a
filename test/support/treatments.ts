/** Schemes by what they do to keys and values before rounding; one HeadScheme per KV head. */
import { type HeadScheme } from '../reference/cache';
import { type Bits, type Mode, type TensorSpec } from '../reference/types';
import { exampleBasis, RATIOS, ropeOf } from './heads';
import { Random } from './random';

export interface Treatment {
  readonly name: string;
  readonly heads: (headDim: number) => readonly HeadScheme[];
}

const perToken = (bits: Bits): TensorSpec => ({ bits, group: 'token', mode: 'midRise' });
const byChannels = (bits: Bits, mode: Mode, size: 32 | 64 = 32): TensorSpec => ({
  bits,
  group: `channels${size}`,
  mode,
});

const bases = new Map<string, ReturnType<typeof exampleBasis>>();

/** Bases are dear: each is made once. */
function basisOf(headDim: number, layout: 'adjacent' | 'half', seed: number) {
  const rope = ropeOf(headDim - 16, layout);
  const name = `${headDim} ${layout} ${seed}`;
  const basis = bases.get(name) ?? exampleBasis(headDim, rope, seed);
  bases.set(name, basis);
  return { rope, basis };
}

/** Block-relative keys in a calibrated basis, rounded with feedback; two KV heads with bases of their own up to 80 channels. */
export function calibratedHeads(
  keyBits: 2 | 3 | 4 | 8,
  valueBits: 1 | 2 | 3 | 4 | 8 | 16,
  layout: 'adjacent' | 'half',
  options: Partial<HeadScheme> = {},
): (headDim: number) => readonly HeadScheme[] {
  return (headDim) =>
    (headDim <= 80 ? [1, 2] : [1]).map((seed) => {
      const { rope, basis } = basisOf(headDim, layout, seed);
      const { mu, lam, order, W, F, d } = basis;
      const rounding = { clipRatios: RATIOS, unbiased: true };
      const value: Partial<HeadScheme> =
        valueBits === 16
          ? {}
          : { valueHadamard: true, valueRounding: valueBits === 1 ? { unbiased: true } : rounding };
      return {
        headDim,
        key: perToken(keyBits),
        value: perToken(valueBits),
        sink: 4,
        recent: 12,
        rotation: { blockTokens: 128, rope },
        mean: mu,
        lam,
        keyHadamard: true,
        feedback: { order, W, F, d },
        keyRounding: rounding,
        ...value,
        ...options,
      };
    });
}

/** Two KV heads with equal rules. */
function twice(scheme: Omit<HeadScheme, 'headDim'>): (headDim: number) => readonly HeadScheme[] {
  return (headDim) => [
    { ...scheme, headDim },
    { ...scheme, headDim },
  ];
}

/** A given mean and normalisation without Hadamard and feedback, different in every head. */
function given(scheme: Omit<HeadScheme, 'headDim'>, parts: { mean?: boolean; lam?: boolean }) {
  return (headDim: number): readonly HeadScheme[] =>
    [1, 2].map((seed) => {
      const random = new Random(seed);
      const mean = random.gaussians(headDim);
      const lam = random.gaussians(headDim).map((x) => Math.fround(Math.exp(x)));
      return { ...scheme, headDim, ...(parts.mean && { mean }), ...(parts.lam && { lam }) };
    });
}

/** Rotation by blocks and nothing else: even signs of zeros must come through. */
function onlyRotated(key: TensorSpec, layout: 'adjacent' | 'half', blockTokens: number) {
  const value = byChannels(4, 'signedMax');
  return (headDim: number): readonly HeadScheme[] => [
    {
      headDim,
      key,
      value,
      sink: 5,
      recent: 0,
      rotation: { blockTokens, rope: ropeOf(headDim - 32, layout) },
    },
  ];
}

export const INNERQ_WINDOWS = { sink: 4, recent: 12, statTokens: 24 } as const;
const tokens32 = (bits: Bits, mode: Mode): TensorSpec => ({ bits, group: 'tokens32', mode });

/** InnerQ: keys by channels, normalised by the sequence's own extremes; values by 32 tokens. */
export function innerq(key: TensorSpec, value: TensorSpec): (headDim: number) => readonly HeadScheme[] {
  return twice({ key, value, ...INNERQ_WINDOWS, lam: 'sequence' });
}

export function rotatedHeads(
  keyBits: Bits,
  valueBits: Bits,
  options: Partial<HeadScheme> = {},
): (headDim: number) => readonly HeadScheme[] {
  return twice({
    key: perToken(keyBits),
    value: perToken(valueBits),
    sink: 4,
    recent: 12,
    mean: 'sequence',
    statTokens: 24,
    keyHadamard: true,
    valueHadamard: true,
    keyRounding: { clipRatios: RATIOS },
    valueRounding: { clipRatios: RATIOS, unbiased: true },
    ...options,
  });
}

const keeping = (spec: TensorSpec, outliers: number): TensorSpec => ({ ...spec, outliers });

/** Outliers behind everything that comes before rounding. */
const outlierTreatments: readonly Treatment[] = [
  {
    name: 'rotated 2/2 with outliers',
    heads: rotatedHeads(2, 2, { key: keeping(perToken(2), 3), value: keeping(perToken(2), 1) }),
  },
  {
    name: 'normalised keys by channels, asymmetric values, with outliers',
    heads: given(
      {
        key: keeping(byChannels(3, 'hybrid', 64), 8),
        value: keeping(byChannels(4, 'asymmetric'), 2),
        sink: 2,
        recent: 0,
      },
      { mean: true, lam: true },
    ),
  },
  {
    name: 'calibrated without feedback, with outliers',
    heads: (headDim) =>
      calibratedHeads(4, 3, 'half', {
        key: keeping(perToken(4), 1),
        value: keeping(perToken(3), 4),
        keyRounding: { clipRatios: RATIOS, unbiased: true },
      })(headDim).map(({ feedback: _, ...head }) => head),
  },
];

/** Treatments whose stored bits are compared. */
export const bitTreatments: readonly Treatment[] = [
  { name: 'calibrated 2/2, half', heads: calibratedHeads(2, 2, 'half') },
  { name: 'calibrated 3/1, adjacent', heads: calibratedHeads(3, 1, 'adjacent') },
  {
    name: 'calibrated 4/3, half, one ratio',
    heads: calibratedHeads(4, 3, 'half', { keyRounding: { clipRatios: [1] } }),
  },
  {
    name: 'calibrated 8/16, adjacent, no Hadamard, ascending order, whole rotation',
    heads: (headDim) =>
      calibratedHeads(8, 16, 'adjacent', { keyHadamard: false, recent: 0 })(headDim).map((head) => ({
        ...head,
        rotation: { blockTokens: 256, rope: ropeOf(headDim, 'adjacent') },
        feedback: { W: head.feedback!.W, F: head.feedback!.F, d: head.feedback!.d },
      })),
  },
  {
    name: 'rotation by 128 tokens, half, signedMax',
    heads: onlyRotated(byChannels(3, 'signedMax'), 'half', 128),
  },
  {
    name: 'rotation by 128 tokens, adjacent, signedMax',
    heads: onlyRotated(byChannels(4, 'signedMax'), 'adjacent', 128),
  },
  {
    name: 'rotation by 384 tokens, half, hybrid',
    heads: onlyRotated(byChannels(2, 'hybrid', 64), 'half', 384),
  },
  {
    name: 'given mean',
    heads: given(
      { key: byChannels(3, 'asymmetric'), value: perToken(2), sink: 0, recent: 7 },
      { mean: true },
    ),
  },
  {
    name: 'given lambda and Hadamard',
    heads: given(
      { key: perToken(3), value: perToken(4), sink: 0, recent: 0, keyHadamard: true, valueHadamard: true },
      { lam: true },
    ),
  },
  {
    name: 'given mean and lambda, values rotated in blocks',
    heads: given(
      { key: byChannels(4, 'hybrid'), value: tokens32(3, 'hybrid'), sink: 9, recent: 1, valueHadamard: true },
      { mean: true, lam: true },
    ),
  },
  { name: 'rotated 4/2', heads: rotatedHeads(4, 2) },
  { name: 'rotated 2/8, unbiased keys', heads: rotatedHeads(2, 8, { keyRounding: { unbiased: true } }) },
  { name: 'rotated 16/3', heads: rotatedHeads(16, 3, { mean: undefined as never, statTokens: 0 }) },
  { name: 'InnerQ 3/2 hybrid', heads: innerq(byChannels(3, 'zeroLevel'), tokens32(2, 'hybrid')) },
  { name: 'InnerQ 2/3 released', heads: innerq(byChannels(2, 'hybrid', 64), tokens32(3, 'hybridReleased')) },
  {
    name: 'mean and lambda of the sequence, statistics within the sink',
    heads: twice({
      key: byChannels(4, 'asymmetric'),
      value: byChannels(2, 'zeroLevel', 64),
      sink: 30,
      recent: 4,
      mean: 'sequence',
      lam: 'sequence',
      statTokens: 11,
    }),
  },
  {
    name: 'statistics that come late: the first flush is large',
    heads: twice({
      key: perToken(4),
      value: tokens32(4, 'zeroLevel'),
      sink: 2,
      recent: 3,
      mean: 'sequence',
      lam: 'sequence',
      statTokens: 120,
    }),
  },
  ...outlierTreatments,
];

const RAW: TensorSpec = { bits: 16, group: 'token', mode: 'midRise' };

/** Every family of schemes, together with every width, grouping and mode of keys and values. */
export const attentionFamilies: readonly Treatment[] = [
  { name: '16/16', heads: twice({ key: RAW, value: RAW, sink: 0, recent: 0 }) },
  { name: 'calibrated 2/2', heads: calibratedHeads(2, 2, 'half', { sink: 0, recent: 0 }) },
  { name: 'calibrated 3/1', heads: calibratedHeads(3, 1, 'adjacent', { sink: 2, recent: 1 }) },
  { name: 'calibrated 4/8, wide windows', heads: calibratedHeads(4, 8, 'half', { sink: 32, recent: 96 }) },
  { name: 'calibrated 8/16', heads: calibratedHeads(8, 16, 'adjacent', { sink: 0, recent: 0 }) },
  { name: 'rotated 4/4', heads: rotatedHeads(4, 4) },
  { name: 'rotated 3/3, no sink', heads: rotatedHeads(3, 3, { sink: 0, recent: 0, statTokens: 1 }) },
  { name: 'InnerQ 3/3', heads: innerq(byChannels(3, 'zeroLevel'), tokens32(3, 'zeroLevel')) },
  { name: 'InnerQ 2/2 hybrid', heads: innerq(byChannels(2, 'hybrid', 64), tokens32(2, 'hybrid')) },
  {
    name: 'InnerQ 4/4 released',
    heads: innerq(byChannels(4, 'hybridReleased'), tokens32(4, 'hybridReleased')),
  },
  {
    name: 'asymmetric 4/2',
    heads: twice({
      key: byChannels(4, 'asymmetric'),
      value: byChannels(2, 'asymmetric'),
      sink: 1,
      recent: 0,
    }),
  },
  {
    name: 'signedMax 4/4',
    heads: twice({
      key: byChannels(4, 'signedMax'),
      value: byChannels(4, 'signedMax', 64),
      sink: 0,
      recent: 31,
    }),
  },
  {
    name: 'hybrid 3/3 per token, rotated by blocks',
    heads: (headDim) =>
      twice({
        key: { bits: 3, group: 'token', mode: 'hybrid' },
        value: byChannels(3, 'hybrid', 64),
        sink: 3,
        recent: 2,
        rotation: { blockTokens: 256, rope: ropeOf(headDim, 'adjacent') },
      })(headDim),
  },
  {
    name: '16 and asymmetric tokens32',
    heads: twice({ key: RAW, value: tokens32(2, 'asymmetric'), sink: 0, recent: 0 }),
  },
  {
    name: 'asymmetric by token and 16',
    heads: twice({ key: { bits: 2, group: 'token', mode: 'asymmetric' }, value: RAW, sink: 0, recent: 5 }),
  },
  {
    name: '8 and 1 bits',
    heads: twice({ key: byChannels(8, 'midRise', 64), value: tokens32(1, 'asymmetric'), sink: 0, recent: 0 }),
  },
  {
    name: 'mean and lambda, 8/8',
    heads: given(
      {
        key: byChannels(8, 'zeroLevel'),
        value: { bits: 8, group: 'token', mode: 'asymmetric' },
        sink: 2,
        recent: 2,
      },
      { mean: true, lam: true },
    ),
  },
  ...outlierTreatments,
];
