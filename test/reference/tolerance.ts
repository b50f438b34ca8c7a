/**
 * How far native attention may be from the float64 reference over the same stored bits. The only float tolerances of the
 * tests; every number follows from the arithmetic below and the data of the reference run. Nothing is tuned.
 *
 * The native computation. u = 2^-24; gamma(k) = k·u/(1 − k·u) bounds k float32 roundings in a row (Higham, section 3.1).
 *   1. q' = H(lam·R(−P)q) in float32; then q̂ = round(q'/step)·step, step = max|q'|/32639, integers of 16 bits.
 *   2. logit = σ·(Σ_g s_g·Σ_c q̂_c·(code_c − offset) + Σ_g z_g·Σ_c q̂_c + R(−P)q·mu). The integer sums are exact; zero points and
 *      offsets meet the same q̂, so an error of q̂ multiplies x̂_c = s·(code_c − offset) + z.
 *   3. p = exp2 of the difference to a running maximum, float32, merged over pages and windows.
 *   4. Per page of 128 tokens, w_j = p_j·t_j (t the value scale of the token, or 1 when it belongs to the channel) becomes an
 *      integer of step max_page(w)/32639; w meets (code − offset) in exact integer sums. In modes with zero points, value
 *      groups of one token keep w for the bare code, while zero point and offset meet p in float32.
 *   The outliers of a token, a_c at channel c, meet q' itself and p_j: float32 products, added one after the other. A GPU may add the
 *      products p_j·a_c of a page as integers of step max_page(p)·max_page|a|/4194048 instead, with 8 float32 roundings on the way.
 *   5. Windows and 16-bit tensors: float32, or tensor cores on q and p in two binary16 parts: each is x = 2^e·(hi + lo) with an error of
 *      at most 2u·|x| + 2^−38·max|x| (lo may be subnormal), products are exact, and a sum grows by 16 products at a time, each cut off
 *      at no more than u times the largest of 17 numbers. Everything else: float32.
 *   6. Many query rows at once on a GPU (`halfOperands`): instead of 1 to 5, q and p are rounded to binary16 once (h = 2^−11), and so are
 *      stored keys and values that are not of 16 bits, after float32 arithmetic has brought them into the space of the input.
 *
 * Logit of token j, worst case:  |δ_j| <= σ·[ (step/2 + tiny)·Σ|x̂_c|                         rounding of q' (2)
 *     + gamma(20)·Σ q̄_c·|x̂_c|     float32 q': 2 softmax scale, 3 rotation, 1 lam, 8 butterflies, 2 factor, 4 step and quotient
 *     + gamma(12 + groups + o)·Σ (q̄_c + step)·(s·(code + offset) + |z|)      conversions, scales, sums over groups and o outliers
 *     + gamma(22 + o)·Σ q̄_c·|a_c|      q', the product, sums over outliers and with the dense score
 *     + gamma(D + 30 + o)·Σ |R||q|·|mu| ]    + u·(8·(|logit| + max|logit| + 1) + 4·parts)      exponent, exp2 (2 ulp), rescaling
 *   with q̄ = |H|·lam·|R||q|, magnitudes throughout; x̂ is what codes, scales and zero points decode to, without outliers. Window tokens: σ·[gamma(17D/16 + 10)·Σ|q_c||k_c| + 2^−37·max|q|·Σ|k_c|] instead of the first three lines.
 *   With halfOperands: σ·[((1 + h)² − 1)·Σ|q_c||k̂_c| + gamma(17D/16 + 65)·K + 2^−37·max|q|·Σ|k̂_c|], K = Σ q̄_c·(s·(code + offset) + |z| + |a_c|) + Σ |R||q|·|mu|,
 *   which bounds every intermediate of the dequantised key against q; h alone, and K = Σ|q_c||k_c|, for 16-bit keys.
 *   A softcap is 1-Lipschitz and adds its own 8u·cap.
 * Output: with p̂_j ∝ p_j·e^δ_j,  ô − o = Σ p_j(e^δ_j − 1)(v_j − o) / Σ p_j e^δ_j  because Σ p_j(v_j − o) = 0; hence, channel by channel,
 *   |ô − o| <= Σ p_j(e^|δ_j| − 1)|v_j − o| / Σ p_j e^−|δ_j|      (to first order at most 2·max δ·max|v − o|)
 *   + |H|·Σ_pages (step_w/2 + tiny)·Σ_j |level_j|    + gamma(156 + 2·parts + 17/16·16-bit values + outliers of a channel + 8)·(|o| + |H|·Σ p_j·v̄_j)      sums and normalisation,
 *   + |H|·Σ_pages step_a/2·(outliers of the channel),
 *   level = code − offset (code: see 4), or s·(code − offset) + z when the scale belongs to the channel; step_w from the largest p a native run
 *   may have, p·e^max|δ| / Σ p_j e^−|δ_j|; v̄ = s·(code + offset) + |z| + |a|. The normaliser is the float32 sum of p, not of w.
 *   With halfOperands ((1 + h)² − 1)·Σ p_j·|v_j| replaces the second term.
 * These are worst cases: every rounding at its limit and all of one sign. `typical` takes the two integer roundings as independent and
 * uniform (standard deviation step/√12), the same q̂ for all tokens added in full: what a correct kernel shows, for reports only.
 */
