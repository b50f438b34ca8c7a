/**
 * Rounding of a transformed key with query-aware error feedback, bit for bit (float32, no fused multiply-add).
 * Source: docs/format.md section 6.
 */
import { toHalfBits } from './half';
import { half, maxMagnitude, midRiseCode, midRiseStep, sum32, unbiasedScaleBits } from './quantise';
import { type QuantisedGroup, type RoundingOptions } from './quantise';
import { type Bits } from './types';

const f = Math.fround;

/**
 * W, F [headDim * headDim] row-major, F strictly upper; d [headDim]; all float32 and all in the order of rounding:
 * `order`[i] is the channel rounded as the i-th (default: ascending).
 */
export interface FeedbackMatrices {
  readonly order?: ArrayLike<number>;
  readonly W: Float32Array;
  readonly F: Float32Array;
  readonly d: Float32Array;
}

/** A feedback result with the loss L and the reconstruction of the winning ratio, before unbiasing. */
export interface FeedbackGroup extends QuantisedGroup {
  readonly loss: number;
  readonly decoded: Float32Array;
}

/** Rounds one transformed key x [headDim] (grouping `token`, mode `midRise`). */
export function quantiseKeyFeedback(
  key: Float32Array,
  bits: Exclude<Bits, 16>,
  { order, W, F, d, clipRatios = [1], unbiased = false }: FeedbackMatrices & RoundingOptions,
): FeedbackGroup {
  const channels = order ? Array.from(order) : Array.from(key, (_, c) => c);
  const x = Float32Array.from(channels, (channel) => key[channel]!);
  const n = 2 ** bits;
  const step = midRiseStep(maxMagnitude(x), n);
  let best: ReturnType<typeof feedbackPass> | undefined;
  for (const ratio of clipRatios) {
    const pass = feedbackPass(x, half(f(f(ratio) * step)), n, F, d);
    if (best === undefined || pass.loss < best.loss) best = pass;
  }
  if (best === undefined) throw new Error('no clip ratios');

  const { scale, decoded, loss } = best;
  let scaleBits = toHalfBits(scale);
  if (unbiased) {
    const v = weighted(W, x);
    const num = sum32(x.map((value, c) => f(value * v[c]!)));
    const den = sum32(decoded.map((value, c) => f(value * v[c]!)));
    scaleBits = unbiasedScaleBits(scale, num, den);
  }
  const back = { codes: new Uint8Array(key.length), decoded: new Float32Array(key.length) };
  channels.forEach((channel, i) => {
    back.codes[channel] = best.codes[i]!;
    back.decoded[channel] = decoded[i]!;
  });
  return { ...back, scaleBits, zeroBits: undefined, loss };
}

/** One pass over the channels with stored scale `scale`; pushes each error onto the later channels. */
function feedbackPass(x: Float32Array, scale: number, n: number, F: Float32Array, d: Float32Array) {
  const dim = x.length;
  const y = Float32Array.from(x);
  const codes = new Uint8Array(dim);
  const decoded = new Float32Array(dim);
  let loss = 0;
  for (let c = 0; c < dim; c++) {
    const code = midRiseCode(y[c]!, scale, n);
    const value = f(scale * (code - (n - 1) / 2));
    const error = f(y[c]! - value);
    const weightedError = f(error * d[c]!);
    loss = f(loss + f(weightedError * weightedError));
    for (let j = c + 1; j < dim; j++) y[j] = f(y[j]! - f(error * F[c * dim + j]!));
    codes[c] = code;
    decoded[c] = value;
  }
  return { codes, scale, decoded, loss };
}

/** v_c = sum over j = 0, 1, ... of W_jc·x_j. */
function weighted(W: Float32Array, x: Float32Array): Float32Array {
  const dim = x.length;
  const v = new Float32Array(dim);
  for (let c = 0; c < dim; c++) {
    let sum = 0;
    for (let j = 0; j < dim; j++) sum = f(sum + f(W[j * dim + c]! * x[j]!));
    v[c] = sum;
  }
  return v;
}
