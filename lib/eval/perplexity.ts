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
import { compare, distributionOf, mean, type Comparison, type Distribution } from './compare';
import { windowsOf, type ProtocolPlan } from './protocols';
import { recordOf, suffices, summaryOf, type SchemePerplexity, type WindowRecord } from './records';

export interface Contender {
  /** Of its row. */
  readonly name: string;
  /** A scheme, or what makes one from the text of a window (calibration on the prompt). */
  readonly scheme:
    DescribedScheme | ((window: Int32Array, options: AbortOptions) => Promise<DescribedScheme>);
  /** Instead of the windows of all. */
  readonly windows?: Partial<Windows>;
  /** Layers that are stored by another scheme. */
  readonly layers?: ReadonlyMap<number, DescribedScheme>;
}

export interface PerplexityOptions extends AbortOptions {
  readonly plan: ProtocolPlan;
  readonly contenders: readonly Contender[];
  /** Full windows to score at most. Default: all of the text. */
  readonly chunks?: number;
  readonly bos?: number | undefined;
  /** 16-bit windows of the caches. */
  readonly windows?: Partial<Windows>;
  /** Layers that are stored by another scheme, whatever the contender, unless it has its own for them. */
  readonly layers?: ReadonlyMap<number, DescribedScheme>;
  /**
   * Tokens that go through the model together. Where the plan does not decode, they are also appended together: the
   * first queries of a chunk see keys that have already left the 16-bit window. Default 128 decoded, else 512.
   */
  readonly chunk?: number;
  /** Bytes of text that a token stands for; without it there are no bits per byte. */
  readonly byteLength?: (token: number) => number;
  /** Of an earlier run over the same text and plan with the same meaning of names: what is in them is not measured again. */
  readonly known?: readonly WindowRecord[];
  /** After each window but the last: everything so far. */
  readonly onWindow?: (report: PerplexityReport) => void;
  /** `fraction` of everything, 0 … 1; what runs now. */
  readonly onProgress?: (fraction: number, scheme: string) => void;
}

export interface PerplexityReport {
  readonly windows: number;
  readonly tokensScored: number;
  readonly chunk: number;
  /** The 16-bit cache first. */
  readonly schemes: readonly SchemePerplexity[];
  /** What the rows are made of, for `known`. */
  readonly records: readonly WindowRecord[];
}

const LOGIT_BYTES = 2 ** 29;

/** A scheme in the middle of a window. */
interface Run {
  readonly contender: Contender;
  readonly cache: KvCache;
  readonly sequence: Sequence;
  readonly bitsPerValue: number;
  readonly comparisons: (Comparison & { readonly position: number })[];
  tokensRun: number;
  milliseconds: number;
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

  const reference: Contender = { name: 'fp16', scheme: schemes.fp16() };
  const all = [reference, ...contenders.filter(({ name }) => name !== reference.name)];
  for (const layers of [options.layers, ...all.map((one) => one.layers)]) checkLayers(layers, model);
  const total = windows.length * (plan.window - plan.firstScored);
  const records = (options.known ?? []).filter((one) => suffices(one, total));
  const missing = windows.map((_, index) => {
    const lacks = ({ name }: Contender) =>
      !records.some((one) => one.window === index && one.scheme === name);
    // Who is compared is compared with a run of the 16-bit cache beside it.
    return all.some(lacks) ? all.filter((one) => one === reference || lacks(one)) : [];
  });
  let done = 0;
  const steps = plan.window * missing.reduce((sum, some) => sum + some.length, 0);
  for (const [index, window] of windows.entries()) {
    const runs: Run[] = [];
    try {
      for (const contender of missing[index]!) runs.push(await start(model, contender, window, options));
      for (const piece of runs.length === 0 ? [] : piecesOf(plan, chunk)) {
        let expected: readonly Distribution[] = [];
        for (const run of runs) {
          throwIfAborted(signal);
          onProgress?.(done / steps, run.contender.name);
          const logits = await advance(model, run, window, piece, options);
          if (piece.scored && run === runs[0]) expected = logits.map(distributionOf);
          if (piece.scored)
            logits.forEach((row, i) => {
              const position = piece.from + i + 1;
              run.comparisons.push({ ...compare(expected[i]!, row, window[position]!), position });
            });
          done += piece.to - piece.from;
        }
      }
      for (const { contender, cache, sequence: _, ...seen } of runs) {
        const cacheBytes = cache.stats().usedBytes;
        const record = recordOf({ scheme: contender.name, window: index, cacheBytes, ...seen }, plan, total);
        if (!records.some((one) => one.window === index && one.scheme === contender.name))
          records.push(record);
      }
    } finally {
      for (const { cache } of runs) cache.dispose();
    }
    if (runs.length > 0 && index + 1 < windows.length)
      options.onWindow?.(reportOf(model, all, records, windows.slice(0, index + 1), options, chunk));
  }
  onProgress?.(1, '');
  return reportOf(model, all, records, windows, options, chunk);
}

