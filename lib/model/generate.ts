/** Generating text: prefill, decode, sample, stream, stop; of one prompt or of many with one pass over the weights. */
import { throwIfAborted } from '../abort';
import { KvCache, type KvCacheOptions } from '../cache';
import { invalid } from '../errors';
import { schemes } from '../schemes';
import { type Sequence } from '../sequence';
import { checkInteger } from '../tensor';
import { isConversation, tokenizerOf, tokensOf, type Prompt } from './prompt';
import { type ForwardOptions, type Model } from './runner';
import { Sampler, samplerSettings, type SamplerOptions, type SamplerSettings } from './sampler';
import { StopFilter } from './stop';
import { type Tokenizer, type TokenStream } from './tokenizer';

export interface GenerateOptions
  extends SamplerOptions, Pick<ForwardOptions, 'activations' | 'chunk' | 'step' | 'signal'> {
  /** Default: schemes.preset(4). */
  readonly scheme?: KvCacheOptions['scheme'];
  readonly windows?: KvCacheOptions['windows'];
  /** Budget of the cache. Default: twice what the prompts and `maxTokens` take; it is taken from the machine as needed. */
  readonly memory?: KvCacheOptions['memory'];
  /** A cache of this model to work in, instead of one of its own with the three options above. */
  readonly cache?: KvCache;
  /** At most so many tokens per prompt. Default 256. */
  readonly maxTokens?: number;
  /** A text ends before the first of these. They may straddle tokens. */
  readonly stop?: string | readonly string[];
  /** Tokens that end a text. Default: the model's; [] for none. */
  readonly eos?: readonly number[];
  /** Called after every chunk of the prompts, with tokens of all of them. */
  readonly onPrefill?: (done: number, total: number) => void;
}

export interface GenerateOneOptions extends GenerateOptions {
  /**
   * A sequence to go on with, instead of a new one. It is not disposed, and holds afterwards the prompt and every
   * generated token but the last one.
   */
  readonly sequence?: Sequence;
}

export interface GeneratedToken {
  /** Which prompt. */
  readonly index: number;
  readonly id: number;
  /**
   * Text that is certain now: '' while a character is not complete or a stop string may have begun. The texts of all tokens
   * of a prompt, joined, are the whole text.
   */
  readonly text: string;
  /** Of computing it: of the prompt for its first token, then of the step, in which every prompt got one. */
  readonly seconds: number;
}

/** Why a text ended; `unfinished`: it did not. */
export type EndReason = 'eos' | 'stop' | 'maxTokens' | 'context' | 'unfinished';

export interface GeneratedText {
  readonly text: string;
  /** All generated tokens, with those of a stop string and the one that ended the text. */
  readonly ids: readonly number[];
  readonly reason: EndReason;
  /** The stop string, where one was found. */
  readonly stop?: string;
  readonly promptTokens: number;
  /** Seconds of each token, as in GeneratedToken. */
  readonly tokenSeconds: readonly number[];
}

export interface GenerationCost {
  /** Of the sampler; with it the same text can be had again. */
  readonly seed: number;
  readonly prefill: { readonly tokens: number; readonly seconds: number };
  /** Without the first token of each prompt, which the prefill gives. */
  readonly decode: { readonly tokens: number; readonly seconds: number };
  /** The most that all sequences of the cache held. */
  readonly cacheBytes: number;
  /** Stored bits per key or value by the scheme, mean of the layers, without 16-bit windows. */
  readonly bitsPerValue: number;
  /** Everything per key or value, when the cache held most; absent for a `cache` that was given. */
  readonly bitsPerValueInAll?: number;
}

export type GenerationSummary = GeneratedText & GenerationCost;
export type BatchSummary = GenerationCost & { readonly texts: readonly GeneratedText[] };

/**
 * Tokens as they are generated. Leaving the loop early, an error, and `await using` free what was held. Nothing is
 * computed before it is asked for.
 */
export class Generation<Summary> implements AsyncIterableIterator<GeneratedToken> {
  /** @internal */
  constructor(
    private readonly tokens: AsyncGenerator<GeneratedToken, void>,
    private readonly summarise: () => Summary,
  ) {}

  next(): Promise<IteratorResult<GeneratedToken, void>> {
    return this.tokens.next();
  }

  return(): Promise<IteratorResult<GeneratedToken, void>> {
    return this.tokens.return();
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.return();
  }

  /** Generates what is left, then tells texts and costs; after an early end, of what there was. */
  async finish(): Promise<Summary> {
    while (!(await this.next()).done);
    return this.summarise();
  }
}

/** Model.generate(). */
export function generate(
  model: Model,
  prompt: Prompt,
  options: GenerateOneOptions,
): Generation<GenerationSummary> {
  const run = new Run(model, [prompt], options, options.sequence);
  return new Generation(run.tokens(), () => ({ ...run.texts()[0]!, ...run.cost() }));
}

