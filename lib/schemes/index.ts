/** The schemes that ship: how keys and values become few bits. docs/format.md says what each field does. */
import { invalid } from '../errors';
import { basisDeriver } from './basis';
import { flaw, misfit, readMoments, type HeadMoments, type Moments } from './moments';
import { Preset, RAW, checkOptions, clipRatios, integerIn, oneOf } from './preset';
import { type DescribedScheme } from './preset';
import { type Bits, type CacheShape, type HeadBasis, type LayerScheme, type TensorSpec } from './types';

/** Bits of keys and of values; 16 leaves a tensor as it is. */
export interface BitsOptions {
  readonly keyBits: 2 | 3 | 4 | 8 | 16;
  readonly valueBits: 1 | 2 | 3 | 4 | 8 | 16;
}

export type ValueMode = 'symmetric' | 'asymmetric' | 'hybrid';

export interface InnerqOptions {
  /** The published variants: 3-bit keys with 3-bit values, 2-bit values, or 2-bit hybrid values. */
  readonly preset?: 'base' | 'small' | 'hybrid';
  readonly keyBits?: 2 | 3 | 4 | 8 | 16;
  readonly valueBits?: 2 | 3 | 4 | 8 | 16;
  readonly keyMode?: ValueMode;
  readonly valueMode?: ValueMode;
  /** Channels of a key that share a scale. Values share it over 32 tokens. */
  readonly group?: 32 | 64;
  /** Division of key channels by the root of their largest magnitude, which the query undoes. */
  readonly keyNormalisation?: boolean;
  /** Tokens that magnitude is taken from: the sequence's own first ones. */
  readonly statTokens?: number;
  /** `released`: hybrid values as the authors' accuracy code has them, where asymmetric groups have one bit less. */
  readonly compat?: 'released';
  /** The authors' window trajectory, in which the window of recent values shrinks to nothing. For comparison only. */
  readonly releasedWindows?: boolean;
}

export interface RotatedOptions extends BitsOptions {
  /** Tokens the key mean is taken from: the sequence's own first ones. */
  readonly statTokens?: number;
  /** Correct key scales for the shrinking of rounding. Off: without error feedback it costs more than it brings. */
  readonly unbiasedKeys?: boolean;
}

export interface CalibratedOptions extends BitsOptions {
  /** Tokens that share one rotation, a multiple of 128. */
  readonly blockTokens?: number;
  /** Positions over which queries are averaged: the longest context to be served well. */
  readonly context?: number;
}

const KEY_BITS = [2, 3, 4, 8, 16] as const;
const VALUE_BITS = [1, 2, 3, 4, 8, 16] as const;
const MODES = { symmetric: 'zeroLevel', asymmetric: 'asymmetric', hybrid: 'hybrid' } as const;
const INNERQ = {
  base: { keyBits: 3, valueBits: 3, valueMode: 'symmetric' },
  small: { keyBits: 3, valueBits: 2, valueMode: 'symmetric' },
  hybrid: { keyBits: 3, valueBits: 2, valueMode: 'hybrid' },
} as const;

function perToken(bits: Bits): TensorSpec {
  return bits === 16 ? RAW : { bits, group: 'token', mode: 'midRise' };
}

function bitsOf(scheme: string, options: BitsOptions): BitsOptions {
  return {
    keyBits: oneOf(options.keyBits, KEY_BITS, `keyBits of schemes.${scheme}`),
    valueBits: oneOf(options.valueBits, VALUE_BITS, `valueBits of schemes.${scheme}`),
  };
}

/** Hadamard rotation of values, one scale per token. */
function rotatedValues(bits: Bits): Partial<LayerScheme> {
  return bits === 16 ? {} : { hadamardV: true, unbiasedV: true, clipV: clipRatios(bits) };
}

function fp16(): DescribedScheme {
  return new Preset('fp16', '16-bit keys and values: the baseline', RAW, RAW);
}

function q8(): DescribedScheme {
  const spec = { bits: 8, group: 'channels32', mode: 'zeroLevel' } as const;
  return new Preset('q8', '8 bits, a scale per 32 channels, like q8_0 of llama.cpp', spec, spec);
}

function q4_0(): DescribedScheme {
  const spec = { bits: 4, group: 'channels32', mode: 'signedMax' } as const;
  return new Preset('q4_0', '4 bits, a scale per 32 channels, as q4_0 of llama.cpp', spec, spec);
}

