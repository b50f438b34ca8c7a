/**
 * The calibrated basis of one KV head from pre-RoPE moments, in float64.
 *
 * RoPE turns pair a of a vector, as the complex number z_a = x + iy, by e^{iuθ_a} at position u. With P_ab = E[z_a conj(z_b)]
 * and Q_ab = E[z_a z_b], averaging over u = 0 … L−1 multiplies P_ab by g(θ_a − θ_b) and Q_ab by g(θ_a + θ_b),
 * g(φ) = mean of e^{iuφ}, a geometric sum. Channels that do not rotate are complex numbers of frequency 0 and no imaginary part.
 * Source: design notes of the calibrated scheme (half whitening, query-aware feedback); matrices of docs/format.md section 6.
 */
import { multiply, trace, transpose, upperFactorOfInverse, type Matrix } from './linear';
import { applyRope, hadamard64, pairChannels, type Rope } from './transform';

/** Moments before RoPE of one KV head; queries over all its query heads. Matrices [headDim * headDim], not centred. */
export interface Moments {
  /** E[k], [headDim]. */
  readonly keyMean: Float64Array;
  /** E[k kᵀ]. */
  readonly keySecond: Matrix;
  /** E[q qᵀ]. */
  readonly querySecond: Matrix;
}

export interface BasisOptions {
  readonly rope: Rope;
  /** B, tokens that share one rotation: keys are averaged over u = 0 … B−1. */
  readonly blockTokens: number;
  /** L, the model's context: queries are averaged over u = 0 … L−1. */
  readonly contextTokens: number;
}

/** Everything derived, float64; vectors [headDim], matrices [headDim * headDim]. */
export interface Basis {
  /** E[k_rel]. */
  readonly mu: Float64Array;
  /** lam_c = (S_cc + 0.02·mean(S_cc))^(1/4), S = central second moment of k_rel. */
  readonly lam: Float64Array;
  /** Channels by descending W_cc, ties to the lower one: the order of rounding. Everything below is in this order. */
  readonly order: readonly number[];
  /** M', the query moment in the basis, plus 0.01·tr(M')/D·I. */
  readonly W: Matrix;
  /** Upper, W^-1 = Uᵀ·U. */
  readonly U: Matrix;
  /** 1/U_cc. */
  readonly d: Float64Array;
  /** U_cj/U_cc for j > c, 0 elsewhere. */
  readonly F: Matrix;
}

/** What quantisation and attention use: the same, each number rounded once. */
export interface Basis32 {
  readonly mu: Float32Array;
  readonly lam: Float32Array;
  readonly order: readonly number[];
  readonly W: Float32Array;
  readonly d: Float32Array;
  readonly F: Float32Array;
}

interface Complex {
  re: number;
  im: number;
}

/** (1/count)·Σ e^{iuφ} over u = 0 … count−1. */
export function meanPhase(phi: number, count: number): Complex {
  const half = Math.sin(phi / 2);
  if (half === 0) return { re: 1, im: 0 };
  const length = Math.sin((count * phi) / 2) / (count * half);
  const angle = ((count - 1) * phi) / 2;
  return { re: length * Math.cos(angle), im: length * Math.sin(angle) };
}

/** Channels as complex numbers: [real, imaginary or undefined, frequency]. */
function complexChannels(
  headDim: number,
  rope: Rope,
): { re: number; im: number | undefined; theta: number }[] {
  const pairs = Array.from({ length: rope.rotaryDims / 2 }, (_, i) => {
    const [re, im] = pairChannels(i, rope);
    return { re, im, theta: rope.theta[i]! };
  });
  const rest = Array.from({ length: headDim - rope.rotaryDims }, (_, i) => ({
    re: rope.rotaryDims + i,
    im: undefined,
    theta: 0,
  }));
  return [...pairs, ...rest];
}

function times(a: Complex, b: Complex): Complex {
  return { re: a.re * b.re - a.im * b.im, im: a.re * b.im + a.im * b.re };
}

/** E over u of R(u)·m. */
export function averageMean(mean: Float64Array, rope: Rope, count: number): Float64Array {
  const out = new Float64Array(mean.length);
  for (const { re, im, theta } of complexChannels(mean.length, rope)) {
    const z = times({ re: mean[re]!, im: im === undefined ? 0 : mean[im]! }, meanPhase(theta, count));
    out[re] = z.re;
    if (im !== undefined) out[im] = z.im;
  }
  return out;
}

