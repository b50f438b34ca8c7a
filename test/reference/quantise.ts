/**
 * Rounding of groups and tokens to codes and scales, bit for bit.
 * Every operation is IEEE float32: Math.fround after each product, sum and quotient (float64 is wide enough that
 * rounding its result once more equals the float32 operation). Source: docs/format.md, sections 3, 4 and 8.
 */
import { fromHalfBits, toHalfBits } from './half';
import { takeOutliers, type Outlier } from './outliers';
import { channelGroups, isHybrid, SUB_BLOCK_TOKENS, type TensorSpec } from './types';

const f = Math.fround;

// Bound once: in the tests' sandbox every look-up of a global is slow.
const { abs, max, min, trunc } = Math;

/** What a scheme may ask for beyond the mode. */
export interface RoundingOptions {
  /** Clip ratios in order of preference (midRise only); absent or [1] = plain. */
  readonly clipRatios?: readonly number[];
  /** Multiply the stored scale by <x, x> / <x, x̂> (modes without zero point). */
  readonly unbiased?: boolean;
}

/** One group: codes [m], binary16 patterns of scale and zero point (only where the group owns one). */
export interface QuantisedGroup {
  readonly codes: Uint8Array;
  readonly scaleBits: number;
  readonly zeroBits: number | undefined;
}

/** One token: codes [headDim] (bits = 16: binary16 patterns), scales and zeros [groups]. */
export interface QuantisedToken {
  readonly codes: Uint16Array;
  readonly scaleBits: number[];
  readonly zeroBits: (number | undefined)[];
  /** Added to what the codes decode to, ascending by channel; only where the spec has outliers. */
  readonly outliers?: readonly Outlier[];
}

/** 32 tokens of `tokens32`: codes [slot * headDim + channel], scales and zeros [channel]. */
export interface QuantisedBlock {
  readonly codes: Uint16Array;
  readonly scaleBits: number[];
  readonly zeroBits: (number | undefined)[];
}

/** A candidate of one group: codes, stored scale magnitude and zero as numbers, reconstruction x̂. */
interface Candidate {
  codes: Uint8Array;
  scale: number;
  zero: number | undefined;
  decoded: Float32Array;
}

/** Sum of float32 terms in 32 interleaved accumulators, then halving; the fixed order of docs/format.md section 4. */
export function sum32(terms: ArrayLike<number>): number {
  const a = new Float32Array(32);
  for (let i = 0; i < terms.length; i++) a[i % 32] = f(a[i % 32]! + terms[i]!);
  for (let h = 16; h >= 1; h /= 2) for (let l = 0; l < h; l++) a[l] = f(a[l]! + a[l + h]!);
  return a[0]!;
}

/** trunc(min(max(u, lo), hi)). */
export function clampCode(u: number, lo: number, hi: number): number {
  return trunc(min(max(u, lo), hi));
}

/** half(x) of a float32 expression, as a number. */
export function half(x: number): number {
  return fromHalfBits(toHalfBits(f(x)));
}

/** 1/s in float32, 0 for s = 0. */
export function inverse(s: number): number {
  return s === 0 ? 0 : f(1 / s);
}

/** max |x_i|. */
export function maxMagnitude(x: ArrayLike<number>): number {
  let largest = 0;
  for (let i = 0; i < x.length; i++) largest = max(largest, abs(x[i]!));
  return largest;
}

/** The unclipped mid-rise step before half(): (2·A)/(n−1). */
export function midRiseStep(largest: number, levels: number): number {
  return f(f(2 * largest) / (levels - 1));
}

/** Code of one mid-rise value; s = 0 gives code n/2. */
export function midRiseCode(x: number, s: number, levels: number): number {
  return clampCode(f(f(x * inverse(s)) + levels / 2), 0, levels - 1);
}

/** Stored scale after unbiasing: half(s·g), g = num/den held in [0.5, 2], 1 when undefined. */
export function unbiasedScaleBits(scale: number, num: number, den: number): number {
  let g = f(num / den);
  if (!(den > 0) || !Number.isFinite(g)) g = 1;
  g = min(max(g, 0.5), 2);
  return toHalfBits(f(scale * g));
}