function innerq(options: InnerqOptions = {}): DescribedScheme {
  checkOptions('innerq', options, [
    'preset',
    'keyBits',
    'valueBits',
    'keyMode',
    'valueMode',
    'group',
    'keyNormalisation',
    'statTokens',
    'compat',
    'releasedWindows',
  ]);
  const preset = oneOf(options.preset ?? 'base', ['base', 'small', 'hybrid'] as const, 'preset');
  const { keyMode = 'symmetric', valueMode, keyBits, valueBits, ...rest } = { ...INNERQ[preset], ...options };
  const { group = 32, keyNormalisation = true, statTokens = 64, compat, releasedWindows = false } = rest;
  const released = oneOf(compat, [undefined, 'released'] as const, 'compat') === 'released';
  const modes = ['symmetric', 'asymmetric', 'hybrid'] as const;
  const spec = (bits: Bits, mode: ValueMode, shared: TensorSpec['group']): TensorSpec => {
    const stored = MODES[oneOf(mode, modes, 'keyMode and valueMode')];
    if (bits === 16) return RAW;
    return { bits, group: shared, mode: released && stored === 'hybrid' ? 'hybridReleased' : stored };
  };
  const channels = oneOf(group, [32, 64] as const, 'group');
  const key = spec(oneOf(keyBits, KEY_BITS, 'keyBits of schemes.innerq'), keyMode, `channels${channels}`);
  const value = spec(oneOf(valueBits, KEY_BITS, 'valueBits of schemes.innerq'), valueMode, 'tokens32');
  const tokens = integerIn(statTokens, 1, 65536, 'statTokens');
  const normalised = oneOf(keyNormalisation, [true, false], 'keyNormalisation') && keyBits !== 16;

  const changed = Object.keys(options).some(
    (name) => !['preset', 'compat', 'releasedWindows'].includes(name),
  );
  const plain = changed ? `innerq-k${keyBits}v${valueBits}-${valueMode}` : `innerq-${preset}`;
  const name = `${plain}${released ? '-released' : ''}`;
  const summary =
    `InnerQ: ${keyBits}-bit keys by ${channels} channels, ${valueBits}-bit ${valueMode} values by 32 tokens` +
    (released ? ', as released' : '');
  return new Preset(name, summary, key, value, () => ({
    onlineLambda: normalised,
    statTokens: normalised ? tokens : 0,
    releasedWindows: oneOf(releasedWindows, [true, false], 'releasedWindows'),
  }));
}

function rotated(options: RotatedOptions): DescribedScheme {
  checkOptions('rotated', options, ['keyBits', 'valueBits', 'statTokens', 'unbiasedKeys']);
  const { keyBits, valueBits } = bitsOf('rotated', options);
  const statTokens = integerIn(options.statTokens ?? 128, 1, 65536, 'statTokens');
  const unbiasedK = oneOf(options.unbiasedKeys ?? false, [true, false], 'unbiasedKeys');
  const keys = { hadamardK: true, onlineMean: true, statTokens, unbiasedK, clipK: clipRatios(keyBits) };
  return new Preset(
    `rotated-k${keyBits}v${valueBits}`,
    `${keyBits}-bit keys and ${valueBits}-bit values in a Hadamard basis, a scale per token, no calibration`,
    perToken(keyBits),
    perToken(valueBits),
    () => ({ ...(keyBits === 16 ? {} : keys), ...rotatedValues(valueBits) }),
  );
}

/** `source`: a file of calibration moments, or moments in memory. */
function calibrated(source: string | Moments, options: CalibratedOptions): DescribedScheme {
  checkOptions('calibrated', options, ['keyBits', 'valueBits', 'blockTokens', 'context']);
  const { keyBits, valueBits } = bitsOf('calibrated', options);
  const blockTokens = integerIn(options.blockTokens ?? 128, 128, 2 ** 24, 'blockTokens');
  if (blockTokens % 128 !== 0) throw invalid(`blockTokens must be a multiple of 128, not ${blockTokens}.`);
  const context = integerIn(options.context ?? 8192, 1, 2 ** 30, 'context');
  const moments = typeof source === 'string' ? readMoments(source) : source;
  const problem = typeof source === 'string' ? undefined : flaw(source);
  if (problem !== undefined) throw invalid(`These are no calibration moments: ${problem}.`);

  const bases = new BasisCache(moments, blockTokens, context);
  const keys = { blockTokens, hadamardK: true, unbiasedK: true, clipK: clipRatios(keyBits) };
  return new Preset(
    `calibrated-k${keyBits}v${valueBits}`,
    `${keyBits}-bit block-relative keys in a half-whitened Hadamard basis with error feedback, ${valueBits}-bit values`,
    perToken(keyBits),
    perToken(valueBits),
    (layer, shape) => ({
      ...(keyBits === 16 ? {} : { ...keys, basis: bases.of(layer, shape) }),
      ...rotatedValues(valueBits),
    }),
  );
}

