/**
 * What a scheme costs a model on a text: the loss of its predictions, and how far they move from those over a 16-bit cache.
 * All schemes go through the text in step with the 16-bit run, so that no distribution is ever stored or rounded.
 */
import { throwIfAborted, type AbortOptions } from '../abort';
import { KvCache } from '../cache';
import { invalid } from '../errors';
import { type Model } from '../model/runner';
import { schemes, type DescribedScheme, type Windows } from '../schemes';
import { type Sequence } from '../sequence';
import { checkInteger } from '../tensor';
import { compare, distributionOf, mean, quantile, type Comparison, type Distribution } from './compare';
import { windowsOf, type ProtocolPlan } from './protocols';

export interface Contender {
  /** Of its row. */
  readonly name: string;
  /** A scheme, or what makes one from the text of a window (calibration on the prompt). */
  readonly scheme:
    DescribedScheme | ((window: Int32Array, options: AbortOptions) => Promise<DescribedScheme>);
  /** Instead of the windows of all. */
  readonly windows?: Partial<Windows>;
}

export interface PerplexityOptions extends AbortOptions {
  readonly plan: ProtocolPlan;
  readonly contenders: readonly Contender[];
  /** Full windows to score at most. Default: all of the text. */
  readonly chunks?: number;
  readonly bos?: number | undefined;
  /** 16-bit windows of the caches. */
  readonly windows?: Partial<Windows>;
  /** Layers that are stored by another scheme, whatever the contender. */
  readonly layers?: ReadonlyMap<number, DescribedScheme>;
  /**
   * Tokens that go through the model together. Where the plan does not decode, they are also appended together: the
   * first queries of a chunk see keys that have already left the 16-bit window. Default 128 decoded, else 512.
   */
  readonly chunk?: number;
  /** Bytes of text that a token stands for; without it there are no bits per byte. */
  readonly byteLength?: (token: number) => number;
  /** After each window but the last: everything so far. */
  readonly onWindow?: (report: PerplexityReport) => void;
  /** `fraction` of everything, 0 … 1; what runs now. */
  readonly onProgress?: (fraction: number, scheme: string) => void;
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

export interface PerplexityReport {
  readonly windows: number;
  readonly tokensScored: number;
  readonly chunk: number;
  /** The 16-bit cache first. */
  readonly schemes: readonly SchemePerplexity[];
}

const BUCKETS = 8;
const LOGIT_BYTES = 2 ** 29;

/** What one scheme has shown so far. */
class Lane {
  readonly comparisons: (Comparison & { readonly position: number })[] = [];
  cacheBytes = 0;
  bitsPerValue = 0;
  tokens = 0;
  milliseconds = 0;

  constructor(readonly contender: Contender) {}

