/** One sequence of a cache: append, attend, fork, truncate, single tokens, save. */
import { randomUUID } from 'node:crypto';
import { rename, rm, writeFile } from 'node:fs/promises';
import { abortable, throwIfAborted, type AbortOptions } from './abort';
import {
  type NativeAppendItem,
  type NativeAttendItem,
  type NativeSequence,
  type NativeWriter,
} from './binding';
import { type KvCache } from './cache';
import { checkInput, checkTarget, keep, type TensorInput, type TensorOutput } from './device-tensor';
import { invalid } from './errors';
import { Lifetime, Owned } from './lifetime';
import { checkInteger, checkOutput, type DtypeOptions } from './tensor';

export interface AppendOptions extends DtypeOptions, AbortOptions {}

export interface AttendOptions<Out extends TensorOutput = TensorOutput> extends DtypeOptions, AbortOptions {
  /** [qTokens, queryHeads, headDim]; a Float32Array is made when absent. A tensor holds anything after a failure. */
  readonly out?: Out;
  /** [qTokens, queryHeads], natural log-sum-exp of the scaled logits. */
  readonly lse?: TensorOutput;
  /** [qTokens, queryHeads, tokens], scaled and capped logits, -Infinity where masked. */
  readonly logits?: Float32Array;
  /**
   * [kvHeads, tokens], how much attention each token got: probabilities summed over the query tokens and the query heads of a KV
   * head (H2O, arXiv 2306.14048, section 4). 0 where masked or removed.
   */
  readonly mass?: Float32Array;
  /** Query i is token length − qTokens + i and sees nothing later. Default true; false: every query sees every token. */
  readonly causal?: boolean;
}

/** How one layer of a sequence is stored. Token positions [sink, sink + keysQuantised) have quantised keys. */
export interface LayerState {
  readonly tokens: number;
  readonly sink: number;
  readonly keysQuantised: number;
  readonly valuesQuantised: number;
  /** Tokens removed by hand, summed over heads. */
  readonly removed: number;
  /** Pages over all heads. */
  readonly pages: number;
}

/** Made by KvCache.sequence(), fork() and load(). After a failed call it is as it was before. */
export class Sequence extends Owned<NativeSequence> {
  /** @internal */
  readonly life: Lifetime<NativeSequence>;

  /** @internal */
  constructor(
    readonly cache: KvCache,
    native: NativeSequence,
  ) {
    super();
    this.life = new Lifetime(this, 'sequence', native, cache.life);
  }

  /** Tokens appended to a layer. */
  length(layer = 0): number {
    return this.life.use().length(layer);
  }

  layerState(layer = 0): LayerState {
    return this.life.use().layerState(layer);
  }

  /**
   * Appends tokens to one layer. k, v: [tokens, kvHeads, headDim], keys after RoPE. They are stored as binary16 in the
   * windows and quantised when they leave them.
   * @throws ERR_INNERKV_NOT_FINITE for NaN, infinity or a magnitude above 65504; ERR_INNERKV_OUT_OF_MEMORY.
   */
  async append(layer: number, k: TensorInput, v: TensorInput, options: AppendOptions = {}): Promise<void> {
    const item = this.appendItem(k, v, options);
    await keep(
      abortable(options.signal, (flag) => this.cache.life.use().appendBatch(false, flag, layer, [item])),
      [k, v],
    );
  }

  appendSync(layer: number, k: TensorInput, v: TensorInput, options: DtypeOptions = {}): void {
    const item = this.appendItem(k, v, options);
    void this.cache.life.use().appendBatch(true, undefined, layer, [item]);
  }

  /**
   * Attention of the newest qTokens tokens over everything appended. q: [qTokens, queryHeads, headDim] after RoPE, not
   * scaled. Returns [qTokens, queryHeads, headDim]: `out`, or a Float32Array.
   */
  async attend<Out extends TensorOutput = Float32Array>(
    layer: number,
    q: TensorInput,
    options: AttendOptions<Out> = {},
  ): Promise<Out> {
    const { item, out, uses } = this.attendItem(q, options);
    await keep(
      abortable(options.signal, (flag) =>
        this.cache.life.use().attendBatch(false, flag, layer, [item], options.causal ?? true),
      ),
      uses,
    );
    return out as Out;
  }

