/** A cache: shape, scheme, memory budget, and the sequences in it. */
import { createReadStream } from 'node:fs';
import { abortable, throwIfAborted, type AbortOptions } from './abort';
import { type Backend } from './backend';
import {
  binding,
  type NativeCache,
  type NativeCacheOptions,
  type NativeEstimate,
  type NativeReader,
  type NativeSequence,
} from './binding';
import { keep, type TensorInput, type TensorOutput } from './device-tensor';
import { invalid } from './errors';
import { Lifetime, Owned } from './lifetime';
import { ropeFrequencies } from './schemes/rope';
import { type CacheShape, type LayerScheme, type Scheme, type Windows } from './schemes/types';
import { Sequence, type AttendOptions } from './sequence';
import { checkInteger, type DtypeOptions } from './tensor';

export interface KvCacheOptions extends CacheShape {
  /** One scheme for all layers, one per layer, or a function of the layer. */
  readonly scheme: Scheme | readonly Scheme[] | ((layer: number) => Scheme);
  /** Tokens kept in 16 bits at both ends. Default 32 and 96. */
  readonly windows?: Partial<Windows>;
  /** Budget in bytes, or '8GiB', '512MiB', …. Fixed for the cache's life. */
  readonly memory: number | string;
  /** Multiplies q·k. Default 1 / sqrt(headDim). */
  readonly softmaxScale?: number;
  /** cap · tanh(logit / cap); 0 or absent: none. */
  readonly softcap?: number;
  /** Sliding attention window in tokens, for all layers or per layer; 0: unlimited. */
  readonly slidingWindow?: number | readonly number[];
}

export interface CacheStats {
  readonly budgetBytes: number;
  /** Held by sequences. */
  readonly usedBytes: number;
  /** Taken from the machine. */
  readonly reservedBytes: number;
  readonly sequences: number;
  readonly backend: string;
  readonly isa: string;
}

/** How one layer is stored and read. */
export interface LayerPlan {
  readonly layer: number;
  readonly scheme: string;
  readonly keys: LayerScheme['k'];
  readonly values: LayerScheme['v'];
  readonly pageBytes: number;
  readonly windowBytes: number;
  readonly keyBitsPerValue: number;
  readonly valueBitsPerValue: number;
  /** The path attention takes: never chosen silently. */
  readonly kernel: string;
}

export interface CacheEstimate extends NativeEstimate {
  readonly totalBytes: number;
}

export interface BatchItem<Out extends TensorOutput = TensorOutput> extends Omit<
  AttendOptions<Out>,
  'causal' | 'signal'
> {
  readonly sequence: Sequence;
  readonly q: TensorInput;
}

/** New tokens of one sequence of a batch. */
export interface AppendItem extends DtypeOptions {
  readonly sequence: Sequence;
  /** [tokens, kvHeads, headDim], keys after RoPE. Items may differ in tokens, and in what their numbers are. */
  readonly k: TensorInput;
  readonly v: TensorInput;
}

/** Keys and values of a model's layers in few bits. Create with KvCache.create(). */
export class KvCache extends Owned<NativeCache> {
  /** @internal */
  readonly life: Lifetime<NativeCache>;

  private constructor(
    readonly backend: Backend,
    readonly shape: CacheShape,
    private readonly names: readonly string[],
    private readonly layers: readonly LayerScheme[],
    native: NativeCache,
  ) {
    super();
    this.life = new Lifetime(this, 'cache', native, backend.life);
  }

  /** @throws ERR_INNERKV_INVALID_ARGUMENT or ERR_INNERKV_UNSUPPORTED before anything is allocated. */
  static async create(backend: Backend, options: KvCacheOptions): Promise<KvCache> {
    return Promise.resolve(KvCache.createSync(backend, options));
  }

  static createSync(backend: Backend, options: KvCacheOptions): KvCache {
    const { native, names, layers } = resolve(options, parseBytes(options.memory));
    const Native = binding().Cache;
    return new KvCache(backend, shapeOf(options), names, layers, new Native(backend.life.use(), native));
  }