/** E over u of R(u)·C·R(u)ᵀ, C symmetric [headDim * headDim]. */
export function averageSecond(second: Matrix, headDim: number, rope: Rope, count: number): Matrix {
  const out = new Float64Array(headDim * headDim);
  const channels = complexChannels(headDim, rope);
  const at = (i: number | undefined, j: number | undefined) =>
    i === undefined || j === undefined ? 0 : second[i * headDim + j]!;
  const set = (i: number | undefined, j: number | undefined, value: number) => {
    if (i !== undefined && j !== undefined) out[i * headDim + j] = value;
  };
  for (const a of channels)
    for (const b of channels) {
      const xx = at(a.re, b.re);
      const yy = at(a.im, b.im);
      const yx = at(a.im, b.re);
      const xy = at(a.re, b.im);
      const P = times({ re: xx + yy, im: yx - xy }, meanPhase(a.theta - b.theta, count));
      const Q = times({ re: xx - yy, im: yx + xy }, meanPhase(a.theta + b.theta, count));
      set(a.re, b.re, (P.re + Q.re) / 2);
      set(a.im, b.im, (P.re - Q.re) / 2);
      set(a.im, b.re, (Q.im + P.im) / 2);
      set(a.re, b.im, (Q.im - P.im) / 2);
    }
  return out;
}

/** The two averages by rotating at every position; the slow check of the closed forms. */
export function bruteForceAverages(
  mean: Float64Array,
  second: Matrix,
  rope: Rope,
  count: number,
): { mean: Float64Array; second: Matrix } {
  const n = mean.length;
  const meanSum = new Float64Array(n);
  const secondSum = new Float64Array(n * n);
  for (let u = 0; u < count; u++) {
    // Columns of R(u) are rotated unit vectors; R·C·Rᵀ rotates the rows of (C·Rᵀ).
    applyRope(mean, u, rope).forEach((value, c) => (meanSum[c]! += value / count));
    const half = new Float64Array(n * n); // row i = R(u)·(row i of C), that is C·Rᵀ
    for (let i = 0; i < n; i++) half.set(applyRope(second.subarray(i * n, i * n + n), u, rope), i * n);
    const columns = transpose(half, n);
    for (let j = 0; j < n; j++)
      applyRope(columns.subarray(j * n, j * n + n), u, rope).forEach((value, i) => {
        secondSum[i * n + j]! += value / count;
      });
  }
  return { mean: meanSum, second: secondSum };
}

/** mu, lam and the feedback matrices of one KV head. */
export function deriveBasis(moments: Moments, { rope, blockTokens, contextTokens }: BasisOptions): Basis {
  const n = moments.keyMean.length;
  const mu = averageMean(moments.keyMean, rope, blockTokens);
  const second = averageSecond(moments.keySecond, n, rope, blockTokens);
  const variance = mu.map((mean, c) => second[c * n + c]! - mean * mean);
  const ridge = (0.02 * variance.reduce((sum, v) => sum + v, 0)) / n;
  const lam = variance.map((v) => (v + ridge) ** 0.25);

  const metric = queryMetric(averageSecond(moments.querySecond, n, rope, contextTokens), lam);
  const order = Array.from(lam, (_, c) => c).sort((a, b) => metric[b * n + b]! - metric[a * n + a]! || a - b);
  const W = metric.map((_, i) => metric[order[Math.floor(i / n)]! * n + order[i % n]!]!);
  const U = upperFactorOfInverse(W, n);
  const d = lam.map((_, c) => 1 / U[c * n + c]!);
  const F = U.map((value, i) => (i % n > Math.floor(i / n) ? value * d[Math.floor(i / n)]! : 0));
  return { mu, lam, order, W, U, d, F };
}

/** H·Λ·M·Λ·Hᵀ + 0.01·tr/D·I. */
function queryMetric(M: Matrix, lam: Float64Array): Matrix {
  const n = lam.length;
  const scaled = M.map((value, i) => value * lam[Math.floor(i / n)]! * lam[i % n]!);
  const H = new Float64Array(n * n);
  for (let i = 0; i < n; i++) H.set(hadamard64(Float64Array.from(lam, (_, j) => Number(i === j))), i * n);
  const rotated = multiply(multiply(H, scaled, n), transpose(H, n), n);
  const ridge = (0.01 * trace(rotated, n)) / n;
  return rotated.map((value, i) => value + (i % (n + 1) === 0 ? ridge : 0));
}

export function roundBasis({ mu, lam, order, W, d, F }: Basis): Basis32 {
  return {
    mu: Float32Array.from(mu),
    lam: Float32Array.from(lam),
    order,
    W: Float32Array.from(W),
    d: Float32Array.from(d),
    F: Float32Array.from(F),
  };
}

/** Moments of sampled pre-RoPE vectors (each [headDim]). */
export function sampleMoments(
  keys: readonly ArrayLike<number>[],
  queries: readonly ArrayLike<number>[],
): Moments {
  return { keyMean: meanOf(keys), keySecond: secondOf(keys), querySecond: secondOf(queries) };
}

function meanOf(vectors: readonly ArrayLike<number>[]): Float64Array {
  const mean = new Float64Array(vectors[0]!.length);
  for (const vector of vectors) for (let c = 0; c < mean.length; c++) mean[c]! += vector[c]! / vectors.length;
  return mean;
}

function secondOf(vectors: readonly ArrayLike<number>[]): Matrix {
  const n = vectors[0]!.length;
  const second = new Float64Array(n * n);
  for (const vector of vectors)
    for (let i = 0; i < n; i++)
      for (let j = 0; j < n; j++) second[i * n + j]! += (vector[i]! * vector[j]!) / vectors.length;
  return second;
}