import { levelsOf, meetKey, type AttentionOptions, type HeadAttention } from './attention';
import { type CachedToken, type ReferenceHead } from './cache';
import { fromHalfBits } from './half';
import { hadamardBlocks, pairChannels } from './transform';
import { channelGroups, hasZeroPoints, PAGE_TOKENS, type TensorSpec } from './types';

const { abs, max } = Math;
const u = 2 ** -24;
/** Vectors without any element above this become zeros instead of integers. */
const TINY = 1e-30;
/** Largest integer of a 16-bit query or probability: 127·256 + 127. */
export const INTEGER_RANGE = 32639;

/** Largest integer that stands for a product of a probability and an outlier. */
const OUTLIER_UNITS = 4194048;

/** Relative error of a rounding to binary16, and of a product of two rounded numbers. */
const HALF = 2 ** -11;
const TWO_HALVES = (1 + HALF) ** 2 - 1;
/** Roundings a product meets in sums of tensor cores: 17 numbers are aligned for every 16 that are added. */
const TENSOR_CORE_SUM = 17 / 16;

export function gamma(k: number): number {
  return (k * u) / (1 - k * u);
}

export interface AttentionTolerance {
  /** [headDim] bound on |out − reference|. */
  readonly out: Float64Array;
  /** Bound on |lse − reference|, natural logarithm. */
  readonly lse: number;
  /** [visible tokens] bound on |probability − reference|. */
  readonly probabilities: Float64Array;
  /** [visible tokens] bound on |logit − reference|, scaled and capped. */
  readonly logits: Float64Array;
  /** [headDim] standard deviation to expect of `out`. */
  readonly typical: Float64Array;
}

/** Bounds for one query and head, from the reference's own run. */
export function attentionTolerance(
  q: ArrayLike<number>,
  head: ReferenceHead,
  run: HeadAttention,
  options: AttentionOptions & { readonly halfOperands?: boolean } = {},
): AttentionTolerance {
  const dim = head.scheme.headDim;
  const { tokens, probabilities: p, out } = run;
  const parts = numberOfParts(head, tokens);
  const largest = run.logits.reduce((a, b) => max(a, abs(b)), 0);
  const { scale = 1 / Math.sqrt(dim), softcap = 0, halfOperands = false } = options;

  const errors = tokens.map((token) =>
    halfOperands ? halfLogitError(q, head, token) : logitError(q, head, token),
  );
  const logits = Float64Array.from(errors, ({ worst }, j) => {
    const exponent = u * (8 * (abs(run.logits[j]!) + largest + 1) + 4 * parts);
    return abs(scale) * worst + 8 * u * softcap + exponent;
  });

  const growth = Array.from(logits, (delta, j) => p[j]! * Math.expm1(delta)).reduce((a, b) => a + b, 0);
  const least = Array.from(logits, (delta, j) => p[j]! * Math.exp(-delta)).reduce((a, b) => a + b, 0);
  const values = tokens.map((token) => head.value(token));
  const rounding = halfOperands ? halfRounding(values, p, dim) : weightRounding(head, run);
  const inflation = Math.exp(logits.reduce((a, b) => max(a, b), 0)) / (least || 1);
  const halves = tokens.filter(
    ({ value }) => value.kind === 'window' || head.scheme.value.bits === 16,
  ).length;
  const chain = gamma(
    PAGE_TOKENS + 2 * parts + TENSOR_CORE_SUM * halves + outlierRoundings(tokens, dim) + 28,
  );
  const magnitude = valueMagnitude(head, run);

  const bound = new Float64Array(dim);
  const typical = new Float64Array(dim);
  for (let c = 0; c < dim; c++) {
    let softmax = 0;
    let softmaxTypical = 0;
    values.forEach((value, j) => {
      const spread = p[j]! * abs(value[c]! - out[c]!);
      softmax += Math.expm1(logits[j]!) * spread;
      softmaxTypical += abs(scale) * errors[j]!.typical * spread;
    });
    bound[c] =
      softmax / (least || 1) + inflation * rounding.worst[c]! + chain * (abs(out[c]!) + magnitude[c]!);
    typical[c] = Math.hypot(softmaxTypical, rounding.typical[c]!);
  }
  return {
    out: bound,
    lse: max(Math.log1p(growth), -Math.log(least || 1)) + chain + u * abs(tokens.length ? run.lse : 0),
    probabilities: p.map((value, j) => (value * (Math.exp(logits[j]!) + chain)) / (least || 1) - value),
    logits,
    typical,
  };
}