  get name(): string {
    return this.contender.name;
  }
}

/** A lane in the middle of a window. */
interface Run {
  readonly lane: Lane;
  readonly cache: KvCache;
  readonly sequence: Sequence;
}

/**
 * Scores windows of `tokens` (the whole text, BOS where the plan wants it at its beginning).
 * @throws ERR_INNERKV_INVALID_ARGUMENT when there is no full window, or a window exceeds the model's context.
 */
export async function perplexity(
  model: Model,
  tokens: Int32Array,
  options: PerplexityOptions,
): Promise<PerplexityReport> {
  const { plan, signal, onProgress, contenders } = options;
  const { contextLength, vocabulary } = model.config;
  if (plan.window > contextLength)
    throw invalid(`Windows of ${plan.window} tokens exceed the model's context of ${contextLength}.`);
  const windows = windowsOf(plan, tokens, options.bos, options.chunks);
  if (windows.length === 0)
    throw invalid(`The text has ${tokens.length} tokens: not one window of ${plan.window}.`);
  const fits = Math.max(16, Math.floor(LOGIT_BYTES / (12 * vocabulary)));
  const chunk = checkInteger(options.chunk ?? Math.min(fits, plan.decoded ? 128 : 512), 1, 65536, 'chunk');

  const reference = { name: 'fp16', scheme: schemes.fp16() };
  const lanes = [reference, ...contenders.filter(({ name }) => name !== reference.name)].map(
    (contender) => new Lane(contender),
  );
  let done = 0;
  const steps = windows.length * lanes.length * plan.window;
  for (const [index, window] of windows.entries()) {
    const runs: Run[] = [];
    try {
      for (const lane of lanes) runs.push(await start(model, lane, window, options));
      for (const piece of piecesOf(plan, chunk)) {
        let expected: readonly Distribution[] = [];
        for (const { lane, sequence } of runs) {
          throwIfAborted(signal);
          onProgress?.(done / steps, lane.name);
          const logits = await advance(model, lane, sequence, window, piece, options);
          if (piece.scored && lane === lanes[0]) expected = logits.map(distributionOf);
          if (piece.scored)
            logits.forEach((row, i) => {
              const position = piece.from + i + 1;
              lane.comparisons.push({ ...compare(expected[i]!, row, window[position]!), position });
            });
          done += piece.to - piece.from;
        }
      }
      for (const { lane, cache } of runs)
        lane.cacheBytes = Math.max(lane.cacheBytes, cache.stats().usedBytes);
    } finally {
      for (const { cache } of runs) cache.dispose();
    }
    if (index + 1 < windows.length)
      options.onWindow?.(reportOf(model, lanes, windows.slice(0, index + 1), options, chunk));
  }
  onProgress?.(1, '');
  return reportOf(model, lanes, windows, options, chunk);
}

function reportOf(
  model: Model,
  lanes: readonly Lane[],
  windows: readonly Int32Array[],
  { plan, byteLength }: PerplexityOptions,
  chunk: number,
): PerplexityReport {
  const { layers, kvHeads, headDim } = model.config;
  const numbers = 2 * layers * kvHeads * headDim * (plan.window - 1);
  const bytes = bytesScored(plan, windows, byteLength);
  const base = mean(lanes[0]!.comparisons.map(({ nll }) => nll));
  return {
    windows: windows.length,
    tokensScored: windows.length * (plan.window - plan.firstScored),
    chunk,
    schemes: lanes.map((lane) => summary(lane, { plan, base, bytes, numbers })),
  };
}

async function start(model: Model, lane: Lane, window: Int32Array, options: PerplexityOptions): Promise<Run> {
  const { layers, signal } = options;
  const { scheme: given, windows = options.windows } = lane.contender;
  const scheme = typeof given === 'function' ? await given(window, signal ? { signal } : {}) : given;
  const pure = lane.name === 'fp16';
  const chosen = (layer: number) => (pure ? undefined : layers?.get(layer)) ?? scheme;
  const shape = { ...model.cacheShape(), scheme: chosen, ...(windows && { windows }) };
  const { totalBytes, fp16Bytes } = KvCache.estimate({ ...shape, tokens: window.length });
  // Zero points of hybrid schemes depend on the data; a budget that is not used costs nothing.
  const memory = 2 * (totalBytes + fp16Bytes) + 2 ** 26;
  const cache = await model.createCache({ scheme: chosen, memory, ...(windows && { windows }) });
  lane.bitsPerValue = mean(
    cache.plan().map(({ keyBitsPerValue, valueBitsPerValue }) => (keyBitsPerValue + valueBitsPerValue) / 2),
  );
  return { lane, cache, sequence: cache.sequence() };
}

/** Tokens from … to − 1 of a window; their logits are of interest or not. */
interface Piece {
  readonly from: number;
  readonly to: number;
  readonly scored: boolean;
}

/** Everything but the last token, which predicts nothing that is known. */
function piecesOf({ window, firstScored }: ProtocolPlan, chunk: number): Piece[] {
  const part = (from: number, to: number, scored: boolean) =>
    Array.from({ length: Math.ceil((to - from) / chunk) }, (_, i) => ({
      from: from + i * chunk,
      to: Math.min(to, from + (i + 1) * chunk),
      scored,
    }));
  return [...part(0, firstScored - 1, false), ...part(firstScored - 1, window - 1, true)];
}

/** Appends one piece; rows of logits where it is scored. */
async function advance(
  model: Model,
  lane: Lane,
  sequence: Sequence,
  window: Int32Array,
  { from, to, scored }: Piece,
  { plan, signal }: PerplexityOptions,
): Promise<readonly Float32Array[]> {
  const started = performance.now();
  const logits = await model.forward(sequence, window.subarray(from, to), {
    activations: 'float32',
    logits: scored ? 'all' : 'none',
    chunk: to - from,
    ...(plan.decoded && { step: 1 }),
    ...(signal && { signal }),
  });
  lane.milliseconds += performance.now() - started;
  lane.tokens += to - from;
  const { vocabulary } = model.config;
  return Array.from({ length: logits.length / vocabulary }, (_, i) =>
    logits.subarray(i * vocabulary, (i + 1) * vocabulary),
  );
}

function bytesScored(
  { firstScored }: ProtocolPlan,
  windows: readonly Int32Array[],
  byteLength: PerplexityOptions['byteLength'],
): number | undefined {
  if (!byteLength) return undefined;
  let bytes = 0;
  for (const window of windows) for (const token of window.subarray(firstScored)) bytes += byteLength(token);
  return bytes;
}

interface Totals {
  readonly plan: ProtocolPlan;
  /** Mean loss over the 16-bit cache. */
  readonly base: number;
  readonly bytes: number | undefined;
  readonly numbers: number;
}

function summary(lane: Lane, { plan, base, bytes, numbers }: Totals): SchemePerplexity {
  const { comparisons } = lane;
  const nll = mean(comparisons.map((one) => one.nll));
  const klds = comparisons.map((one) => one.kld);
  const size = Math.ceil(plan.window / BUCKETS);
  const buckets = Array.from({ length: BUCKETS }, (_, i) => {
    const [from, to] = [i * size, Math.min((i + 1) * size, plan.window)];
    const inside = comparisons.filter(({ position }) => position >= from && position < to);
    return { from, to, nll: mean(inside.map((one) => one.nll)), kld: mean(inside.map((one) => one.kld)) };
  }).filter((bucket) => !Number.isNaN(bucket.nll));
  return {
    scheme: lane.name,
    nll,
    perplexity: Math.exp(nll),
    ...(bytes && { bitsPerByte: (nll * comparisons.length) / Math.LN2 / bytes }),
    perplexityChange: Math.exp(nll) - Math.exp(base),
    meanKld: mean(klds),
    kld99: quantile(klds, 0.99),
    topAgreement: mean(comparisons.map((one) => Number(one.sameTop))),
    rmsShift: Math.sqrt(mean(comparisons.map((one) => one.shift ** 2))),
    bitsPerValue: lane.bitsPerValue,
    cacheBytes: lane.cacheBytes,
    bitsPerValueInAll: (8 * lane.cacheBytes) / numbers,
    tokensPerSecond: (1000 * lane.tokens) / lane.milliseconds,
    buckets,
  };
}