/** Model.generateBatch(). */
export function generateBatch(
  model: Model,
  prompts: readonly Prompt[],
  options: GenerateOptions,
): Generation<BatchSummary> {
  const run = new Run(model, prompts, options);
  return new Generation(run.tokens(), () => ({ texts: run.texts(), ...run.cost() }));
}

type Passes = Pick<ForwardOptions, 'activations' | 'step' | 'signal'> & { readonly chunk: number };

/** One call: its rows, its cache, its clock. */
class Run {
  private readonly rows: readonly Row[];
  private readonly settings: SamplerSettings;
  private readonly passes: Passes;
  private readonly prefill = { tokens: 0, seconds: 0 };
  private readonly decode = { tokens: 0, seconds: 0 };
  private held = { cacheBytes: 0, tokens: 0, bitsPerValue: 0 };

  constructor(
    private readonly model: Model,
    prompts: readonly Prompt[],
    private readonly options: GenerateOptions,
    private readonly given?: Sequence,
  ) {
    const { config, file } = model;
    if (!isList(prompts) || prompts.length === 0) throw invalid('There must be at least one prompt.');
    if (given && options.cache && given.cache !== options.cache)
      throw invalid('The sequence belongs to another cache.');
    this.settings = samplerSettings(options);
    const { activations, step, signal } = options;
    this.passes = {
      chunk: checkInteger(options.chunk ?? 512, 1, 65536, 'chunk'),
      ...(activations !== undefined && { activations }),
      ...(step !== undefined && { step }),
      ...(signal && { signal }),
    };
    const stops = typeof options.stop === 'string' ? [options.stop] : (options.stop ?? []);
    const isText = (prompt: Prompt) => typeof prompt === 'string' || isConversation(prompt);
    const tokenizer = tokenizerOf(file, stops.length > 0 || prompts.some(isText));
    const before = given?.length() ?? 0;
    const limits = {
      maxTokens: checkInteger(options.maxTokens ?? 256, 1, 2 ** 30, 'maxTokens'),
      contextLength: config.contextLength,
      eos: options.eos ?? config.eos,
    };
    this.rows = prompts.map((prompt, index) => {
      const tokens = tokensOf(file, tokenizer, prompt, before > 0).map((id) =>
        checkInteger(id, 0, config.vocabulary - 1, 'token'),
      );
      if (tokens.length === 0) throw invalid('A prompt needs at least one token.');
      if (before + tokens.length > config.contextLength)
        throw invalid(
          `${before + tokens.length} tokens of the prompt exceed the model's context of ${config.contextLength}.`,
          { contextLength: config.contextLength },
        );
      const sampler = new Sampler(this.settings, index);
      return new Row(index, tokens, sampler, new StopFilter(stops), limits, tokenizer, before > 0);
    });
  }

  async *tokens(): AsyncGenerator<GeneratedToken, void> {
    throwIfAborted(this.passes.signal);
    const cache = this.given?.cache ?? this.options.cache ?? (await this.ownCache());
    try {
      for (const row of this.rows) row.sequence = this.given ?? cache.sequence();
      const total = this.rows.reduce((sum, { promptTokens }) => sum + promptTokens, 0);
      for (const row of this.rows) {
        yield await this.prefillRow(row, cache, total);
        if (row.reason !== 'unfinished') this.release(row);
      }
      for (;;) {
        const active = this.rows.filter(({ reason }) => reason === 'unfinished');
        if (active.length === 0) return;
        for (const token of await this.step(active, cache)) yield token;
        for (const row of active) if (row.reason !== 'unfinished') this.release(row);
      }
    } finally {
      for (const row of this.rows) this.release(row);
      if (!this.given && !this.options.cache) cache.dispose();
    }
  }

  texts(): GeneratedText[] {
    return this.rows.map((row) => row.result());
  }

  cost(): GenerationCost {
    const { layers, kvHeads, headDim } = this.model.config;
    const { cacheBytes, tokens, bitsPerValue } = this.held;
    const own = !this.given && !this.options.cache && tokens > 0;
    return {
      seed: this.settings.seed,
      prefill: { ...this.prefill },
      decode: { ...this.decode },
      cacheBytes,
      bitsPerValue,
      ...(own && { bitsPerValueInAll: (8 * cacheBytes) / (2 * layers * kvHeads * headDim * tokens) }),
    };
  }

  /** In the pieces of a prompt alone, whatever the others: a scheme's results depend on where chunks end. */
  private async prefillRow(row: Row, cache: KvCache, total: number): Promise<GeneratedToken> {
    const { chunk } = this.passes;
    const { prompt } = row;
    let seconds = 0;
    for (let at = 0; ; at += chunk) {
      const last = at + chunk >= prompt.length;
      const start = performance.now();
      const piece = prompt.slice(at, at + chunk);
      const logits = await this.model.forward(row.sequence!, piece, {
        ...this.passes,
        logits: last ? 'last' : 'none',
      });
      const token = last ? row.take(logits) : undefined;
      const took = (performance.now() - start) / 1000;
      seconds += took;
      this.prefill.tokens += piece.length;
      this.prefill.seconds += took;
      this.measure(cache);
      this.options.onPrefill?.(this.prefill.tokens, total);
      if (token) return row.timed(token, seconds);
    }
  }