  /** Bytes by part of `sequences` sequences of `tokens` tokens. Nothing is allocated. */
  static estimate(
    options: Omit<KvCacheOptions, 'memory'> & { readonly tokens: number; readonly sequences?: number },
  ): CacheEstimate {
    const sequences = checkInteger(options.sequences ?? 1, 0, 2 ** 30, 'sequences');
    const parts = binding().estimate(
      resolve(options, 0).native,
      checkInteger(options.tokens, 0, 2 ** 30, 'tokens'),
      sequences,
    );
    const { windowBytes, codeBytes, scaleBytes, zeroBytes, outlierBytes, paddingBytes } = parts;
    const totalBytes = windowBytes + codeBytes + scaleBytes + zeroBytes + outlierBytes + paddingBytes;
    return { ...parts, totalBytes };
  }

  sequence(): Sequence {
    return new Sequence(this, this.life.use().sequence());
  }

  stats(): CacheStats {
    const { budget, used, reserved } = this.life.use().stats();
    const { kind, isa } = this.backend.info;
    return {
      budgetBytes: budget,
      usedBytes: used,
      reservedBytes: reserved,
      sequences: this.life.childCount,
      backend: kind,
      isa,
    };
  }

  plan(): LayerPlan[] {
    const native = this.life.use().plan();
    return native.map((plan, layer) => {
      const { k, v } = this.layers[layer]!;
      return {
        layer,
        scheme: this.names[layer]!,
        keys: k,
        values: v,
        pageBytes: plan.pageBytes,
        windowBytes: plan.windowBytes,
        keyBitsPerValue: plan.keyBitsPerValue,
        valueBitsPerValue: plan.valueBitsPerValue,
        kernel: `${this.backend.info.kind}/${this.backend.info.isa}: ${plan.path}`,
      };
    });
  }

  /**
   * Appends tokens to one layer of several sequences in one native call, with the bits of as many calls of
   * Sequence.append(). All of it is done or, when it fails, nothing.
   * @throws ERR_INNERKV_INVALID_ARGUMENT, also for a sequence that two items name; ERR_INNERKV_NOT_FINITE for NaN,
   *   infinity or a magnitude above 65504; ERR_INNERKV_OUT_OF_MEMORY.
   */
  async appendBatch(layer: number, items: readonly AppendItem[], options: AbortOptions = {}): Promise<void> {
    const native = this.appendItems(items);
    await keep(
      abortable(options.signal, (flag) => this.life.use().appendBatch(false, flag, layer, native)),
      items.flatMap(({ k, v }) => [k, v]),
    );
  }

  appendBatchSync(layer: number, items: readonly AppendItem[]): void {
    void this.life.use().appendBatch(true, undefined, layer, this.appendItems(items));
  }

  /** One layer of several sequences in one native call. Returns the outputs in the order of the items. */
  async attendBatch<Out extends TensorOutput = Float32Array>(
    layer: number,
    items: readonly BatchItem<Out>[],
    options: AbortOptions & { readonly causal?: boolean } = {},
  ): Promise<Out[]> {
    const batch = this.attendItems(items);
    const native = batch.map(({ item }) => item);
    await keep(
      abortable(options.signal, (flag) =>
        this.life.use().attendBatch(false, flag, layer, native, options.causal ?? true),
      ),
      batch.flatMap(({ uses }) => uses),
    );
    return batch.map(({ out }) => out as Out);
  }

  attendBatchSync<Out extends TensorOutput = Float32Array>(
    layer: number,
    items: readonly BatchItem<Out>[],
    options: { readonly causal?: boolean } = {},
  ): Out[] {
    const batch = this.attendItems(items);
    const native = batch.map(({ item }) => item);
    void this.life.use().attendBatch(true, undefined, layer, native, options.causal ?? true);
    return batch.map(({ out }) => out as Out);
  }

  /**
   * Reads what Sequence.save() wrote: a path, or the bytes in pieces of any size.
   * @throws ERR_INNERKV_CORRUPT, ERR_INNERKV_BASIS_MISMATCH, ERR_INNERKV_INVALID_ARGUMENT (a file of another cache),
   *   ERR_INNERKV_OUT_OF_MEMORY; nothing has changed then.
   */
  async load(
    source: string | AsyncIterable<Uint8Array> | Iterable<Uint8Array>,
    options: AbortOptions = {},
  ): Promise<Sequence> {
    throwIfAborted(options.signal);
    const reader: NativeReader = this.life.use().reader();
    try {
      const pieces =
        typeof source === 'string' ? (createReadStream(source) as AsyncIterable<Uint8Array>) : source;
      for await (const piece of pieces)
        await abortable(options.signal, (flag) => reader.feed(false, flag, piece));
      return new Sequence(this, await abortable(options.signal, (flag) => reader.finish(false, flag)));
    } finally {
      reader.dispose();
    }
  }

