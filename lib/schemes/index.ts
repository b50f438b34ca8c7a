/**
 * The schemes that ship: how keys and values become few bits. docs/format.md says what each field does.
 * Long file: every scheme's options and defaults, and their names.
 */
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
  /** Largest numbers of each key that are kept apart, 0 (default) to 8; not with error feedback. */
  readonly keyOutliers?: number;
  /** The same of each value. */
  readonly valueOutliers?: number;
}

export type ValueMode = 'symmetric' | 'asymmetric' | 'hybrid';

export interface InnerqOptions {
  /** The published variants: 3-bit keys with 3-bit values, 2-bit values, or 2-bit hybrid values. */
  readonly preset?: 'base' | 'small' | 'hybrid';
  readonly keyBits?: 2 | 3 | 4 | 8 | 16;
  readonly valueBits?: 2 | 3 | 4 | 8 | 16;
  /** Largest numbers of each key that are kept apart, 0 (default) to 8. */
  readonly keyOutliers?: number;
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

/** Parts of a scheme that can be left out, to see what they bring. */
const ROTATED_PARTS = ['mean', 'rotation', 'clip', 'unbiased'] as const;
const CALIBRATED_PARTS = ['blocks', 'mean', 'lambda', 'rotation', 'feedback', 'clip', 'unbiased'] as const;
export type RotatedPart = (typeof ROTATED_PARTS)[number];
export type CalibratedPart = (typeof CALIBRATED_PARTS)[number];

export interface RotatedOptions extends BitsOptions {
  /** Tokens the key mean is taken from: the sequence's own first ones. */
  readonly statTokens?: number;
  /** Correct key scales for the shrinking of rounding. Off: without error feedback it costs more than it brings. */
  readonly unbiasedKeys?: boolean;
  /** Ablation: the key mean, the Hadamard rotation, the clip search, the unbiased value scales. */
  readonly without?: readonly RotatedPart[];
}

export interface CalibratedOptions extends BitsOptions {
  /** Tokens that share one rotation, a multiple of 128. */
  readonly blockTokens?: number;
  /** Positions over which queries are averaged: the longest context to be served well. */
  readonly context?: number;
  /**
   * Ablation: block-relative keys, their mean, half whitening, the Hadamard rotation, error feedback, the clip search,
   * unbiased scales. Rotation, clip search and unbiased scales are left out of the values too.
   */
  readonly without?: readonly CalibratedPart[];
}

const SIZES = ['keyBits', 'valueBits', 'keyOutliers', 'valueOutliers'] as const;
const KEY_BITS = [2, 3, 4, 8, 16] as const;
const VALUE_BITS = [1, 2, 3, 4, 8, 16] as const;
const MODES = { symmetric: 'zeroLevel', asymmetric: 'asymmetric', hybrid: 'hybrid' } as const;
const INNERQ = {
  base: { keyBits: 3, valueBits: 3, valueMode: 'symmetric' },
  small: { keyBits: 3, valueBits: 2, valueMode: 'symmetric' },
  hybrid: { keyBits: 3, valueBits: 2, valueMode: 'hybrid' },
} as const;

function withOutliers(spec: TensorSpec, outliers: number): TensorSpec {
  return outliers > 0 ? { ...spec, outliers } : spec;
}

function perToken(bits: Bits, outliers: number): TensorSpec {
  return withOutliers(bits === 16 ? RAW : { bits, group: 'token', mode: 'midRise' }, outliers);
}

function outliersOf(given: unknown, what: string): number {
  return integerIn(given ?? 0, 0, 8, what);
}

/** As in scheme names: "k2o1v2" for 2-bit keys with one outlier a token and 2-bit values. */
function sizesOf(keyBits: number, keyOutliers: number, valueBits: number, valueOutliers = 0): string {
  const size = (bits: number, outliers: number) => `${bits}${outliers > 0 ? `o${outliers}` : ''}`;
  return `k${size(keyBits, keyOutliers)}v${size(valueBits, valueOutliers)}`;
}

function bitsOf(scheme: string, options: BitsOptions): Required<BitsOptions> {
  return {
    keyBits: oneOf(options.keyBits, KEY_BITS, `keyBits of schemes.${scheme}`),
    valueBits: oneOf(options.valueBits, VALUE_BITS, `valueBits of schemes.${scheme}`),
    keyOutliers: outliersOf(options.keyOutliers, `keyOutliers of schemes.${scheme}`),
    valueOutliers: outliersOf(options.valueOutliers, `valueOutliers of schemes.${scheme}`),
  };
}

/** Hadamard rotation of values, one scale per token. */
function rotatedValues(bits: Bits, without: ReadonlySet<string>): Partial<LayerScheme> {
  if (bits === 16) return {};
  return {
    hadamardV: !without.has('rotation'),
    unbiasedV: !without.has('unbiased'),
    clipV: without.has('clip') ? [] : clipRatios(bits),
  };
}

function partsWithout<T extends string>(scheme: string, given: unknown, parts: readonly T[]): ReadonlySet<T> {
  if (given !== undefined && !Array.isArray(given))
    throw invalid(`without of schemes.${scheme} must be an array.`);
  const names = (given ?? []) as readonly unknown[];
  return new Set(names.map((part) => oneOf(part, parts, `without of schemes.${scheme}`)));
}

/** As in scheme names: "-no-clip-no-feedback". */
function suffixOf(without: ReadonlySet<string>): string {
  return [...without].map((part) => `-no-${part}`).join('');
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
    'keyOutliers',
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
  const keyOutliers = outliersOf(options.keyOutliers, 'keyOutliers of schemes.innerq');
  const key = withOutliers(
    spec(oneOf(keyBits, KEY_BITS, 'keyBits of schemes.innerq'), keyMode, `channels${channels}`),
    keyOutliers,
  );
  const value = spec(oneOf(valueBits, KEY_BITS, 'valueBits of schemes.innerq'), valueMode, 'tokens32');
  const tokens = integerIn(statTokens, 1, 65536, 'statTokens');
  const normalised = oneOf(keyNormalisation, [true, false], 'keyNormalisation') && keyBits !== 16;

  const changed = Object.keys(options).some(
    (name) => !['preset', 'compat', 'releasedWindows'].includes(name),
  );
  const plain = changed
    ? `innerq-${sizesOf(keyBits, keyOutliers, valueBits)}-${valueMode}${keyNormalisation ? '' : '-no-lambda'}`
    : `innerq-${preset}`;
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
  checkOptions('rotated', options, [...SIZES, 'statTokens', 'unbiasedKeys', 'without']);
  const { keyBits, valueBits, keyOutliers, valueOutliers } = bitsOf('rotated', options);
  const statTokens = integerIn(options.statTokens ?? 128, 1, 65536, 'statTokens');
  const unbiasedK = oneOf(options.unbiasedKeys ?? false, [true, false], 'unbiasedKeys');
  const without = partsWithout('rotated', options.without, ROTATED_PARTS);
  const onlineMean = !without.has('mean');
  const keys = {
    hadamardK: !without.has('rotation'),
    onlineMean,
    statTokens: onlineMean ? statTokens : 0,
    unbiasedK,
    clipK: without.has('clip') ? [] : clipRatios(keyBits),
  };
  return new Preset(
    `rotated-${sizesOf(keyBits, keyOutliers, valueBits, valueOutliers)}${suffixOf(without)}`,
    `${keyBits}-bit keys and ${valueBits}-bit values in a Hadamard basis, a scale per token, no calibration`,
    perToken(keyBits, keyOutliers),
    perToken(valueBits, valueOutliers),
    () => ({ ...(keyBits === 16 ? {} : keys), ...rotatedValues(valueBits, without) }),
  );
}

/** `source`: a file of calibration moments, or moments in memory. */
function calibrated(source: string | Moments, options: CalibratedOptions): DescribedScheme {
  checkOptions('calibrated', options, [...SIZES, 'blockTokens', 'context', 'without']);
  const { keyBits, valueBits, keyOutliers, valueOutliers } = bitsOf('calibrated', options);
  const without = partsWithout('calibrated', options.without, CALIBRATED_PARTS);
  const size = integerIn(options.blockTokens ?? 128, 128, 2 ** 24, 'blockTokens');
  if (size % 128 !== 0) throw invalid(`blockTokens must be a multiple of 128, not ${size}.`);
  const blockTokens = without.has('blocks') ? 0 : size;
  const context = integerIn(options.context ?? 8192, 1, 2 ** 30, 'context');
  const moments = typeof source === 'string' ? readMoments(source) : source;
  const problem = typeof source === 'string' ? undefined : flaw(source);
  if (problem !== undefined) throw invalid(`These are no calibration moments: ${problem}.`);

  const bases = new BasisCache(moments, blockTokens, context, without);
  const keys = {
    blockTokens,
    hadamardK: !without.has('rotation'),
    unbiasedK: !without.has('unbiased'),
    clipK: without.has('clip') ? [1] : clipRatios(keyBits),
  };
  return new Preset(
    `calibrated-${sizesOf(keyBits, keyOutliers, valueBits, valueOutliers)}${suffixOf(without)}`,
    `${keyBits}-bit block-relative keys in a half-whitened Hadamard basis with error feedback, ${valueBits}-bit values`,
    perToken(keyBits, keyOutliers),
    perToken(valueBits, valueOutliers),
    (layer, shape) => ({
      ...(keyBits === 16 ? {} : { ...keys, basis: bases.of(layer, shape) }),
      ...rotatedValues(valueBits, without),
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
    private readonly without: ReadonlySet<CalibratedPart>,
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
    const steps = Object.fromEntries([...this.without].map((part) => [part, false]));
    const derive = this.derivers.get(turn) ?? basisDeriver({ rope, headDim, blockTokens, context, steps });
    this.derivers.set(turn, derive);
    const bases = heads.map((head) => reduced(derive(head), this.without));
    this.bases.set(`${layer} ${turn}`, bases);
    return bases;
  }
}

/** A part that is left out is absent, not neutral: neither kernels nor pages know of it. */
function reduced(basis: HeadBasis, without: ReadonlySet<CalibratedPart>): HeadBasis {
  const { mean, lam, ...feedback } = basis;
  return {
    ...(!without.has('mean') && mean && { mean }),
    ...(!without.has('lambda') && lam && { lam }),
    ...(!without.has('feedback') && feedback),
  };
}

/** Bits of keys and values of the presets, by evidence: docs/fidelity.md, "Defaults". */
const PRESETS = {
  calibrated: { 2: [2, 2], 3: [3, 3], 4: [4, 4] },
  rotated: { 2: [2, 2], 3: [4, 2], 4: [4, 4] }, // uncalibrated keys are the weak side
} as const;

/**
 * The scheme to take at a size, in bits per number and a fraction for scales: `calibrated` with moments of the model, `rotated`
 * without, whose 3 bits are 4 for keys and 2 for values.
 */
function preset(bits: 2 | 3 | 4, moments?: string | Moments): DescribedScheme {
  const size = oneOf(bits, [2, 3, 4] as const, 'bits of schemes.preset');
  const [keyBits, valueBits] = PRESETS[moments === undefined ? 'rotated' : 'calibrated'][size];
  return moments === undefined
    ? rotated({ keyBits, valueBits })
    : calibrated(moments, { keyBits, valueBits });
}

export const schemes = { fp16, q8, q4_0, innerq, rotated, calibrated, preset } as const;

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

/**
 * A built-in scheme, or any `rotated-kXvY`, `calibrated-kXvY` or `innerq-kXvY-symmetric` (`-asymmetric`, `-hybrid`) by name.
 * `-no-PART` leaves a part out: `calibrated-k2v2-no-feedback`; `rotated-k2o1v2` keeps the largest number of each key apart.
 * `2bit`, `3bit` and `4bit` are the presets.
 */
export function schemeNamed(name: string, moments?: string | Moments): DescribedScheme {
  const known = builtinSchemes.find((scheme) => scheme.name === name);
  if (known) return known.create(moments);
  const [, size] = /^([234])bit$/.exec(name) ?? [];
  if (size !== undefined) return preset(Number(size) as 2 | 3 | 4, moments);
  const [, family, keyBits, keyOutliers, valueBits, valueOutliers, rest = ''] =
    /^(rotated|calibrated|innerq)-k(\d+)(?:o([1-8]))?v(\d+)(?:o([1-8]))?((?:-[a-z]+)*)$/.exec(name) ?? [];
  if (family === undefined) throw unknownScheme(name);
  const bits = {
    keyBits: Number(keyBits),
    valueBits: Number(valueBits),
    ...(keyOutliers !== undefined && { keyOutliers: Number(keyOutliers) }),
    ...(valueOutliers !== undefined && { valueOutliers: Number(valueOutliers) }),
  } as BitsOptions;
  if (family === 'innerq') return innerqNamed(name, bits, rest);
  const without = [...rest.matchAll(/-no-([a-z]+)/g)].map(([, part]) => part!);
  if (suffixOf(new Set(without)) !== rest) throw unknownScheme(name);
  const options = { ...bits, without: without as RotatedPart[] };
  if (family === 'rotated') return rotated(options);
  if (moments === undefined) throw invalid(`The scheme ${name} needs calibration moments.`);
  return calibrated(moments, options);
}

function innerqNamed(name: string, bits: BitsOptions, rest: string): DescribedScheme {
  const [, valueMode, plain] = /^-(symmetric|asymmetric|hybrid)(-no-lambda)?$/.exec(rest) ?? [];
  if (valueMode === undefined) throw unknownScheme(name);
  return innerq({
    ...(bits as Required<Pick<InnerqOptions, 'keyBits' | 'valueBits'>>),
    valueMode: valueMode as ValueMode,
    keyNormalisation: plain === undefined,
  });
}

function unknownScheme(name: string) {
  return invalid(
    `There is no scheme "${name}". There are ${builtinSchemes.map((scheme) => scheme.name).join(', ')}.`,
  );
}

export type { DescribedScheme } from './preset';
export { readMoments, selectLayers, encodeMoments } from './moments';
export type { HeadMoments, Moments, MomentsOrigin } from './moments';
export { ropeFrequencies } from './rope';
export type * from './types';