  /** One more token of every row. */
  private async step(active: readonly Row[], cache: KvCache): Promise<GeneratedToken[]> {
    const start = performance.now();
    const items = active.map((row) => ({ sequence: row.sequence!, tokens: [row.last] }));
    const logits = await this.model.forwardBatch(items, this.passes);
    const taken = active.map((row, i) => row.take(logits[i]!));
    const seconds = (performance.now() - start) / 1000;
    this.decode.tokens += active.length;
    this.decode.seconds += seconds;
    this.measure(cache);
    return taken.map((token, i) => active[i]!.timed(token, seconds));
  }

  private measure(cache: KvCache): void {
    const { usedBytes } = cache.stats();
    if (usedBytes < this.held.cacheBytes) return;
    const tokens = this.rows.reduce((sum, { sequence }) => sum + (sequence?.length() ?? 0), 0);
    const plan = cache.plan();
    const bits = plan.reduce((sum, layer) => sum + layer.keyBitsPerValue + layer.valueBitsPerValue, 0);
    this.held = { cacheBytes: usedBytes, tokens, bitsPerValue: bits / (2 * plan.length) };
  }

  private release(row: Row): void {
    if (!this.given) row.sequence?.dispose();
    row.sequence = undefined;
  }

  private async ownCache(): Promise<KvCache> {
    const { scheme = schemes.preset(4), windows, maxTokens = 256 } = this.options;
    const base = { ...this.model.cacheShape(), scheme, ...(windows && { windows }) };
    const prompt = Math.max(...this.rows.map(({ promptTokens }) => promptTokens));
    const tokens = Math.min(this.model.config.contextLength, prompt + maxTokens);
    const memory =
      this.options.memory ??
      2 * KvCache.estimate({ ...base, tokens, sequences: this.rows.length }).totalBytes + 2 ** 20;
    return this.model.createCache({ scheme, memory, ...(windows && { windows }) });
  }
}

interface Limits {
  readonly maxTokens: number;
  readonly contextLength: number;
  readonly eos: readonly number[];
}

/** One text that is being generated. */
class Row {
  /** While it is being generated. */
  sequence: Sequence | undefined;
  reason: EndReason = 'unfinished';
  private readonly ids: number[] = [];
  private readonly seconds: number[] = [];
  /** Prompt and text, for the sampler. */
  private readonly all: number[];
  private readonly stream: TokenStream | undefined;
  private text = '';

  constructor(
    private readonly index: number,
    readonly prompt: readonly number[],
    private readonly sampler: Sampler,
    private readonly filter: StopFilter,
    private readonly limits: Limits,
    private readonly tokenizer: Tokenizer | undefined,
    continues: boolean,
  ) {
    this.all = [...prompt];
    this.stream = tokenizer?.stream({ continues });
    // The prompt goes before: it may end in the middle of a character, and decides about a leading space.
    for (const id of prompt) this.decoded(id);
  }

  get promptTokens(): number {
    return this.prompt.length;
  }

  get last(): number {
    return this.all.at(-1)!;
  }

  /** Samples the next token. */
  take(logits: Float32Array): { id: number; text: string } {
    const id = this.sampler.next(logits, this.all);
    const { maxTokens, contextLength, eos } = this.limits;
    this.ids.push(id);
    this.all.push(id);
    const ends = eos.includes(id);
    let text = ends ? '' : this.filter.push(this.decoded(id));
    if (ends) this.reason = 'eos';
    else if (this.filter.stop !== undefined) this.reason = 'stop';
    else if (this.ids.length === maxTokens) this.reason = 'maxTokens';
    else if (this.sequence!.length() >= contextLength) this.reason = 'context';
    if (this.reason !== 'unfinished') text += this.filter.push(this.stream?.end() ?? '') + this.filter.end();
    this.text += text;
    return { id, text };
  }

  timed(token: { id: number; text: string }, seconds: number): GeneratedToken {
    this.seconds.push(seconds);
    return { index: this.index, ...token, seconds };
  }

  result(): GeneratedText {
    const { text, reason, promptTokens } = this;
    const { stop } = this.filter;
    const parts = { text, ids: [...this.ids], reason, promptTokens, tokenSeconds: [...this.seconds] };
    return stop === undefined ? parts : { ...parts, stop };
  }

  /** Embeddings may have more rows than the vocabulary has tokens. */
  private decoded(id: number): string {
    return this.stream && id < this.tokenizer!.size ? this.stream.push(id) : '';
  }
}

/** Callers in plain JavaScript may give a text. */
function isList(value: unknown): boolean {
  return Array.isArray(value);
}
