/**
 * The calibrated basis of a KV head's keys, derived in float64 from moments taken before RoPE.
 *
 * RoPE turns pair a of a vector, read as the complex number z_a = x + iy, by e^{iuθ_a} at position u. With
 * P_ab = E[z_a conj(z_b)] and Q_ab = E[z_a z_b], the average over u = 0 … L−1 multiplies P_ab by g(θ_a − θ_b) and Q_ab by
 * g(θ_a + θ_b), where g(φ) = mean of e^{iuφ} is a geometric sum. So statistics after RoPE, at any context length, need no
 * text of that length. Channels that do not rotate are numbers of frequency 0 without imaginary part.
 */
import { CholeskyDecomposition, Matrix } from 'ml-matrix';
import { invalid, type KvError } from '../errors';
import { type HeadMoments } from './moments';
import { type FloatArray } from './safetensors';
import { ropeFrequencies, rotaryDims } from './rope';
import { type HeadBasis, type RopeOptions } from './types';

/** Added to the key variances, as a share of their mean, so that no channel is blown up. */
const VARIANCE_RIDGE = 0.02;
/** Added to the query moment, as a share of its mean diagonal, so that no error direction is free. */
const METRIC_RIDGE = 0.01;

/** How positions are averaged: which channels turn together, and how fast. */
export interface Rotation {
  /** First and second channel of each pair. */
  readonly re: Int32Array;
  readonly im: Int32Array;
  readonly theta: Float64Array;
}

export function rotationOf(rope: RopeOptions, headDim: number): Rotation {
  const theta = ropeFrequencies(rope, headDim);
  const half = rotaryDims(rope, headDim) / 2;
  const adjacent = rope.layout === 'adjacent';
  return {
    re: Int32Array.from(theta, (_, i) => (adjacent ? 2 * i : i)),
    im: Int32Array.from(theta, (_, i) => (adjacent ? 2 * i + 1 : i + half)),
    theta,
  };
}

/** (1/count) Σ e^{iuφ} over u = 0 … count − 1, as [real, imaginary]. */
export function meanPhase(phi: number, count: number): readonly [number, number] {
  const half = Math.sin(phi / 2);
  if (half === 0) return [1, 0];
  const length = Math.sin((count * phi) / 2) / (count * half);
  const angle = ((count - 1) * phi) / 2;
  return [length * Math.cos(angle), length * Math.sin(angle)];
}

/** Averages of means and second moments over the positions 0 … count − 1. */
export class PositionAverage {
  private readonly rest: readonly number[];
  /** g(θ_a), g(θ_a − θ_b), g(θ_a + θ_b), interleaved real and imaginary. */
  private readonly single: Float64Array;
  private readonly minus: Float64Array;
  private readonly plus: Float64Array;

  constructor(
    private readonly rotation: Rotation,
    private readonly headDim: number,
    count: number,
  ) {
    const { theta, re, im } = rotation;
    const rotating = new Set([...re, ...im]);
    this.rest = Array.from({ length: headDim }, (_, c) => c).filter((c) => !rotating.has(c));
    const table = (phases: Iterable<number>) =>
      Float64Array.from([...phases].flatMap((phi) => meanPhase(phi, count)));
    this.single = table(theta);
    this.minus = table([...theta].flatMap((a) => [...theta].map((b) => a - b)));
    this.plus = table([...theta].flatMap((a) => [...theta].map((b) => a + b)));
  }

  /** E over u of R(u) m. */
  mean(mean: FloatArray): Float64Array {
    const { re, im } = this.rotation;
    const out = Float64Array.from(mean);
    for (let a = 0; a < re.length; a++) {
      const [gr, gi] = [this.single[2 * a]!, this.single[2 * a + 1]!];
      const [x, y] = [mean[re[a]!]!, mean[im[a]!]!];
      out[re[a]!] = x * gr - y * gi;
      out[im[a]!] = x * gi + y * gr;
    }
    return out;
  }

