/** Native attention against the float64 reference: every number within its derived bound, or where it is not. */
import { type KvCache, type Sequence } from '../../lib';
import { attendHead, type AttentionOptions, type HeadAttention } from '../reference/attention';
import { type ReferenceHead } from '../reference/cache';
import { attentionTolerance, gamma, type AttentionTolerance } from '../reference/tolerance';
import { type Random } from './random';

/** Results of one attention call; every array lies inside a larger one, and what lies around must stay NaN. */
export interface NativeAttention {
  readonly queries: number;
  readonly queryHeads: number;
  readonly tokens: number;
  readonly q: Float32Array;
  readonly out: Float32Array;
  readonly lse: Float32Array;
  readonly logits: Float32Array;
  /** [heads of keys, tokens] */
  readonly mass: Float32Array;
}

const MARGIN = 24;

/** `count` numbers inside a larger buffer of NaN. */
export function inPoison(count: number): Float32Array {
  return new Float32Array(count + 2 * MARGIN).fill(NaN).subarray(MARGIN, MARGIN + count);
}

/** The same with contents. */
export function poisoned(values: Float32Array): Float32Array {
  const inside = inPoison(values.length);
  inside.set(values);
  return inside;
}

/** Whether the margins of an array made by inPoison() are as they were. */
export function marginsIntact(inside: Float32Array): boolean {
  const around = new Float32Array(inside.buffer);
  const end = MARGIN + inside.length;
  return (
    around.length === end + MARGIN && around.every((x, i) => (i >= MARGIN && i < end) || Number.isNaN(x))
  );
}

/** One call with all outputs; the outputs begin as NaN, so that what is not written shows. */
export function attend(
  sequence: Sequence,
  layer: number,
  q: Float32Array,
  { queryHeads, kvHeads, headDim }: KvCache['shape'],
  causal = true,
): NativeAttention {
  const queries = q.length / (queryHeads * headDim);
  const tokens = sequence.length(layer);
  const out = inPoison(q.length);
  const lse = inPoison(queries * queryHeads);
  const logits = inPoison(queries * queryHeads * tokens);
  const mass = inPoison(kvHeads * tokens);
  sequence.attendSync(layer, poisoned(q), { out, lse, logits, mass, causal });
  return { queries, queryHeads, tokens, q, out, lse, logits, mass };
}

/** One row of queries: its reference and bounds, to be compared with several native results. */
interface Row {
  readonly query: number;
  readonly head: number;
  readonly run: HeadAttention;
  readonly bound: AttentionTolerance;
}

export interface RowChoice extends AttentionOptions {
  readonly queries: number;
  readonly queryHeads: number;
  readonly causal?: boolean;
  /** Rows (query, query head) to compare; default all. */
  readonly most?: number;
  readonly random?: Random;
}

/** References of the chosen rows; `q` [queries, queryHeads, headDim]. */
export function referenceRows(
  q: Float32Array,
  heads: readonly ReferenceHead[],
  { queries, queryHeads, causal = true, most = Infinity, random, ...options }: RowChoice,
): Row[] {
  const dim = heads[0]!.scheme.headDim;
  const all = Array.from({ length: queries * queryHeads }, (_, row) => row);
  while (all.length > most) all.splice(random!.below(all.length), 1);
  // Where the GPU backend takes its kernel for many query rows.
  const many = queries > 8 && (queries * queryHeads) / heads.length > 64;
  const bounds = { ...options, halfOperands: process.env.INNERKV_BACKEND === 'cuda' && many };
  return all.map((row) => {
    const [query, queryHead] = [Math.floor(row / queryHeads), row % queryHeads];
    const head = heads[Math.floor((queryHead * heads.length) / queryHeads)]!;
    const position = causal ? head.length - queries + query : head.length - 1;
    const vector = q.subarray(row * dim, row * dim + dim);
    const run = attendHead(vector, head, position, options);
    return { query, head: queryHead, run, bound: attentionTolerance(vector, head, run, bounds) };
  });
}

/** Everything in which a native result leaves its bounds; empty when nothing does. */
export function attentionDifferences(native: NativeAttention, rows: readonly Row[]): string[] {
  const dim = native.q.length / (native.queries * native.queryHeads);
  const wrong: string[] = [];
  for (const array of ['out', 'lse', 'logits', 'mass'] as const) {
    if (!marginsIntact(native[array])) wrong.push(`${array}: written outside`);
  }
  for (const { query, head, run, bound } of rows) {
    const row = query * native.queryHeads + head;
    const at = `query ${query}, head ${head}`;
    const c = firstBeyond(run.out, bound.out, (i) => native.out[row * dim + i]!);
    if (c >= 0)
      wrong.push(`${at}, channel ${c}: ${native.out[row * dim + c]}, not ${run.out[c]} ± ${bound.out[c]}`);
    if (!near(native.lse[row]!, run.lse, bound.lse))
      wrong.push(`${at}: lse ${native.lse[row]}, not ${run.lse} ± ${bound.lse}`);
    wrong.push(...logitDifferences(native, row, run, bound).map((what) => `${at}, ${what}`));
  }
  if (rows.length === native.queries * native.queryHeads) wrong.push(...massDifferences(native, rows));
  return wrong;
}

/** Masses are sums of probabilities, added up in float32; only comparable with the references of all rows. */
function massDifferences({ mass, tokens, queryHeads }: NativeAttention, rows: readonly Row[]): string[] {
  const group = (queryHeads * tokens) / mass.length;
  const expected = new Float64Array(mass.length);
  const allowed = new Float64Array(mass.length);
  for (const { head, run, bound } of rows)
    run.tokens.forEach(({ position }, j) => {
      const at = Math.floor(head / group) * tokens + position;
      expected[at]! += run.probabilities[j]!;
      allowed[at]! += bound.probabilities[j]! + gamma(rows.length) * run.probabilities[j]!;
    });
  const i = firstBeyond(expected, allowed, (at) => mass[at]!);
  return i < 0
    ? []
    : [
        `mass ${i % tokens} of head ${Math.floor(i / tokens)}: ${mass[i]}, not ${expected[i]} ± ${allowed[i]}`,
      ];
}

function logitDifferences(
  { logits, tokens }: NativeAttention,
  row: number,
  run: HeadAttention,
  bound: AttentionTolerance,
): string[] {
  const expected = new Float64Array(tokens).fill(-Infinity);
  const allowed = new Float64Array(tokens);
  run.tokens.forEach(({ position }, j) => {
    expected[position] = run.logits[j]!;
    allowed[position] = bound.logits[j]!;
  });
  const t = firstBeyond(expected, allowed, (i) => logits[row * tokens + i]!);
  return t < 0
    ? []
    : [`logit of position ${t}: ${logits[row * tokens + t]}, not ${expected[t]} ± ${allowed[t]}`];
}

function firstBeyond(expected: Float64Array, bound: Float64Array, native: (i: number) => number): number {
  return expected.findIndex((value, i) => !near(native(i), value, bound[i]!));
}

function near(native: number, expected: number, bound: number): boolean {
  return native === expected || Math.abs(native - expected) <= bound;
}

/** Largest share of its bound that any output of these rows uses. */
export function widest(native: NativeAttention, rows: readonly Row[]): number {
  const dim = native.q.length / (native.queries * native.queryHeads);
  return Math.max(
    0,
    ...rows.flatMap(({ query, head, run, bound }) =>
      Array.from(run.out, (value, c) => {
        const error = Math.abs(native.out[(query * native.queryHeads + head) * dim + c]! - value);
        return error === 0 ? 0 : error / bound.out[c]!;
      }),
    ),
  );
}
