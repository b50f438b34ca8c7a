/** From logits to the next token: greedy, or drawn from what temperature, top-k, top-p and min-p leave. */
import { invalid, KvError } from '../errors';
import { checkInteger } from '../tensor';

export interface SamplerOptions {
  /** Divides the logits; 0, the default, takes the likeliest token always. */
  readonly temperature?: number;
  /** Keeps the k likeliest tokens; 0, the default: all. */
  readonly topK?: number;
  /** Of these, keeps the likeliest that together reach this share of the probability. Default 1: all. */
  readonly topP?: number;
  /** Of these, keeps what has at least this fraction of the likeliest token's probability. Default 0: all. */
  readonly minP?: number;
  /**
   * Divides positive logits of recent tokens and multiplies negative ones (Keskar et al., 2019, "CTRL"). Default 1: none.
   */
  readonly repeatPenalty?: number;
  /** How many tokens are recent, those of the prompt included. Default 64. */
  readonly repeatWindow?: number;
  /** Equal seeds, prompts and options give equal texts. 0 … 2^53 − 1; default: a random one. */
  readonly seed?: number;
}

export type SamplerSettings = Required<SamplerOptions>;

/** All settings, checked. */
export function samplerSettings(options: SamplerOptions): SamplerSettings {
  const number = (name: keyof SamplerOptions, usual: number, low: number, high: number) => {
    const value: unknown = options[name] ?? usual;
    if (typeof value !== 'number' || !(value >= low && value <= high))
      throw invalid(`${name} must be a number from ${low} to ${high}, not ${String(value)}.`);
    return value;
  };
  const seed = options.seed ?? Math.floor(Math.random() * 2 ** 53);
  const repeatPenalty = number('repeatPenalty', 1, 0, 1e6);
  if (repeatPenalty === 0) throw invalid('repeatPenalty must not be 0.');
  return {
    temperature: number('temperature', 0, 0, 1e6),
    topK: checkInteger(options.topK ?? 0, 0, 2 ** 30, 'topK'),
    topP: number('topP', 1, 0, 1),
    minP: number('minP', 0, 0, 1),
    repeatPenalty,
    repeatWindow: checkInteger(options.repeatWindow ?? 64, 0, 2 ** 30, 'repeatWindow'),
    seed: checkInteger(seed, 0, Number.MAX_SAFE_INTEGER, 'seed'),
  };
}

/**
 * Uniform numbers from a seed: sfc32 by Chris Doty-Humphrey (PractRand). Streams of one seed are independent sequences.
 */
export class Random {
  private a: number;
  private b: number;
  private c: number;
  private counter = 1;

  constructor(seed: number, stream = 0) {
    this.a = seed | 0;
    this.b = Math.floor(seed / 2 ** 32) | 0;
    this.c = stream | 0;
    for (let i = 0; i < 16; i++) this.bits32();
  }

  /** An integer in [0, 2^32). */
  bits32(): number {
    const sum = (this.a + this.b + this.counter) | 0;
    this.counter = (this.counter + 1) | 0;
    this.a = this.b ^ (this.b >>> 9);
    this.b = (this.c + (this.c << 3)) | 0;
    this.c = (((this.c << 21) | (this.c >>> 11)) + sum) | 0;
    return sum >>> 0;
  }

  /** A number in [0, 1), of 53 bits. */
  uniform(): number {
    return ((this.bits32() >>> 5) * 2 ** 26 + (this.bits32() >>> 6)) / 2 ** 53;
  }
}

/** The largest logit, of equal ones the first. Throws for NaN and infinity: a draw from them would mean nothing. */
export function greedy(logits: Float32Array): number {
  let best = -1;
  let largest = -Infinity;
  for (let id = 0; id < logits.length; id++) {
    const logit = logits[id]!;
    if (logit > largest) {
      largest = logit;
      best = id;
    } else if (Number.isNaN(logit)) return notFinite(id, logit);
  }
  return largest === Infinity || best < 0 ? notFinite(best, largest) : best;
}

function notFinite(token: number, value: number): never {
  throw new KvError('ERR_INNERKV_NOT_FINITE', `The model's logits are not finite numbers (${value}).`, {
    details: { tensor: 'logits', token, value },
  });
}

/** `logits` with those of `recent` tokens brought down, each once; a copy unless nothing changes. */
export function penalised(logits: Float32Array, recent: Iterable<number>, penalty: number): Float32Array {
  if (penalty === 1) return logits;
  const out = logits.slice();
  for (const id of new Set(recent)) out[id] = out[id]! > 0 ? out[id]! / penalty : out[id]! * penalty;
  return out;
}

