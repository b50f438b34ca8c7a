/**
 * Float64 attention over the cache model. Keys and values are brought back to the model's space, so that the query stays raw:
 * the plain definition, with none of the tricks of the kernels. Source: arXiv 1706.03762; softcap: Gemma 2.
 */
import { type CachedToken, type ReferenceHead } from './cache';
import { fromHalfBits } from './half';
import { groupDecoder } from './quantise';
import { applyRope, hadamard64 } from './transform';
import { channelGroups, type TensorSpec } from './types';

export interface AttentionOptions {
  /** Factor of q·k; default 1/sqrt(headDim). */
  readonly scale?: number;
  /** Logits become cap·tanh(logit/cap). */
  readonly softcap?: number;
  /** A query at position i sees positions j > i − slidingWindow. */
  readonly slidingWindow?: number;
}

/** One query over one head. Arrays over `tokens` are in the order of the visible tokens. */
export interface HeadAttention {
  /** [headDim]; zeros when nothing is visible. */
  readonly out: Float64Array;
  /** Natural logarithm of the sum of exp(logit); −Infinity when nothing is visible. */
  readonly lse: number;
  readonly tokens: readonly CachedToken[];
  /** Scaled and capped. */
  readonly logits: Float64Array;
  readonly probabilities: Float64Array;
}

/** The tokens that a query at `position` sees. */
export function visibleTokens(
  head: ReferenceHead,
  position: number,
  { slidingWindow = Infinity }: AttentionOptions = {},
): CachedToken[] {
  return head.tokens.filter(
    (token) => token.position <= position && token.position > position - slidingWindow,
  );
}

/** Attention of one raw (post-RoPE) query q [headDim] at `position`. */
export function attendHead(
  q: ArrayLike<number>,
  head: ReferenceHead,
  position: number,
  options: AttentionOptions = {},
): HeadAttention {
  const tokens = visibleTokens(head, position, options);
  const { scale = 1 / Math.sqrt(q.length), softcap } = options;
  const logits = Float64Array.from(tokens, (token) => {
    const logit = dot(q, head.key(token)) * scale;
    return softcap === undefined ? logit : softcap * Math.tanh(logit / softcap);
  });
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const weights = logits.map((logit) => Math.exp(logit - largest));
  const sum = weights.reduce((a, b) => a + b, 0);
  const probabilities = weights.map((weight) => weight / sum);

  const out = new Float64Array(head.scheme.headDim);
  tokens.forEach((token, j) => {
    head.value(token).forEach((value, c) => (out[c]! += probabilities[j]! * value));
  });
  return {
    out,
    lse: tokens.length === 0 ? -Infinity : largest + Math.log(sum),
    tokens,
    logits,
    probabilities,
  };
}

/** A layer: q [queries][queryHeads][headDim] flat; query i stands at position length − queries + i. */
export interface LayerAttention {
  /** [queries][queryHeads][headDim]. */
  readonly out: Float64Array;
  /** [queries][queryHeads]. */
  readonly lse: Float64Array;
  /** [queries * queryHeads] single results, for tolerances. */
  readonly heads: readonly HeadAttention[];
  /** [kvHeads]: position -> probability summed over queries and query heads of the KV head. */
  readonly mass: readonly ReadonlyMap<number, number>[];
}

/** Query head h reads KV head floor(h / (queryHeads / kvHeads)); causal within the `queries` newest tokens. */
export function attendLayer(
  q: ArrayLike<number>,
  heads: readonly ReferenceHead[],
  { queries, queryHeads, ...options }: AttentionOptions & { queries: number; queryHeads: number },
): LayerAttention {
  const headDim = heads[0]!.scheme.headDim;
  const ratio = queryHeads / heads.length;
  if (!Number.isInteger(ratio)) throw new Error(`${queryHeads} query heads over ${heads.length} KV heads`);
  if (q.length !== queries * queryHeads * headDim) throw new Error('query shape');
  const out = new Float64Array(q.length);
  const lse = new Float64Array(queries * queryHeads);
  const mass = heads.map(() => new Map<number, number>());
  const singles: HeadAttention[] = [];
  for (let i = 0; i < queries; i++)
    for (let h = 0; h < queryHeads; h++) {
      const kvHead = Math.floor(h / ratio);
      const head = heads[kvHead]!;
      const at = (i * queryHeads + h) * headDim;
      const query = Float64Array.from({ length: headDim }, (_, c) => q[at + c]!);
      const single = attendHead(query, head, head.length - queries + i, options);
      out.set(single.out, at);
      lse[i * queryHeads + h] = single.lse;
      single.tokens.forEach(({ position }, j) => {
        mass[kvHead]!.set(position, (mass[kvHead]!.get(position) ?? 0) + single.probabilities[j]!);
      });
      singles.push(single);
    }
  return { out, lse, heads: singles, mass };
}

/** The query in the space of the codes of one quantised token: q' = H(lam·R(−P)q), and the constant R(−P)q·mu. */
export function meetKey(
  q: ArrayLike<number>,
  head: ReferenceHead,
  token: CachedToken,
): { query: Float64Array; constant: number } {
  const { rotation, mu, lam, hadamard } = head.keySteps(token.position);
  const relative = rotation ? applyRope(q, -rotation.P, rotation.rope) : Float64Array.from(q);
  const scaled = relative.map((value, c) => value * (lam ? lam[c]! : 1));
  return { query: hadamard ? hadamard64(scaled) : scaled, constant: mu ? dot(relative, mu) : 0 };
}

/** How one stored tensor of a token decodes, channel by channel: value = scale·(code − offset) + zero + added. */
export interface Levels {
  readonly scale: Float64Array;
  readonly code: Float64Array;
  readonly offset: Float64Array;
  readonly zero: Float64Array;
  /** Of outliers; 0 elsewhere. */
  readonly added: Float64Array;
}

/** Scale, code, offset, zero and outlier of each channel of a quantised K or V of fewer than 16 bits. */
export function levelsOf(stored: CachedToken['key'], spec: TensorSpec, headDim: number): Levels {
  const levels: Levels = {
    scale: new Float64Array(headDim),
    code: new Float64Array(headDim),
    offset: new Float64Array(headDim),
    zero: new Float64Array(headDim),
    added: new Float64Array(headDim),
  };
  const put = (c: number, code: number, scaleBits: number, zeroBits: number | undefined) => {
    const { scale, offset, zero } = groupDecoder(scaleBits, zeroBits, spec);
    levels.scale[c] = scale;
    levels.code[c] = code;
    levels.offset[c] = offset;
    levels.zero[c] = zero;
  };
  if (stored.kind === 'window' || spec.bits === 16) throw new Error('16-bit values have no levels');
  if (stored.kind === 'block') {
    const { codes, scaleBits, zeroBits } = stored.block;
    scaleBits.forEach((scale, c) => {
      put(c, codes[stored.slot * headDim + c]!, scale, zeroBits[c]);
    });
    return levels;
  }
  const { codes, scaleBits, zeroBits } = stored.token;
  channelGroups(headDim, spec.group).forEach(({ start, end }, g) => {
    for (let c = start; c < end; c++) put(c, codes[c]!, scaleBits[g]!, zeroBits[g]);
  });
  for (const { channel, valueBits } of stored.token.outliers ?? [])
    levels.added[channel] = fromHalfBits(valueBits);
  return levels;
}

export function dot(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
}