  loadSync(bytes: Uint8Array): Sequence {
    const reader = this.life.use().reader();
    try {
      void reader.feed(true, undefined, bytes);
      return new Sequence(this, reader.finish(true, undefined) as NativeSequence);
    } finally {
      reader.dispose();
    }
  }

  private appendItems(items: readonly AppendItem[]) {
    return items.map(({ sequence, k, v, ...options }, i) => {
      if (sequence.cache !== this) throw invalid('appendBatch() got a sequence of another cache.');
      return sequence.appendItem(k, v, options, nameOf(i, items));
    });
  }

  private attendItems(items: readonly BatchItem[]) {
    return items.map(({ sequence, q, ...options }, i) => {
      if (sequence.cache !== this) throw invalid('attendBatch() got a sequence of another cache.');
      return sequence.attendItem(q, options, nameOf(i, items));
    });
  }
}

/** For the text of errors. */
function nameOf(i: number, items: readonly unknown[]): string {
  return items.length > 1 ? ` of item ${i}` : '';
}

function shapeOf({ layers, queryHeads, kvHeads, headDim, rope, model }: CacheShape): CacheShape {
  return { layers, queryHeads, kvHeads, headDim, ...(rope && { rope }), ...(model && { model }) };
}

/** '8GiB', '512 MiB', '1.5GB' or a number of bytes. */
export function parseBytes(memory: number | string): number {
  if (typeof memory === 'number') return checkInteger(memory, 0, Number.MAX_SAFE_INTEGER, 'memory');
  const match = /^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B\s*$/i.exec(memory);
  if (!match) throw invalid(`memory must be a number of bytes or a size such as '8GiB', not '${memory}'.`);
  const power = ' KMGT'.indexOf((match[2] ?? '').toUpperCase() || ' ');
  return Math.floor(Number(match[1]) * (match[3] ? 1024 : 1000) ** power);
}

function resolve(options: Omit<KvCacheOptions, 'memory'>, budget: number) {
  const shape = shapeOf(options);
  const layerCount = checkInteger(shape.layers, 1, 4096, 'layers');
  for (const field of ['queryHeads', 'kvHeads', 'headDim'] as const)
    checkInteger(shape[field], 1, 65536, field);
  const windows: Windows = {
    sink: checkInteger(options.windows?.sink ?? 32, 0, 65536, 'windows.sink'),
    recent: checkInteger(options.windows?.recent ?? 96, 0, 65536, 'windows.recent'),
  };
  const names: string[] = [];
  const layers = Array.from({ length: layerCount }, (_, layer) => {
    const { scheme } = options;
    const chosen = typeof scheme === 'function' ? scheme(layer) : 'layer' in scheme ? scheme : scheme[layer];
    if (chosen === undefined) throw invalid(`There is no scheme for layer ${layer}.`);
    names.push(chosen.name);
    return chosen.layer(layer, shape, windows);
  });
  const { slidingWindow = 0 } = options;
  const windowOfLayer =
    typeof slidingWindow === 'number' ? layers.map(() => slidingWindow) : [...slidingWindow];
  if (windowOfLayer.length !== layerCount) throw invalid(`slidingWindow needs ${layerCount} numbers.`);
  const distinct = [...new Set(layers)];
  const native: NativeCacheOptions = {
    layers: layerCount,
    queryHeads: shape.queryHeads,
    kvHeads: shape.kvHeads,
    headDim: shape.headDim,
    schemes: distinct,
    schemeOfLayer: layers.map((layer) => distinct.indexOf(layer)),
    windowOfLayer,
    theta: shape.rope && ropeFrequencies(shape.rope, shape.headDim),
    halfLayout: shape.rope?.layout !== 'adjacent',
    budget,
    softmaxScale: options.softmaxScale ?? 1 / Math.sqrt(shape.headDim),
    softcap: options.softcap ?? 0,
  };
  return { native, names, layers };
}