/** Rounds one group x [m] (order: channels, or slots for tokens32). */
export function quantiseGroup(
  x: Float32Array,
  spec: TensorSpec,
  options: RoundingOptions = {},
): QuantisedGroup {
  const { bits, mode } = spec;
  if (bits === 16) throw new Error('16 bits have no groups');
  const n = 2 ** bits;
  const ratios = options.clipRatios ?? [1];
  const clips = ratios.length !== 1 || ratios[0] !== 1;
  if (clips && mode !== 'midRise') throw new Error(`clip ratios are for midRise, not ${mode}`);
  if (bits === 1 && (mode === 'zeroLevel' || isHybrid(mode))) throw new Error(`${mode} needs 2 bits or more`);

  switch (mode) {
    case 'midRise':
      return finish(x, clippedMidRise(x, n, ratios), options);
    case 'zeroLevel':
      return finish(x, zeroLevel(x, n), options);
    case 'signedMax':
      return finish(x, signedMax(x, n), options);
    case 'asymmetric':
      return finish(x, asymmetric(x, n), options);
    case 'hybrid': {
      const symmetric = zeroLevel(x, n);
      const skewed = asymmetric(x, n);
      const wins = squaredError(x, skewed.decoded) < squaredError(x, symmetric.decoded);
      return finishHybrid(wins ? skewed : symmetric, options);
    }
    case 'hybridReleased': {
      const symmetric = zeroLevel(x, n);
      const skewed = asymmetric(x, n / 2);
      const wins = absoluteError(x, symmetric.decoded) < absoluteError(x, skewed.decoded);
      return finishHybrid(wins ? symmetric : skewed, options);
    }
  }
}

/** Rounds one token x [headDim], group by group; 16 bits: half(x). */
export function quantiseToken(
  x: Float32Array,
  spec: TensorSpec,
  options: RoundingOptions = {},
): QuantisedToken {
  if (spec.bits === 16) return { codes: Uint16Array.from(x, toHalfBits), scaleBits: [], zeroBits: [] };
  const { outliers = 0 } = spec;
  const ranges = channelGroups(x.length, spec.group);
  if (outliers > 0) {
    const { channels, rest } = takeOutliers(x, outliers, ranges);
    const token = quantiseToken(rest, { ...spec, outliers: 0 }, options);
    const decoded = decodeToken(token, spec);
    const valueOf = (c: number) => toHalfBits(f(f(x[c]! - f(decoded[c]!)) + 0)); // + 0: no -0
    return { ...token, outliers: channels.map((channel) => ({ channel, valueBits: valueOf(channel) })) };
  }
  const groups = ranges.map(({ start, end }) => quantiseGroup(x.subarray(start, end), spec, options));
  return {
    codes: Uint16Array.from(groups.flatMap((group) => [...group.codes])),
    scaleBits: groups.map((group) => group.scaleBits),
    zeroBits: groups.map((group) => group.zeroBits),
  };
}

/** Rounds 32 tokens (each [headDim]) channel by channel. */
export function quantiseBlock(
  tokens: readonly Float32Array[],
  spec: TensorSpec,
  options: RoundingOptions = {},
): QuantisedBlock {
  if (tokens.length !== SUB_BLOCK_TOKENS) throw new Error(`a block has 32 tokens, not ${tokens.length}`);
  const headDim = tokens[0]!.length;
  const codes = new Uint16Array(SUB_BLOCK_TOKENS * headDim);
  const scaleBits: number[] = [];
  const zeroBits: (number | undefined)[] = [];
  for (let channel = 0; channel < headDim; channel++) {
    const group = quantiseGroup(
      Float32Array.from(tokens, (token) => token[channel]!),
      spec,
      options,
    );
    group.codes.forEach((code, slot) => (codes[slot * headDim + channel] = code));
    scaleBits.push(group.scaleBits);
    zeroBits.push(group.zeroBits);
  }
  return { codes, scaleBits, zeroBits };
}

/**
 * How one group's codes become values: value = scale·(code − offset) + zero, all as exact float64 numbers.
 * The scale is negative only in mode `signedMax`; a hybrid group's sign bit chooses the line instead.
 */
export function groupDecoder(
  scaleBits: number,
  zeroBits: number | undefined,
  { bits, mode }: TensorSpec,
): { scale: number; offset: number; zero: number } {
  const n = 2 ** bits;
  const signed = fromHalfBits(scaleBits);
  const scale = mode === 'signedMax' ? signed : abs(signed);
  const skewed = mode === 'asymmetric' || (isHybrid(mode) && (scaleBits & 0x8000) !== 0);
  if (skewed) {
    if (zeroBits === undefined) throw new Error('an asymmetric group without a zero point');
    return { scale, offset: 0, zero: fromHalfBits(zeroBits) };
  }
  return { scale, offset: mode === 'midRise' ? (n - 1) / 2 : n / 2, zero: 0 };
}

/** Float64 (exact) values of one group from its stored bits. */
export function decodeGroup(
  codes: ArrayLike<number>,
  scaleBits: number,
  zeroBits: number | undefined,
  spec: TensorSpec,
): Float64Array {
  const { scale, offset, zero } = groupDecoder(scaleBits, zeroBits, spec);
  return Float64Array.from(codes, (code) => scale * (code - offset) + zero);
}

