/** Synthetic keys, values and queries with the anisotropy of real ones, and the moments that belong to them. */
import { type Moments } from '../../lib';

export interface Shape {
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
}

/** Distinct tokens; longer contexts repeat them in fresh memory. No time depends on what the numbers are. */
export const PERIOD = 1024;

export interface Workload {
  readonly shape: Shape;
  /** [PERIOD, kvHeads, headDim], numbers that binary16 holds exactly, so that every contender reads the same. */
  readonly k: Float32Array;
  readonly v: Float32Array;
  /** [queryHeads, headDim] */
  readonly q: Float32Array;
  readonly moments: Moments;
}

/** Deterministic: mulberry32 and Box-Muller. */
function gaussians(seed: number): () => number {
  let state = seed;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let x = Math.imul(state ^ (state >>> 15), 1 | state);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
  return () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
}

const word = new Float32Array(1);
const bits = new Uint32Array(word.buffer);

/** Binary16 bits of a number that binary16 holds exactly. */
function exactHalf(value: number): number {
  word[0] = value;
  const [all] = bits as unknown as [number];
  return value === 0
    ? 0
    : ((all >>> 16) & 0x8000) | ((((all >>> 23) & 0xff) - 112) << 10) | ((all >>> 13) & 0x3ff);
}

/** `value` with the 10 mantissa bits of a normal binary16 number, or 0. */
function shortened(value: number): number {
  word[0] = Math.abs(value) < 2 ** -14 ? 0 : value;
  bits[0]! &= ~0x1fff;
  return word[0];
}

export function makeWorkload(shape: Shape): Workload {
  const { queryHeads, kvHeads, headDim } = shape;
  const random = gaussians(1);
  // A few strong channels above a falling spectrum, and a mean of the size of the deviation.
  const deviation = Float64Array.from({ length: headDim }, (_, c) => (c % 37 === 5 ? 8 : 2) / (1 + c / 32));
  const mean = Float64Array.from({ length: kvHeads * headDim }, (_, i) => deviation[i % headDim]! * random());
  const shared = Float64Array.from({ length: kvHeads * headDim }, random); // one direction that queries like
  const tokens = (make: (i: number) => number) =>
    Float32Array.from({ length: PERIOD * kvHeads * headDim }, (_, i) =>
      shortened(make(i % (kvHeads * headDim))),
    );
  const group = queryHeads / kvHeads;
  const heads = Array.from({ length: kvHeads }, (_, head) => {
    const row = (array: Float64Array) => array.subarray(head * headDim, (head + 1) * headDim);
    const [mu, u] = [row(mean), row(shared)];
    const matrix = (of: (i: number, j: number) => number) =>
      Float64Array.from({ length: headDim ** 2 }, (_, at) => of(Math.floor(at / headDim), at % headDim));
    return {
      keyMean: mu,
      keyMoment: matrix((i, j) => mu[i]! * mu[j]! + (i === j ? deviation[i]! ** 2 : 0)),
      queryMoment: matrix((i, j) => u[i]! * u[j]! + (i === j ? 1 / (1 + i / 16) : 0)),
    };
  });
  return {
    shape,
    k: tokens((i) => mean[i]! + deviation[i % headDim]! * random()),
    v: tokens(random),
    q: Float32Array.from({ length: queryHeads * headDim }, (_, i) => {
      const [head, channel] = [Math.floor(i / headDim / group), i % headDim];
      return shared[head * headDim + channel]! * random() + random() / (1 + channel / 16);
    }),
    moments: { kvHeads, headDim, layers: new Map([[0, heads]]) },
  };
}

/** As denseAttention() takes them: [kvHeads, tokens, headDim], float32 or binary16. */
export function denseOf({ shape, k, v }: Workload, tokens: number, half: boolean) {
  const { kvHeads, headDim } = shape;
  const piece = (from: Float32Array) => {
    const source = half ? Uint16Array.from(from, exactHalf) : from;
    const to = half
      ? new Uint16Array(kvHeads * tokens * headDim)
      : new Float32Array(kvHeads * tokens * headDim);
    for (let head = 0; head < kvHeads; head++)
      for (let t = 0; t < tokens; t++) {
        const at = ((t % PERIOD) * kvHeads + head) * headDim;
        to.set(source.subarray(at, at + headDim), (head * tokens + t) * headDim);
      }
    return to;
  };
  return { k: piece(k), v: piece(v) };
}
