/** What all presets share: a scheme that can describe itself, defaults, and checks of options. */
import { invalid } from '../errors';
import {
  type Bits,
  type CacheShape,
  type LayerScheme,
  type Scheme,
  type TensorSpec,
  type Windows,
} from './types';

/** A scheme that knows its own price. */
export interface DescribedScheme extends Scheme {
  readonly key: TensorSpec;
  readonly value: TensorSpec;
  /** One sentence for tables and help texts. */
  describe(): string;
  /**
   * Stored bits per number, keys and values averaged: codes, scales, zero points and outliers, without 16-bit windows. For hybrid
   * schemes the zero points depend on the data and are not counted; the statistics of a cache count them.
   */
  bitsPerValue(headDim: number): number;
}

export const RAW: TensorSpec = { bits: 16, group: 'token', mode: 'midRise' };

/** Clip ratios as measured: 2-bit codes gain from a wider search, wider codes do not. */
export function clipRatios(bits: Bits): readonly number[] {
  if (bits === 16 || bits === 1) return [];
  return bits === 2 ? [1.1, 1, 0.92, 0.85, 0.78, 0.7, 0.62, 0.55] : [1, 0.92, 0.85, 0.78, 0.7, 0.62];
}

/** Storage without any treatment of keys and values. */
export function plainLayer(k: TensorSpec, v: TensorSpec, { sink, recent }: Windows): LayerScheme {
  return {
    k,
    v,
    sink,
    recent,
    blockTokens: 0,
    hadamardK: false,
    hadamardV: false,
    onlineMean: false,
    onlineLambda: false,
    statTokens: 0,
    unbiasedK: false,
    unbiasedV: false,
    clipK: [],
    clipV: [],
    releasedWindows: false,
    basis: null,
  };
}

/** Bits per number of one tensor, without data-dependent zero points. docs/format.md sections 3 and 8. */
export function tensorBits(spec: TensorSpec, headDim: number): number {
  if (spec.bits === 16) return 16;
  const { outliers = 0 } = spec;
  const rowBytes = outliers === 0 ? 0 : (129 * (outliers > 1 ? 2 : 1)) / 128 + 3 * outliers;
  const scales = {
    channels32: Math.ceil(headDim / 32) / headDim,
    channels64: Math.ceil(headDim / 64) / headDim,
    token: 1 / headDim,
    tokens32: 1 / 32,
  }[spec.group];
  return spec.bits + 16 * scales * (spec.mode === 'asymmetric' ? 2 : 1) + (8 * rowBytes) / headDim;
}

export class Preset implements DescribedScheme {
  constructor(
    readonly name: string,
    private readonly summary: string,
    readonly key: TensorSpec,
    readonly value: TensorSpec,
    private readonly treatment: (layer: number, shape: CacheShape) => Partial<LayerScheme> = () => ({}),
  ) {}

  layer(layer: number, shape: CacheShape, windows: Windows): LayerScheme {
    return { ...plainLayer(this.key, this.value, windows), ...this.treatment(layer, shape) };
  }

  describe(): string {
    return this.summary;
  }

  bitsPerValue(headDim: number): number {
    return (tensorBits(this.key, headDim) + tensorBits(this.value, headDim)) / 2;
  }
}

/** Misspelt options are errors: a silently ignored one would be another scheme than the user asked for. */
export function checkOptions(scheme: string, options: object, known: readonly string[]): void {
  // Options arrive from plain JavaScript too.
  if (typeof options !== 'object' || (options as unknown) === null)
    throw invalid(`The options of schemes.${scheme} must be an object.`);
  for (const name of Object.keys(options))
    if (!known.includes(name))
      throw invalid(`schemes.${scheme} has no option "${name}". It has ${known.join(', ')}.`);
}

/** `value` as one of `choices`. */
export function oneOf<T>(value: unknown, choices: readonly T[], what: string): T {
  if (!choices.includes(value as T))
    throw invalid(`${what} must be one of ${choices.join(', ')}, not ${JSON.stringify(value)}.`);
  return value as T;
}

export function integerIn(value: unknown, low: number, high: number, what: string): number {
  if (!Number.isInteger(value) || (value as number) < low || (value as number) > high)
    throw invalid(`${what} must be an integer from ${low} to ${high}, not ${JSON.stringify(value)}.`);
  return value as number;
}