/** Pieces that are merged: pages, and the window tokens as one more per 128. */
function numberOfParts(head: ReferenceHead, tokens: readonly CachedToken[]): number {
  return new Set(tokens.map(({ position }) => Math.floor(head.tokenIndex(position) / PAGE_TOKENS))).size + 2;
}

/** Roundings of the outliers that are added to one channel of the output, at most. */
function outlierRoundings(tokens: readonly CachedToken[], dim: number): number {
  const counts = new Uint32Array(dim);
  for (const { value } of tokens)
    if (value.kind === 'token') for (const { channel } of value.token.outliers ?? []) counts[channel]!++;
  const most = counts.reduce((a, b) => max(a, b), 0);
  return most > 0 ? most + 8 : 0;
}

/** Error of q·k̂ before the softmax scale, worst case and standard deviation. */
function logitError(
  q: ArrayLike<number>,
  head: ReferenceHead,
  token: CachedToken,
): { worst: number; typical: number } {
  const dim = q.length;
  const stored = head.storedKey(token);
  if (token.key.kind === 'window') {
    return { worst: halfProducts(stored, Float64Array.from(q, abs)), typical: 0 };
  }
  const { mu } = head.keySteps(token.position);
  const { relative, transformed } = queryMagnitudes(q, head, token);
  const { outliers = 0 } = head.scheme.key;
  const constant = mu
    ? gamma(dim + 30 + outliers) * relative.reduce((sum, value, c) => sum + value * abs(mu[c]!), 0)
    : 0;
  const transforming = (dense: Float64Array) =>
    gamma(20) * dense.reduce((sum, k, c) => sum + abs(k) * transformed[c]!, 0);
  if (head.scheme.key.bits === 16) {
    return { worst: constant + transforming(stored) + halfProducts(stored, transformed), typical: 0 };
  }

  const { query } = meetKey(q, head, token);
  const step = query.reduce((a, b) => max(a, abs(b)), 0) / INTEGER_RANGE;
  const levels = levelsOf(token.key, head.scheme.key, dim);
  const groups = channelGroups(dim, head.scheme.key.group).length;
  const dense = levels.code.map((code, c) => levels.scale[c]! * (code - levels.offset[c]!) + levels.zero[c]!);
  let rounded = 0;
  let scaling = 0;
  let added = 0;
  for (let c = 0; c < dim; c++) {
    rounded += (step / 2 + TINY) * abs(dense[c]!);
    scaling += (transformed[c]! + step) * denseMagnitude(levels, c);
    added += transformed[c]! * abs(levels.added[c]!);
  }
  const norm = Math.hypot(...dense);
  return {
    worst:
      rounded +
      transforming(dense) +
      gamma(12 + groups + outliers) * scaling +
      gamma(22 + outliers) * added +
      constant,
    typical: (step / Math.sqrt(12)) * norm,
  };
}