function checkLayers(layers: PerplexityOptions['layers'], { config }: Model): void {
  for (const layer of layers?.keys() ?? [])
    if (!(layer < config.layers))
      throw invalid(`There is no layer ${layer}: the model has ${config.layers}.`);
}

/** Rows of `all` over `windows`. Records of other schemes and windows are handed on. */
function reportOf(
  model: Model,
  all: readonly Contender[],
  records: readonly WindowRecord[],
  windows: readonly Int32Array[],
  { plan, byteLength }: PerplexityOptions,
  chunk: number,
): PerplexityReport {
  const { layers, kvHeads, headDim } = model.config;
  const numbers = 2 * layers * kvHeads * headDim * (plan.window - 1);
  const bytes = bytesScored(plan, windows, byteLength);
  const of = ({ name }: Contender) =>
    records
      .filter((one) => one.scheme === name && one.window < windows.length)
      .sort((a, b) => a.window - b.window);
  const base = of(all[0]!);
  const nll = base.reduce((sum, one) => sum + one.nll, 0) / base.reduce((sum, one) => sum + one.tokens, 0);
  return {
    windows: windows.length,
    tokensScored: windows.length * (plan.window - plan.firstScored),
    chunk,
    schemes: all.map((one) => summaryOf(of(one), { plan, base: nll, bytes, numbers })),
    records: [...records],
  };
}

/** The scheme of each layer: the contender's own exceptions, those of all, its scheme. The 16-bit run has no exceptions. */
export function layerSchemes(
  { name, layers }: Pick<Contender, 'name' | 'layers'>,
  scheme: DescribedScheme,
  ofAll: PerplexityOptions['layers'],
): (layer: number) => DescribedScheme {
  return (layer) => (name === 'fp16' ? undefined : (layers?.get(layer) ?? ofAll?.get(layer))) ?? scheme;
}

async function start(
  model: Model,
  contender: Contender,
  window: Int32Array,
  options: PerplexityOptions,
): Promise<Run> {
  const { layers, signal } = options;
  const { scheme: given, windows = options.windows } = contender;
  const made = typeof given === 'function' ? await given(window, signal ? { signal } : {}) : given;
  const scheme = layerSchemes(contender, made, layers);
  const shape = { ...model.cacheShape(), scheme, ...(windows && { windows }) };
  const { totalBytes, fp16Bytes } = KvCache.estimate({ ...shape, tokens: window.length });
  // Zero points of hybrid schemes depend on the data; a budget that is not used costs nothing.
  const memory = 2 * (totalBytes + fp16Bytes) + 2 ** 26;
  const cache = await model.createCache({ scheme, memory, ...(windows && { windows }) });
  const bitsPerValue = mean(
    cache.plan().map(({ keyBitsPerValue, valueBitsPerValue }) => (keyBitsPerValue + valueBitsPerValue) / 2),
  );
  const sequence = cache.sequence();
  return { contender, cache, sequence, bitsPerValue, comparisons: [], tokensRun: 0, milliseconds: 0 };
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
  run: Run,
  window: Int32Array,
  { from, to, scored }: Piece,
  { plan, signal }: PerplexityOptions,
): Promise<readonly Float32Array[]> {
  const started = performance.now();
  const logits = await model.forward(run.sequence, window.subarray(from, to), {
    activations: 'float32',
    logits: scored ? 'all' : 'none',
    chunk: to - from,
    ...(plan.decoded && { step: 1 }),
    ...(signal && { signal }),
  });
  run.milliseconds += performance.now() - started;
  run.tokensRun += to - from;
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
