/**
 * From a key to what is rounded (float32, bit for bit) and the float64 counterparts for queries and decoding.
 * Source: docs/format.md section 5; RoPE: arXiv 2104.09864.
 */

const f = Math.fround;

/** Channels of pair i: (2i, 2i+1) `adjacent`, (i, i + rotaryDims/2) `half`. */
export type RopeLayout = 'adjacent' | 'half';

/** theta [rotaryDims / 2] float64, radians per position; channels from rotaryDims on are not rotated. */
export interface Rope {
  readonly theta: ArrayLike<number>;
  readonly layout: RopeLayout;
  readonly rotaryDims: number;
}

/** The usual frequencies base^(−2i/rotaryDims). */
export function ropeFrequencies(rotaryDims: number, base: number): Float64Array {
  return Float64Array.from({ length: rotaryDims / 2 }, (_, i) => base ** ((-2 * i) / rotaryDims));
}

/** The two channels of pair i. */
export function pairChannels(i: number, { layout, rotaryDims }: Rope): [number, number] {
  return layout === 'adjacent' ? [2 * i, 2 * i + 1] : [i, i + rotaryDims / 2];
}

/** Step 1: rotation of x [headDim] by −P, tables rounded once from float64. */
export function rotateBack32(x: Float32Array, P: number, rope: Rope): Float32Array {
  const out = Float32Array.from(x);
  for (let i = 0; i < rope.rotaryDims / 2; i++) {
    const c = f(Math.cos(P * rope.theta[i]!));
    const s = f(Math.sin(P * rope.theta[i]!));
    const [a, b] = pairChannels(i, rope);
    out[a] = f(f(x[a]! * c) + f(x[b]! * s));
    out[b] = f(f(x[b]! * c) - f(x[a]! * s));
  }
  return out;
}

/** Step 2: x − mu. */
export function subtractMean32(x: Float32Array, mu: Float32Array): Float32Array {
  return x.map((value, c) => f(value - mu[c]!));
}

/** 1/lam, rounded once to float32. */
export function reciprocal32(lam: Float32Array): Float32Array {
  return lam.map((value) => f(1 / value));
}

/** Step 3: x·(1/lam), with the rounded reciprocal. */
export function normalise32(x: Float32Array, reciprocalLam: Float32Array): Float32Array {
  return x.map((value, c) => f(value * reciprocalLam[c]!));
}

/** Sizes of the diagonal Hadamard blocks: 80 = 64 + 16, 96 = 64 + 32. */
export function hadamardBlocks(headDim: number): number[] {
  const blocks: number[] = [];
  for (let rest = headDim; rest > 0; rest -= blocks.at(-1)!) {
    let size = 1;
    while (size * 2 <= rest) size *= 2;
    blocks.push(size);
  }
  return blocks;
}

/** Step 4: block-diagonal Hadamard of x [headDim] in float32. */
export function hadamard32(x: Float32Array): Float32Array {
  const out = Float32Array.from(x);
  butterflies(out, f, (block) => f(1 / Math.sqrt(block)));
  return out;
}

/** The same in float64; its own inverse. */
export function hadamard64(x: ArrayLike<number>): Float64Array {
  const out = Float64Array.from(x);
  butterflies(
    out,
    (value) => value,
    (block) => 1 / Math.sqrt(block),
  );
  return out;
}

function butterflies(
  x: Float32Array | Float64Array,
  round: (value: number) => number,
  factor: (block: number) => number,
): void {
  let start = 0;
  for (const block of hadamardBlocks(x.length)) {
    for (let h = 1; h < block; h *= 2)
      for (let i = 0; i < block; i++) {
        if (i & h) continue; // i is the first of its pair
        const a = x[start + i]!;
        const b = x[start + i + h]!;
        x[start + i] = round(a + b);
        x[start + i + h] = round(a - b);
      }
    for (let i = start; i < start + block; i++) x[i] = round(x[i]! * factor(block));
    start += block;
  }
}

/** Which steps a scheme takes; absent = step left out. */
export interface KeySteps {
  readonly rotation?: { readonly P: number; readonly rope: Rope } | undefined;
  readonly mu?: Float32Array | undefined;
  /** lam itself; the reciprocal is taken here. */
  readonly lam?: Float32Array | undefined;
  readonly hadamard?: boolean | undefined;
}

/** Steps 1 to 4 in order on one key x [headDim] of binary16 values. */
export function transformKey32(x: Float32Array, { rotation, mu, lam, hadamard }: KeySteps): Float32Array {
  let key: Float32Array = x;
  if (rotation) key = rotateBack32(key, rotation.P, rotation.rope);
  if (mu) key = subtractMean32(key, mu);
  if (lam) key = normalise32(key, reciprocal32(lam));
  if (hadamard) key = hadamard32(key);
  return key;
}

/** Undoes the steps in float64: R(P)(H^-1(x)·lam + mu). */
export function restoreKey64(x: ArrayLike<number>, { rotation, mu, lam, hadamard }: KeySteps): Float64Array {
  let key: Float64Array = Float64Array.from(x);
  if (hadamard) key = hadamard64(key);
  if (lam) key = key.map((value, c) => value * lam[c]!);
  if (mu) key = key.map((value, c) => value + mu[c]!);
  if (rotation) key = applyRope(key, rotation.P, rotation.rope);
  return key;
}

/** RoPE at `position` in float64: pair (x, y) -> (x·cos − y·sin, x·sin + y·cos), angle position·theta_i. */
export function applyRope(x: ArrayLike<number>, position: number, rope: Rope): Float64Array {
  const out = Float64Array.from(x);
  for (let i = 0; i < rope.rotaryDims / 2; i++) {
    const c = Math.cos(position * rope.theta[i]!);
    const s = Math.sin(position * rope.theta[i]!);
    const [a, b] = pairChannels(i, rope);
    out[a] = x[a]! * c - x[b]! * s;
    out[b] = x[a]! * s + x[b]! * c;
  }
  return out;
}

/** The query that meets a block whose first position is P: R(−P) q, float64. */
export function rotateQuery(
  q: ArrayLike<number>,
  P: number,
  theta: ArrayLike<number>,
  layout: RopeLayout,
  rotaryDims: number,
): Float64Array {
  return applyRope(q, -P, { theta, layout, rotaryDims });
}

/** Mean of the given tokens (each [headDim]) per channel: float32 sum in token order, divided by the count. */
export function sequenceMean32(tokens: readonly Float32Array[]): Float32Array {
  return Float32Array.from(tokens[0]!, (_, c) => {
    let sum = 0;
    for (const token of tokens) sum = f(sum + token[c]!);
    return f(sum / tokens.length);
  });
}

/** lam_c = sqrt(max |k_c|) in float32, at least 2^-10. */
export function sequenceLam32(tokens: readonly Float32Array[]): Float32Array {
  return Float32Array.from(tokens[0]!, (_, c) => {
    let largest = 0;
    for (const token of tokens) largest = Math.max(largest, Math.abs(token[c]!));
    return Math.max(f(Math.sqrt(largest)), 2 ** -10);
  });
}