/** The same with every operand rounded to binary16. */
function halfLogitError(
  q: ArrayLike<number>,
  head: ReferenceHead,
  token: CachedToken,
): { worst: number; typical: number } {
  const key = head.key(token);
  const sizes = Float64Array.from(q, abs);
  const products = key.reduce((sum, k, c) => sum + abs(k) * sizes[c]!, 0);
  const typical = (HALF / Math.sqrt(3)) * Math.hypot(...key.map((k, c) => k * sizes[c]!));
  if (token.key.kind === 'window' || head.scheme.key.bits === 16)
    return { worst: HALF * products + halfProducts(key, sizes), typical };
  const { relative, transformed } = queryMagnitudes(q, head, token);
  const { mu } = head.keySteps(token.position);
  const levels = levelsOf(token.key, head.scheme.key, q.length);
  const magnitude =
    transformed.reduce((sum, x, c) => sum + x * levelMagnitude(levels, c), 0) +
    (mu ? relative.reduce((sum, x, c) => sum + x * abs(mu[c]!), 0) : 0);
  return {
    worst: TWO_HALVES * products + gamma(55) * magnitude + halfProducts(key, sizes),
    typical: Math.SQRT2 * typical,
  };
}

/** [headDim] error of weights and values that are rounded to binary16. */
function halfRounding(values: readonly Float64Array[], p: ArrayLike<number>, dim: number) {
  const worst = new Float64Array(dim);
  const variance = new Float64Array(dim);
  values.forEach((value, j) =>
    value.forEach((v, c) => {
      worst[c]! += TWO_HALVES * p[j]! * abs(v);
      variance[c]! += (2 / 3) * (HALF * p[j]! * v) ** 2;
    }),
  );
  return { worst, typical: variance.map(Math.sqrt) };
}

/** Error of a sum of products with a 16-bit key; `sizes` are the magnitudes of the query. */
function halfProducts(key: ArrayLike<number>, sizes: Float64Array): number {
  const keys = Array.from(key, abs);
  const products = keys.reduce((sum, k, c) => sum + k * sizes[c]!, 0);
  return (
    gamma(TENSOR_CORE_SUM * keys.length + 10) * products +
    2 ** -37 * sizes.reduce((a, b) => max(a, b), 0) * keys.reduce((a, b) => a + b, 0)
  );
}

/** Magnitudes that bound every intermediate of the transformed query: |R||q| and |H|·lam·|R||q|. */
function queryMagnitudes(q: ArrayLike<number>, head: ReferenceHead, token: CachedToken) {
  const { rotation, lam, hadamard } = head.keySteps(token.position);
  const relative = Float64Array.from(q, abs);
  if (rotation)
    for (let i = 0; i < rotation.rope.rotaryDims / 2; i++) {
      const angle = rotation.P * rotation.rope.theta[i]!;
      const [c, s] = [abs(Math.cos(angle)), abs(Math.sin(angle))];
      const [a, b] = pairChannels(i, rotation.rope);
      const [x, y] = [relative[a]!, relative[b]!];
      relative[a] = x * c + y * s;
      relative[b] = y * c + x * s;
    }
  const scaled = relative.map((value, c) => value * (lam ? abs(lam[c]!) : 1));
  return { relative, transformed: hadamard ? magnitudeHadamard(scaled) : scaled };
}

/** |H|·x for x >= 0: every element of a block becomes sum/sqrt(block). */
function magnitudeHadamard(x: Float64Array): Float64Array {
  const out = new Float64Array(x.length);
  let start = 0;
  for (const block of hadamardBlocks(x.length)) {
    const sum = x.subarray(start, start + block).reduce((a, b) => a + b, 0);
    out.fill(sum / Math.sqrt(block), start, start + block);
    start += block;
  }
  return out;
}

/** Root of the sum of squares over a block, divided by sqrt(block): H on independent errors. */
function independentHadamard(variance: Float64Array): Float64Array {
  const out = new Float64Array(variance.length);
  let start = 0;
  for (const block of hadamardBlocks(variance.length)) {
    const sum = variance.subarray(start, start + block).reduce((a, b) => a + b, 0);
    out.fill(Math.sqrt(sum / block), start, start + block);
    start += block;
  }
  return out;
}