  /** E over u of R(u) C R(u)ᵀ, C symmetric [headDim, headDim]. */
  second(moment: FloatArray): Float64Array {
    const n = this.headDim;
    const { re, im } = this.rotation;
    const pairs = re.length;
    const out = Float64Array.from(moment);
    for (let a = 0; a < pairs; a++) {
      const [ra, ia] = [re[a]! * n, im[a]! * n];
      for (let b = 0; b < pairs; b++) {
        const [rb, ib, g] = [re[b]!, im[b]!, 2 * (a * pairs + b)];
        const [xx, yy, xy, yx] = [moment[ra + rb]!, moment[ia + ib]!, moment[ra + ib]!, moment[ia + rb]!];
        const [mr, mi, pr, pi] = [this.minus[g]!, this.minus[g + 1]!, this.plus[g]!, this.plus[g + 1]!];
        const P = [(xx + yy) * mr - (yx - xy) * mi, (xx + yy) * mi + (yx - xy) * mr] as const;
        const Q = [(xx - yy) * pr - (yx + xy) * pi, (xx - yy) * pi + (yx + xy) * pr] as const;
        out[ra + rb] = (P[0] + Q[0]) / 2;
        out[ia + ib] = (P[0] - Q[0]) / 2;
        out[ia + rb] = (Q[1] + P[1]) / 2;
        out[ra + ib] = (Q[1] - P[1]) / 2;
      }
      for (const c of this.rest) {
        const [gr, gi] = [this.single[2 * a]!, this.single[2 * a + 1]!];
        const [x, y] = [moment[ra + c]!, moment[ia + c]!];
        out[ra + c] = out[c * n + re[a]!] = x * gr - y * gi;
        out[ia + c] = out[c * n + im[a]!] = x * gi + y * gr;
      }
    }
    return out;
  }
}

/** x ← H x for `count` elements at `offset`, `stride` apart; block-diagonal with the largest powers of two first. */
function hadamard(x: Float64Array, count: number, offset: number, stride: number): void {
  for (let done = 0; done < count;) {
    const n = 2 ** Math.floor(Math.log2(count - done));
    const at = (i: number) => offset + (done + i) * stride;
    for (let h = 1; h < n; h *= 2)
      for (let base = 0; base < n; base += 2 * h)
        for (let i = base; i < base + h; i++) {
          const [a, b] = [x[at(i)]!, x[at(i + h)]!];
          x[at(i)] = a + b;
          x[at(i + h)] = a - b;
        }
    for (let i = 0; i < n; i++) x[at(i)]! /= Math.sqrt(n);
    done += n;
  }
}

/** A basis before rounding, [D] and row-major [D, D]. */
export interface Basis64 {
  readonly mean: Float64Array;
  readonly lam: Float64Array;
  /** Channels by descending metric; `metric`, `feedback` and `pivot` are in this order. */
  readonly order: Uint8Array;
  readonly metric: Float64Array;
  readonly feedback: Float64Array;
  readonly pivot: Float64Array;
}

/** Steps of the transform; false leaves one out, and what follows is derived without it. */
export interface BasisSteps {
  readonly mean?: boolean;
  readonly lambda?: boolean;
  readonly rotation?: boolean;
}

/** `keys` averages over a block, `queries` over the model's context. */
export function deriveBasis64(
  moments: HeadMoments,
  { keys, queries }: { readonly keys: PositionAverage; readonly queries: PositionAverage },
  steps: BasisSteps = {},
): Basis64 {
  const n = moments.keyMean.length;
  const mean = steps.mean === false ? new Float64Array(n) : keys.mean(moments.keyMean);
  const second = keys.second(moments.keyMoment);
  const variance = mean.map((mu, c) => Math.max(0, second[c * (n + 1)]! - mu * mu));
  const ridge = (VARIANCE_RIDGE * variance.reduce((sum, v) => sum + v, 0)) / n;
  const lam = variance.map((v) => (v + ridge) ** (steps.lambda === false ? 0 : 0.25));
  if (!(Math.min(...lam) > 0)) throw unusable('The keys have no variance');

  const metric = queries.second(moments.queryMoment);
  for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) metric[i * n + j]! *= lam[i]! * lam[j]!;
  if (steps.rotation !== false) {
    for (let row = 0; row < n; row++) hadamard(metric, n, row * n, 1);
    for (let column = 0; column < n; column++) hadamard(metric, n, column, n);
  }
  let trace = 0;
  for (let i = 0; i < n; i++) {
    trace += metric[i * (n + 1)]!;
    for (let j = 0; j < i; j++)
      metric[i * n + j] = metric[j * n + i] = (metric[i * n + j]! + metric[j * n + i]!) / 2;
  }
  for (let i = 0; i < n; i++) metric[i * (n + 1)]! += (METRIC_RIDGE * trace) / n;

  // The channels that matter most are rounded first, while most others are left to make up for their errors.
  const order = Uint8Array.from(mean.keys()).sort(
    (a, b) => metric[b * (n + 1)]! - metric[a * (n + 1)]! || a - b,
  );
  const ordered = new Float64Array(n * n);
  for (let i = 0; i < n; i++)
    for (let j = 0; j < n; j++) ordered[i * n + j] = metric[order[i]! * n + order[j]!]!;
  return { mean, lam, order, metric: ordered, ...feedbackOf(ordered, n) };
}