  attendSync<Out extends TensorOutput = Float32Array>(
    layer: number,
    q: TensorInput,
    options: AttendOptions<Out> = {},
  ): Out {
    throwIfAborted(options.signal);
    const { item, out } = this.attendItem(q, options);
    void this.cache.life.use().attendBatch(true, undefined, layer, [item], options.causal ?? true);
    return out as Out;
  }

  /** A copy that shares pages until one side writes. */
  async fork(options: AbortOptions = {}): Promise<Sequence> {
    return new Sequence(
      this.cache,
      await abortable(options.signal, (flag) => this.life.use().fork(false, flag)),
    );
  }

  forkSync(): Sequence {
    return new Sequence(this.cache, this.life.use().fork(true, undefined) as NativeSequence);
  }

  /** Keeps the first `tokens` tokens of every layer. */
  async truncate(tokens: number, options: AbortOptions = {}): Promise<void> {
    const kept = checkInteger(tokens, 0, 2 ** 30, 'tokens');
    await abortable(options.signal, (flag) => this.life.use().truncate(false, flag, kept));
  }

  truncateSync(tokens: number): void {
    void this.life.use().truncate(true, undefined, checkInteger(tokens, 0, 2 ** 30, 'tokens'));
  }

  /** Requantises one quantised token of all heads. k, v: [kvHeads, headDim]. Per-token schemes only. */
  async replace(
    layer: number,
    position: number,
    k: TensorInput,
    v: TensorInput,
    options: AppendOptions = {},
  ): Promise<void> {
    const input = this.oneToken(k, v, options);
    await keep(
      abortable(options.signal, (flag) =>
        this.life.use().replace(false, flag, layer, position, input.k, input.v, input.dtype),
      ),
      [k, v],
    );
  }

  replaceSync(
    layer: number,
    position: number,
    k: TensorInput,
    v: TensorInput,
    options: DtypeOptions = {},
  ): void {
    const input = this.oneToken(k, v, options);
    void this.life.use().replace(true, undefined, layer, position, input.k, input.v, input.dtype);
  }

  /** Forgets quantised tokens of one KV head, or of all. Pages with nothing left go back to the pool. Per-token schemes only. */
  async remove(
    layer: number,
    positions: Iterable<number>,
    options: AbortOptions & { readonly head?: number } = {},
  ): Promise<void> {
    const list = positionsOf(positions);
    await abortable(options.signal, (flag) =>
      this.life.use().remove(false, flag, layer, options.head ?? -1, list),
    );
  }

  removeSync(layer: number, positions: Iterable<number>, options: { readonly head?: number } = {}): void {
    void this.life.use().remove(true, undefined, layer, options.head ?? -1, positionsOf(positions));
  }

  /** What one head holds, decoded: k, v [tokens, headDim] in the space of the input; removed tokens are NaN. */
  async readBack(
    layer: number,
    head: number,
    options: AbortOptions = {},
  ): Promise<{ k: Float32Array; v: Float32Array }> {
    return abortable(options.signal, (flag) => this.life.use().readBack(false, flag, layer, head));
  }

  readBackSync(layer: number, head: number): { k: Float32Array; v: Float32Array } {
    return this.life.use().readBack(true, undefined, layer, head) as { k: Float32Array; v: Float32Array };
  }

  /** The bytes of one page (docs/format.md) and its compact zero points; null when all its tokens were removed. */
  pageBytes(
    layer: number,
    head: number,
    page: number,
  ): { bytes: Uint8Array; keyZeros: Uint16Array; valueZeros: Uint16Array } | null {
    return this.life.use().page(layer, head, page);
  }