function denseMagnitude({ scale, code, offset, zero }: ReturnType<typeof levelsOf>, c: number): number {
  return abs(scale[c]!) * (code[c]! + offset[c]!) + abs(zero[c]!);
}

function levelMagnitude(levels: ReturnType<typeof levelsOf>, c: number): number {
  return denseMagnitude(levels, c) + abs(levels.added[c]!);
}

/** True if a value scale belongs to the token and is folded into its probability. */
function foldsScale({ bits, group }: TensorSpec): boolean {
  return bits !== 16 && group !== 'tokens32';
}

/** Magnitude of the largest outlier of a page's values, tokens that a query does not see included. */
function largestOutlier(head: ReferenceHead, page: number): number {
  let largest = 0;
  for (const { position, value } of head.tokens)
    if (value.kind === 'token' && Math.floor(head.tokenIndex(position) / PAGE_TOKENS) === page)
      for (const { valueBits } of value.token.outliers ?? [])
        largest = max(largest, abs(fromHalfBits(valueBits)));
  return largest;
}

/** [headDim] error of the 16-bit weights of step 4 and of outliers summed as integers, in the model's space. */
function weightRounding(head: ReferenceHead, { tokens, probabilities }: HeadAttention) {
  const { headDim: dim, value: spec } = head.scheme;
  const worst = new Float64Array(dim);
  const variance = new Float64Array(dim);
  const pages = new Map<number, number[]>();
  tokens.forEach(({ position, value }, j) => {
    if (value.kind === 'window' || spec.bits === 16) return;
    const page = Math.floor(head.tokenIndex(position) / PAGE_TOKENS);
    pages.set(page, [...(pages.get(page) ?? []), j]);
  });
  for (const [page, members] of pages) {
    const levels = members.map((j) => levelsOf(tokens[j]!.value, spec, dim));
    for (let c = 0; c < dim; c++) {
      const weights = members.map(
        (j, i) => probabilities[j]! * (foldsScale(spec) ? abs(levels[i]!.scale[c]!) : 1),
      );
      const step = max(...weights) / INTEGER_RANGE;
      levels.forEach(({ scale, code, offset, zero }, i) => {
        const level = hasZeroPoints(spec.mode) ? code[c]! : abs(code[c]! - offset[c]!);
        const channel = abs(scale[c]! * (code[c]! - offset[c]!) + zero[c]!);
        const reach = foldsScale(spec) ? (weights[i] === 0 ? 0 : level) : channel;
        worst[c]! += (step / 2 + TINY) * reach;
        variance[c]! += (step * reach) ** 2 / 12;
      });
    }
    const largest = largestOutlier(head, page);
    if (largest === 0) continue;
    const step = (max(...members.map((j) => probabilities[j]!)) * largest) / OUTLIER_UNITS;
    for (const { added } of levels)
      added.forEach((a, c) => {
        if (a === 0) return;
        worst[c]! += step / 2;
        variance[c]! += step ** 2 / 12;
      });
  }
  return {
    worst: head.valuesRotate() ? magnitudeHadamard(worst) : worst,
    typical: head.valuesRotate() ? independentHadamard(variance) : variance.map(Math.sqrt),
  };
}

/** [headDim] Σ p_j·v̄_j, brought to the model's space with magnitudes. */
function valueMagnitude(head: ReferenceHead, { tokens, probabilities }: HeadAttention): Float64Array {
  const { headDim: dim, value: spec } = head.scheme;
  const window = new Float64Array(dim);
  const stored = new Float64Array(dim);
  tokens.forEach(({ value }, j) => {
    if (value.kind === 'window')
      value.bits.forEach((b, c) => (window[c]! += probabilities[j]! * abs(fromHalfBits(b))));
    else if (spec.bits === 16)
      head.storedValue(tokens[j]!).forEach((v, c) => (stored[c]! += probabilities[j]! * abs(v)));
    else {
      const levels = levelsOf(value, spec, dim);
      for (let c = 0; c < dim; c++) stored[c]! += probabilities[j]! * levelMagnitude(levels, c);
    }
  });
  const restored = head.valuesRotate() ? magnitudeHadamard(stored) : stored;
  return window.map((value, c) => value + restored[c]!);
}