/** Float64 values [headDim] of one token. */
export function decodeToken(token: QuantisedToken, spec: TensorSpec): Float64Array {
  if (spec.bits === 16) return Float64Array.from(token.codes, fromHalfBits);
  const values = new Float64Array(token.codes.length);
  channelGroups(token.codes.length, spec.group).forEach(({ start, end }, g) => {
    values.set(
      decodeGroup(token.codes.subarray(start, end), token.scaleBits[g]!, token.zeroBits[g], spec),
      start,
    );
  });
  for (const { channel, valueBits } of token.outliers ?? []) values[channel]! += fromHalfBits(valueBits);
  return values;
}

/** Float64 values [headDim] of one slot (0 ... 31) of a `tokens32` block. */
export function decodeBlockSlot(block: QuantisedBlock, slot: number, spec: TensorSpec): Float64Array {
  const headDim = block.scaleBits.length;
  return Float64Array.from(
    block.scaleBits,
    (scale, channel) =>
      decodeGroup([block.codes[slot * headDim + channel]!], scale, block.zeroBits[channel], spec)[0]!,
  );
}

function clippedMidRise(x: Float32Array, n: number, ratios: readonly number[]): Candidate {
  const step = midRiseStep(maxMagnitude(x), n);
  let best: Candidate | undefined;
  let least = Infinity;
  for (const ratio of ratios) {
    const scale = half(f(f(ratio) * step));
    const codes = Uint8Array.from(x, (value) => midRiseCode(value, scale, n));
    const decoded = Float32Array.from(codes, (code) => f(scale * (code - (n - 1) / 2)));
    const error = squaredError(x, decoded);
    if (best === undefined || error < least) {
      best = { codes, scale, zero: undefined, decoded };
      least = error;
    }
  }
  if (best === undefined) throw new Error('no clip ratios');
  return best;
}

function zeroLevel(x: Float32Array, n: number): Candidate {
  const scale = half(f(maxMagnitude(x) / (n / 2 - 1)));
  const codes = Uint8Array.from(x, (value) =>
    clampCode(f(f(value * inverse(scale)) + (n / 2 + 0.5)), 1, n - 1),
  );
  return {
    codes,
    scale,
    zero: undefined,
    decoded: Float32Array.from(codes, (code) => f(scale * (code - n / 2))),
  };
}

function signedMax(x: Float32Array, n: number): Candidate {
  let extreme = x[0]!;
  for (const value of x) if (abs(value) > abs(extreme)) extreme = value;
  const scale = half(f(extreme / (-n / 2))); // keeps the sign of zero: a group of +0 stores 0x8000
  const codes = Uint8Array.from(x, (value) =>
    clampCode(f(f(value * inverse(scale)) + (n / 2 + 0.5)), 0, n - 1),
  );
  return {
    codes,
    scale,
    zero: undefined,
    decoded: Float32Array.from(codes, (code) => f(scale * (code - n / 2))),
  };
}

function asymmetric(x: Float32Array, levels: number): Candidate {
  let low = x[0]!;
  let high = x[0]!;
  for (const value of x) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const zero = half(low + 0); // -0 is stored as +0
  const scale = half(f(f(high - low) / (levels - 1)));
  const codes = Uint8Array.from(x, (value) =>
    clampCode(f(f(f(value - zero) * inverse(scale)) + 0.5), 0, levels - 1),
  );
  return { codes, scale, zero, decoded: Float32Array.from(codes, (code) => f(f(scale * code) + zero)) };
}

function finish(x: Float32Array, group: Candidate, { unbiased }: RoundingOptions): QuantisedGroup {
  const zeroBits = group.zero === undefined ? undefined : toHalfBits(group.zero);
  if (!unbiased) return { codes: group.codes, scaleBits: toHalfBits(group.scale), zeroBits };
  if (zeroBits !== undefined) throw new Error('unbiased scales are for modes without zero point');
  const num = sum32(x.map((value) => f(value * value)));
  const den = sum32(x.map((value, i) => f(value * group.decoded[i]!)));
  return { codes: group.codes, scaleBits: unbiasedScaleBits(group.scale, num, den), zeroBits };
}

function finishHybrid(group: Candidate, { unbiased }: RoundingOptions): QuantisedGroup {
  if (unbiased) throw new Error('unbiased scales are for modes without zero point');
  const signBit = group.zero === undefined ? 0 : 0x8000;
  const zeroBits = group.zero === undefined ? undefined : toHalfBits(group.zero);
  return { codes: group.codes, scaleBits: toHalfBits(group.scale) | signBit, zeroBits };
}

function squaredError(x: Float32Array, decoded: Float32Array): number {
  return sum32(
    x.map((value, i) => {
      const error = f(value - decoded[i]!);
      return f(error * error);
    }),
  );
}

function absoluteError(x: Float32Array, decoded: Float32Array): number {
  return sum32(x.map((value, i) => abs(f(value - decoded[i]!))));
}