  /** The saved form, piece by piece. The sequence may go on being used meanwhile. */
  async *chunks(options: AbortOptions = {}): AsyncGenerator<Uint8Array> {
    const writer: NativeWriter = await abortable(options.signal, (flag) =>
      this.life.use().writer(false, flag),
    );
    try {
      for (;;) {
        const piece = await abortable(options.signal, (flag) => writer.next(false, flag));
        if (piece === null || piece.length === 0) return;
        yield piece;
      }
    } finally {
      writer.dispose();
    }
  }

  /** Writes the sequence to a file, through a temporary one beside it. Errors of the file system are Node's own. */
  async save(path: string, options: AbortOptions = {}): Promise<void> {
    const temporary = `${path}.${randomUUID()}.partial`;
    try {
      await writeFile(temporary, this.chunks(options), { flag: 'wx' });
      await rename(temporary, path);
    } catch (error) {
      await rm(temporary, { force: true });
      throw error;
    }
  }

  /** The saved form in memory. */
  saveSync(): Uint8Array {
    const writer = this.life.use().writer(true, undefined) as NativeWriter;
    try {
      const pieces: Uint8Array[] = [];
      for (;;) {
        const piece = writer.next(true, undefined) as Uint8Array | null;
        if (piece === null || piece.length === 0) return Buffer.concat(pieces);
        pieces.push(piece);
      }
    } finally {
      writer.dispose();
    }
  }

  /** @internal `of`: ' of item 3' of a batch, for the text of errors. */
  appendItem(k: TensorInput, v: TensorInput, options: DtypeOptions, of = ''): NativeAppendItem {
    const { tokens: _, ...input } = this.keysAndValues(k, v, options, of);
    return { sequence: this.life.use(), ...input };
  }

  /** @internal */
  attendItem(
    q: TensorInput,
    options: AttendOptions,
    of = '',
  ): { item: NativeAttendItem; out: TensorOutput; uses: readonly unknown[] } {
    const { queryHeads, headDim } = this.cache.shape;
    const row = queryHeads * headDim;
    const checked = checkInput(q, row, `q${of}`, '[qTokens, queryHeads, headDim]', options);
    const rows = checked.tokens * queryHeads;
    const sequence = this.life.use();
    const out = options.out ?? new Float32Array(rows * headDim);
    const item = {
      sequence,
      q: checked.data,
      dtype: checked.dtype,
      out: checkTarget(out, rows * headDim, row, `out${of}`),
      lse: options.lse && checkTarget(options.lse, rows, queryHeads, `lse${of}`),
      // Their lengths are checked when the call runs: appends may be queued before it.
      logits: options.logits && checkOutput(options.logits, options.logits.length, `logits${of}`),
      mass: options.mass && checkOutput(options.mass, options.mass.length, `mass${of}`),
    };
    return { item, out, uses: [q, out, options.lse] };
  }

  private keysAndValues(k: TensorInput, v: TensorInput, options: DtypeOptions, of = '') {
    const { kvHeads, headDim } = this.cache.shape;
    const keys = checkInput(k, kvHeads * headDim, `k${of}`, '[tokens, kvHeads, headDim]', options);
    const values = checkInput(v, kvHeads * headDim, `v${of}`, '[tokens, kvHeads, headDim]', options);
    if (keys.tokens !== values.tokens)
      throw invalid(`k${of} holds ${keys.tokens} tokens and v${of} ${values.tokens}; they must be equal.`);
    if (keys.dtype !== values.dtype) throw invalid(`k${of} and v${of} must have the same dtype.`);
    return { k: keys.data, v: values.data, dtype: keys.dtype, tokens: keys.tokens };
  }

  private oneToken(k: TensorInput, v: TensorInput, options: DtypeOptions) {
    const input = this.keysAndValues(k, v, options);
    if (input.tokens !== 1) throw invalid(`replace() takes one token, not ${input.tokens}.`);
    return input;
  }
}

function positionsOf(positions: Iterable<number>): Int32Array {
  return Int32Array.from(Array.from(positions, (position) => checkInteger(position, 0, 2 ** 30, 'position')));
}