/** Tokens that may be drawn and their weights, which need not sum to 1. */
export interface Candidates {
  readonly ids: Int32Array;
  readonly weights: Float64Array;
}

export type Cuts = Pick<SamplerSettings, 'temperature' | 'topK' | 'topP' | 'minP'>;

/**
 * What temperature (above 0), then top-k, top-p of the rest, and min-p leave: the likeliest first, of equals the lower id;
 * in the order of ids where nothing can be cut.
 */
export function candidates(logits: Float32Array, { temperature, topK, topP, minP }: Cuts): Candidates {
  const largest = logits[greedy(logits)]!;
  const weights = new Float64Array(logits.length);
  for (let id = 0; id < weights.length; id++) weights[id] = Math.exp((logits[id]! - largest) / temperature);
  if ((topK === 0 || topK >= weights.length) && topP === 1 && minP === 0)
    return { ids: indices(weights.length), weights };

  const heap = new Heap(weights);
  const ids: number[] = [];
  const most = topK === 0 ? weights.length : Math.min(topK, weights.length);
  // Without top-k the share of top-p is one of everything, so that few tokens need to be brought into order.
  let sum = topK === 0 ? total(weights) : Infinity;
  if (topK !== 0) {
    while (ids.length < most) ids.push(heap.pop());
    sum = ids.reduce((a, id) => a + weights[id]!, 0);
  }
  let kept = 0;
  let reached = 0;
  while (kept < most && (kept === 0 || reached < topP * sum || topP === 1)) {
    const id = ids[kept] ?? heap.pop();
    if (weights[id]! < minP) break; // the likeliest token's weight is 1
    ids[kept++] = id;
    reached += weights[id]!;
  }
  ids.length = kept;
  return { ids: Int32Array.from(ids), weights: Float64Array.from(ids, (id) => weights[id]!) };
}

// Plain loops: iterators and callbacks take ten times as long, and a vocabulary has 10^5 tokens.
function indices(count: number): Int32Array {
  const out = new Int32Array(count);
  for (let i = 0; i < count; i++) out[i] = i;
  return out;
}

function total(weights: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < weights.length; i++) sum += weights[i]!;
  return sum;
}

/** The candidate at the share `uniform`, from [0, 1), of the weights. */
export function draw({ ids, weights }: Candidates, uniform: number): number {
  let left = uniform * total(weights);
  let last = 0;
  for (let i = 0; i < ids.length; i++) {
    if (weights[i] === 0) continue;
    last = i;
    left -= weights[i]!;
    if (left < 0) break;
  }
  return ids[last]!;
}

/** Ids by falling weight, of equals the lower one first; only those that are asked for are brought into order. */
class Heap {
  private readonly ids: Int32Array;
  private size: number;

  constructor(private readonly weights: Float64Array) {
    this.ids = indices(weights.length);
    this.size = weights.length;
    for (let at = (this.size >> 1) - 1; at >= 0; at--) this.sink(at);
  }

  pop(): number {
    const top = this.ids[0]!;
    this.ids[0] = this.ids[--this.size]!;
    this.sink(0);
    return top;
  }

  private sink(start: number): void {
    const { ids, size } = this;
    let at = start;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= size) return;
      if (child + 1 < size && this.before(ids[child + 1]!, ids[child]!)) child++;
      if (this.before(ids[at]!, ids[child]!)) return;
      [ids[at], ids[child]] = [ids[child]!, ids[at]!];
      at = child;
    }
  }

  private before(a: number, b: number): boolean {
    const difference = this.weights[a]! - this.weights[b]!;
    return difference > 0 || (difference === 0 && a < b);
  }
}

/** One text's sampler: its settings, its numbers, its recent tokens. */
export class Sampler {
  private readonly random: Random;

  /** `stream` tells texts of one seed apart. */
  constructor(
    readonly settings: SamplerSettings,
    stream = 0,
  ) {
    this.random = new Random(settings.seed, stream);
  }

  /** The next token; `text`: all tokens so far. */
  next(logits: Float32Array, text: readonly number[]): number {
    const { temperature, repeatPenalty, repeatWindow } = this.settings;
    const recent = repeatPenalty === 1 || repeatWindow === 0 ? [] : text.slice(-repeatWindow);
    const shaped = penalised(logits, recent, repeatPenalty);
    return temperature === 0
      ? greedy(shaped)
      : draw(candidates(shaped, this.settings), this.random.uniform());
  }
}