/** Bases of one set of moments, derived when a layer first asks, kept per rotary embedding. */
class BasisCache {
  private readonly derivers = new Map<string, (moments: HeadMoments) => HeadBasis>();
  private readonly bases = new Map<string, readonly HeadBasis[]>();

  constructor(
    private readonly moments: Moments,
    private readonly blockTokens: number,
    private readonly context: number,
  ) {}

  of(layer: number, shape: CacheShape): readonly HeadBasis[] {
    const { moments, blockTokens, context } = this;
    const { rope, headDim } = shape;
    const heads = moments.layers.get(layer);
    if (!heads) throw invalid(`There are no calibration moments of layer ${layer}.`);
    const problem = misfit(moments, shape);
    if (problem !== undefined) throw invalid(problem);
    if (!rope) throw invalid("The calibrated scheme needs the model's rope parameters.");
    const turn = JSON.stringify({ ...rope, theta: rope.theta && [...rope.theta] });
    const known = this.bases.get(`${layer} ${turn}`);
    if (known) return known;
    const derive = this.derivers.get(turn) ?? basisDeriver({ rope, headDim, blockTokens, context });
    this.derivers.set(turn, derive);
    const bases = heads.map(derive);
    this.bases.set(`${layer} ${turn}`, bases);
    return bases;
  }
}

export const schemes = { fp16, q8, q4_0, innerq, rotated, calibrated } as const;

/** One of the schemes that are compared by default; `create` needs moments where `calibrated` is true. */
export interface BuiltinScheme {
  readonly name: string;
  readonly calibrated: boolean;
  create(moments?: string | Moments): DescribedScheme;
}

function builtin(create: () => DescribedScheme): BuiltinScheme {
  return { name: create().name, calibrated: false, create };
}

function builtinCalibrated(
  keyBits: BitsOptions['keyBits'],
  valueBits: BitsOptions['valueBits'],
): BuiltinScheme {
  const name = `calibrated-k${keyBits}v${valueBits}`;
  return {
    name,
    calibrated: true,
    create(moments) {
      if (moments === undefined) throw invalid(`The scheme ${name} needs calibration moments.`);
      return calibrated(moments, { keyBits, valueBits });
    },
  };
}

export const builtinSchemes: readonly BuiltinScheme[] = [
  builtin(fp16),
  builtin(q8),
  builtin(q4_0),
  builtin(() => innerq({ preset: 'base' })),
  builtin(() => innerq({ preset: 'small' })),
  builtin(() => innerq({ preset: 'hybrid', compat: 'released' })),
  builtin(() => innerq({ preset: 'hybrid' })),
  builtin(() => rotated({ keyBits: 4, valueBits: 4 })),
  builtin(() => rotated({ keyBits: 3, valueBits: 3 })),
  builtin(() => rotated({ keyBits: 2, valueBits: 2 })),
  builtinCalibrated(4, 4),
  builtinCalibrated(3, 3),
  builtinCalibrated(3, 2),
  builtinCalibrated(2, 2),
  builtinCalibrated(2, 1),
];

/** A built-in scheme, or any `rotated-kXvY` and `calibrated-kXvY`, by name. */
export function schemeNamed(name: string, moments?: string | Moments): DescribedScheme {
  const known = builtinSchemes.find((scheme) => scheme.name === name);
  if (known) return known.create(moments);
  const [, family, keyBits, valueBits] = /^(rotated|calibrated)-k(\d+)v(\d+)$/.exec(name) ?? [];
  if (family === undefined)
    throw invalid(
      `There is no scheme "${name}". There are ${builtinSchemes.map((scheme) => scheme.name).join(', ')}.`,
    );
  const options = { keyBits: Number(keyBits), valueBits: Number(valueBits) } as BitsOptions;
  if (family === 'rotated') return rotated(options);
  if (moments === undefined) throw invalid(`The scheme ${name} needs calibration moments.`);
  return calibrated(moments, options);
}

export type { DescribedScheme } from './preset';
export { readMoments, selectLayers, encodeMoments } from './moments';
export type { HeadMoments, Moments, MomentsOrigin } from './moments';
export { ropeFrequencies } from './rope';
export type * from './types';