/**
 * F and d of the metric W = R Rᵀ with R upper triangular, so U = R⁻¹ has W⁻¹ = Uᵀ U. Turned by 180 degrees, R is the lower
 * Cholesky factor of the equally turned W: no inverse of W is ever formed.
 */
function feedbackOf(metric: Float64Array, n: number): Pick<Basis64, 'feedback' | 'pivot'> {
  const turned = new Matrix(n, n);
  for (let i = 0; i < n; i++)
    for (let j = 0; j < n; j++) turned.set(i, j, metric[(n - 1 - i) * n + (n - 1 - j)]!);
  const cholesky = new CholeskyDecomposition(turned);
  if (!cholesky.isPositiveDefinite()) throw unusable('The query moment is not positive definite');
  const rows = cholesky.lowerTriangularMatrix.to2DArray();
  const R = (i: number, j: number) => rows[n - 1 - i]![n - 1 - j]!;

  const pivot = Float64Array.from({ length: n }, (_, c) => R(c, c));
  const feedback = new Float64Array(n * n);
  // Row c of F = R_cc U: solving f R = R_cc e_c from left to right, f_c = 1.
  const f = new Float64Array(n);
  for (let c = 0; c < n; c++) {
    f[c] = 1;
    for (let j = c + 1; j < n; j++) {
      let sum = 0;
      for (let i = c; i < j; i++) sum += f[i]! * R(i, j);
      feedback[c * n + j] = f[j] = -sum / pivot[j]!;
    }
  }
  return { feedback, pivot };
}

function unusable(problem: string): KvError {
  return invalid(`${problem}: these moments give no basis.`);
}

/** What a cache uses: every number of the derivation rounded once. docs/format.md section 6. */
export function roundBasis(basis: Basis64): HeadBasis {
  const round = (values: Float64Array) => {
    const rounded = Float32Array.from(values);
    if (!rounded.every(Number.isFinite)) throw unusable('A number of the basis exceeds float32');
    return rounded;
  };
  const lam = round(basis.lam);
  if (!lam.every((value) => value > 0)) throw unusable('A normalisation factor is too small for float32');
  return {
    mean: round(basis.mean),
    lam,
    order: basis.order,
    metric: round(basis.metric),
    feedback: round(basis.feedback),
    pivot: round(basis.pivot),
  };
}

/** Derives the bases of a model's heads; the tables of phases are made once. */
export function basisDeriver(options: {
  readonly rope: RopeOptions;
  readonly headDim: number;
  /** 0: keys keep their absolute rotation, and are averaged like queries. */
  readonly blockTokens: number;
  readonly context: number;
  readonly steps?: BasisSteps;
}): (moments: HeadMoments) => HeadBasis {
  const { rope, headDim, blockTokens, context, steps } = options;
  const rotation = rotationOf(rope, headDim);
  const averages = {
    keys: new PositionAverage(rotation, headDim, blockTokens || context),
    queries: new PositionAverage(rotation, headDim, context),
  };
  return (moments) => roundBasis(deriveBasis64(moments, averages, steps));
}
