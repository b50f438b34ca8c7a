/** What a scheme showed in one window of a text, in a form that can be stored and put together with other windows. */
import { type Comparison } from './compare';
import { type ProtocolPlan } from './protocols';

/** Sums over the scored positions of one window; exact in JSON. */
export interface WindowRecord {
  readonly scheme: string;
  /** Index of the window in the text. */
  readonly window: number;
  readonly tokens: number;
  /** Nats. */
  readonly nll: number;
  readonly kld: number;
  /** Positions with the same most probable token. */
  readonly sameTop: number;
  /** Sum of squares of the change of the right token's probability. */
  readonly shiftSquares: number;
  /** The largest divergences in descending order: enough for the 99th percentile of all windows together. */
  readonly largestKlds: readonly number[];
  /** [tokens, nll, kld] of each eighth of the window. */
  readonly buckets: readonly (readonly [number, number, number])[];
  readonly bitsPerValue: number;
  /** Everything the cache held at the end of the window. */
  readonly cacheBytes: number;
  /** Through the model. */
  readonly tokensRun: number;
  readonly milliseconds: number;
}

/** Losses by position in the window. */
export interface PositionBucket {
  /** Positions from … to − 1. */
  readonly from: number;
  readonly to: number;
  /** Nats per token. */
  readonly nll: number;
  readonly kld: number;
}

export interface SchemePerplexity {
  readonly scheme: string;
  /** Mean −ln q(token), nats, and its exponential. */
  readonly nll: number;
  readonly perplexity: number;
  readonly bitsPerByte?: number;
  /** Minus that of the 16-bit cache. */
  readonly perplexityChange: number;
  /** Divergence from the 16-bit cache, Σ p ln(p / q) per position, nats: mean and 99th percentile. */
  readonly meanKld: number;
  readonly kld99: number;
  /** Share of positions with the same most probable token. */
  readonly topAgreement: number;
  /** Root mean square of the change of the right token's probability. */
  readonly rmsShift: number;
  /** Codes, scales and dense zero points per stored number, without 16-bit windows. */
  readonly bitsPerValue: number;
  /** Everything the cache holds at the end of a window, the largest of them, and the same per number. */
  readonly cacheBytes: number;
  readonly bitsPerValueInAll: number;
  /** Of all forward passes, logits included. */
  readonly tokensPerSecond: number;
  readonly buckets: readonly PositionBucket[];
}

const BUCKETS = 8;
const SHARE = 0.99;
/** Records serve runs over at least so many windows, so that a screening over one can be gone on with. */
const WINDOWS = 8;

/** How many of the largest divergences of each window decide the 99th percentile over `total` positions. */
export function tailOf(total: number): number {
  return total - Math.floor(SHARE * (total - 1));
}

export interface Observed {
  readonly scheme: string;
  readonly window: number;
  readonly bitsPerValue: number;
  readonly cacheBytes: number;
  readonly tokensRun: number;
  readonly milliseconds: number;
  readonly comparisons: readonly (Comparison & { readonly position: number })[];
}

/** `total`: positions that all windows will score. */
export function recordOf(
  { comparisons, ...rest }: Observed,
  { window }: ProtocolPlan,
  total: number,
): WindowRecord {
  const size = Math.ceil(window / BUCKETS);
  const buckets = Array.from({ length: BUCKETS }, (): [number, number, number] => [0, 0, 0]);
  let [nll, kld, sameTop, shiftSquares] = [0, 0, 0, 0];
  for (const one of comparisons) {
    nll += one.nll;
    kld += one.kld;
    sameTop += Number(one.sameTop);
    shiftSquares += one.shift ** 2;
    const bucket = buckets[Math.floor(one.position / size)]!;
    bucket[0]++;
    bucket[1] += one.nll;
    bucket[2] += one.kld;
  }
  const klds = comparisons.map((one) => one.kld).sort((a, b) => b - a);
  const largestKlds = klds.slice(0, tailOf(Math.max(total, WINDOWS * comparisons.length)));
  return { ...rest, tokens: comparisons.length, nll, kld, sameTop, shiftSquares, largestKlds, buckets };
}

/** Whether a record decides the percentile over `total` positions: it may come from a run over fewer windows. */
export function suffices({ tokens, largestKlds }: WindowRecord, total: number): boolean {
  return largestKlds.length >= Math.min(tokens, tailOf(total));
}

function total(records: readonly WindowRecord[], of: (record: WindowRecord) => number): number {
  return records.reduce((sum, record) => sum + of(record), 0);
}

/** The 99th percentile, linear between the two nearest ranks. */
function percentile(records: readonly WindowRecord[]): number {
  const count = total(records, ({ tokens }) => tokens);
  const largest = records.flatMap(({ largestKlds }) => largestKlds).sort((a, b) => b - a);
  const rank = SHARE * (count - 1);
  const below = Math.floor(rank);
  const at = (ascending: number) => largest[count - 1 - ascending]!;
  return at(below) + (rank - below) * (at(Math.min(below + 1, count - 1)) - at(below));
}

export interface Totals {
  readonly plan: ProtocolPlan;
  /** Mean loss over the 16-bit cache. */
  readonly base: number;
  /** Bytes of text that were scored. */
  readonly bytes: number | undefined;
  /** Numbers that a cache holds at the end of a window. */
  readonly numbers: number;
}

/** One scheme's windows together. */
export function summaryOf(
  records: readonly WindowRecord[],
  { plan, base, bytes, numbers }: Totals,
): SchemePerplexity {
  const tokens = total(records, (one) => one.tokens);
  const nll = total(records, (one) => one.nll) / tokens;
  const cacheBytes = Math.max(...records.map((one) => one.cacheBytes));
  const size = Math.ceil(plan.window / BUCKETS);
  const buckets = Array.from({ length: BUCKETS }, (_, i) => {
    const part = (which: 0 | 1 | 2) => total(records, (one) => one.buckets[i]![which]);
    const [from, to] = [i * size, Math.min((i + 1) * size, plan.window)];
    return { from, to, nll: part(1) / part(0), kld: part(2) / part(0) };
  }).filter((bucket) => !Number.isNaN(bucket.nll));
  return {
    scheme: records[0]!.scheme,
    nll,
    perplexity: Math.exp(nll),
    ...(bytes && { bitsPerByte: (nll * tokens) / Math.LN2 / bytes }),
    perplexityChange: Math.exp(nll) - Math.exp(base),
    meanKld: total(records, (one) => one.kld) / tokens,
    kld99: percentile(records),
    topAgreement: total(records, (one) => one.sameTop) / tokens,
    rmsShift: Math.sqrt(total(records, (one) => one.shiftSquares) / tokens),
    bitsPerValue: total(records, (one) => one.bitsPerValue) / records.length,
    cacheBytes,
    bitsPerValueInAll: (8 * cacheBytes) / numbers,
    tokensPerSecond:
      (1000 * total(records, (one) => one.tokensRun)) / total(records, (one) => one.milliseconds),
    buckets,
  };
}
