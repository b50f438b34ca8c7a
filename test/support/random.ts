/** Seeded inputs for tests: numbers, adversarial groups, poison. Nothing here depends on the clock or the platform. */
import { MAX_HALF, MIN_HALF, roundToHalf } from '../reference/half';

// Bound once: in the tests' sandbox every look-up of a global is slow.
const { abs, cos, floor, imul, log, PI, sin, sqrt } = Math;

/** mulberry32 (Tommy Ettinger, public domain): 32 bits of state, equal sequences for equal seeds. */
export class Random {
  private state: number;
  private spare: number | undefined;

  constructor(seed: number) {
    this.state = seed >>> 0;
  }

  /** Uniform in [0, 2^32). */
  bits32(): number {
    this.state = (this.state + 0x6d2b79f5) >>> 0;
    let t = this.state;
    t = imul(t ^ (t >>> 15), t | 1);
    t ^= t + imul(t ^ (t >>> 7), t | 61);
    return (t ^ (t >>> 14)) >>> 0;
  }

  /** Uniform in [low, high). */
  uniform(low = 0, high = 1): number {
    return low + ((high - low) * this.bits32()) / 2 ** 32;
  }

  /** Uniform integer in [0, count). */
  below(count: number): number {
    return floor(this.uniform(0, count));
  }

  pick<T>(items: readonly T[]): T {
    return items[this.below(items.length)]!;
  }

  /** Standard normal (Box and Muller). */
  gaussian(): number {
    if (this.spare !== undefined) {
      const value = this.spare;
      this.spare = undefined;
      return value;
    }
    const radius = sqrt(-2 * log(1 - this.uniform()));
    const angle = this.uniform(0, 2 * PI);
    this.spare = radius * sin(angle);
    return radius * cos(angle);
  }

  /** `count` standard normals, times `deviation`. */
  gaussians(count: number, deviation = 1): Float32Array {
    return Float32Array.from({ length: count }, () => this.gaussian() * deviation);
  }

  /** The same, rounded to binary16 values. */
  halves(count: number, deviation = 1): Float32Array {
    return this.gaussians(count, deviation).map(roundToHalf);
  }
}

/** A named group of binary16 values. */
export interface NamedGroup {
  readonly name: string;
  readonly values: Float32Array;
}

/** Groups on which quantisers go wrong; all values are binary16 numbers. */
export function adversarialGroups(count: number, seed = 1): NamedGroup[] {
  const random = new Random(seed);
  const fill = (make: (i: number) => number) =>
    Float32Array.from({ length: count }, (_, i) => roundToHalf(make(i)));
  const middle = count >> 1;
  return [
    { name: 'constant', values: fill(() => 1.2345) },
    { name: 'negative constant', values: fill(() => -0.3) },
    { name: 'all zero', values: fill(() => 0) },
    { name: 'all minus zero', values: fill(() => -0) },
    { name: 'signed zeros', values: fill((i) => (i % 3 === 1 ? -0 : 0)) },
    { name: 'single outlier', values: fill((i) => (i === middle ? 100 : 0)) },
    {
      name: 'single negative outlier',
      values: fill((i) => (i === middle ? -100 : random.gaussian() * 0.01)),
    },
    { name: 'subnormals', values: fill((i) => ((i * 37) % 1023) * MIN_HALF * (i % 2 ? -1 : 1)) },
    { name: 'smallest subnormal', values: fill((i) => (i === 0 ? MIN_HALF : 0)) },
    { name: 'all smallest subnormal', values: fill(() => MIN_HALF) },
    { name: 'largest halves', values: fill((i) => (i % 2 ? -MAX_HALF : MAX_HALF)) },
    { name: 'range above 65504', values: fill((i) => (i === 0 ? MAX_HALF : i === 1 ? -MAX_HALF : 1)) },
    { name: 'alternating', values: fill((i) => (i % 2 ? -1 : 1)) },
    { name: 'equal magnitudes, first negative', values: fill((i) => (i === 0 ? -2 : i === 1 ? 2 : 0.5)) },
    { name: 'ramp', values: fill((i) => i - middle) },
    { name: 'positive', values: fill(() => 2 + abs(random.gaussian())) },
    { name: 'gaussian', values: fill(() => random.gaussian()) },
    {
      name: 'gaussian with channel outliers',
      values: fill((i) => random.gaussian() * (i % 29 === 3 ? 50 : 1)),
    },
  ];
}

/**
 * Keys or values [tokens][headDim] of binary16 numbers: gaussian, a few channels scaled up and shifted in all tokens.
 */
export function plantedTokens(
  random: Random,
  tokens: number,
  headDim: number,
  { outliers = 3, scale = 8 }: { outliers?: number; scale?: number } = {},
): Float32Array[] {
  const gain = new Float32Array(headDim).fill(1);
  const shift = new Float32Array(headDim);
  for (let i = 0; i < outliers; i++) {
    const channel = random.below(headDim);
    gain[channel] = scale;
    shift[channel] = scale * random.gaussian();
  }
  return Array.from({ length: tokens }, () =>
    random.gaussians(headDim).map((value, c) => roundToHalf(value * gain[c]! + shift[c]!)),
  );
}

/** Floats that must never be read: all NaN. */
export function poisonedFloats(count: number): Float32Array {
  return new Float32Array(count).fill(NaN);
}

/** Binary16 patterns that must never be read: all NaN. */
export function poisonedHalves(count: number): Uint16Array {
  return new Uint16Array(count).fill(0x7e00);
}

/** Bytes that must never be read: 0xff, so that any float or half in them is NaN. */
export function poisonedBytes(count: number): Uint8Array {
  return new Uint8Array(count).fill(0xff);
}
