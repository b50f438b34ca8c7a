/** Running a model over a cache: its own matrices here, its attention in the cache's packed bits. */
import { abortable, throwIfAborted, type AbortOptions } from '../abort';
import { type Backend } from '../backend';
import {
  binding,
  type NativeForwardItem,
  type NativeForwardOptions,
  type NativeModel,
  type NativePassTimes,
} from '../binding';
import { KvCache, type KvCacheOptions } from '../cache';
import { invalid } from '../errors';
import { Lifetime, Owned } from '../lifetime';
import { ropeFrequencies, rotaryDims } from '../schemes/rope';
import { type ModelIdentity } from '../schemes/types';
import { type Sequence } from '../sequence';
import { checkInteger } from '../tensor';
import { fingerprint, openModel, type ModelConfig, type ModelFile } from './file';
import {
  generate,
  generateBatch,
  type BatchSummary,
  type GenerateOneOptions,
  type GenerateOptions,
  type Generation,
  type GenerationSummary,
} from './generate';
import { MomentsRecorder } from './moments';
import { type Prompt } from './prompt';

/**
 * `int8`: products with quantised weights round activations to 8 bits per 32 channels and use integer dot products, as
 * decoding engines do. `float32`: nothing but the weights is rounded, and a token's result does not depend on its neighbours.
 */
export type Activations = 'int8' | 'float32';

export interface ForwardOptions extends AbortOptions {
  /** Default: the model's. */
  readonly activations?: Activations;
  /** Tokens that go through the layers together, over all sequences. Default 512. */
  readonly chunk?: number;
  /**
   * Tokens of a sequence that a layer appends before it attends; default: the chunk. With 1, every query sees the cache as
   * it was when its token was the newest: the numbers of decoding token by token, at the speed of a prefill.
   */
  readonly step?: number;
  /** Collects statistics of keys and queries; see Model.moments(). */
  readonly observe?: MomentsRecorder;
}

export type Tokens = readonly number[] | Int32Array | Uint32Array;

export interface ForwardItem {
  readonly sequence: Sequence;
  /** At least one. */
  readonly tokens: Tokens;
  /** Which tokens' logits to return. Default 'last'. */
  readonly logits?: 'last' | 'all' | 'none';
}

export interface ScoreItem {
  readonly sequence: Sequence;
  readonly tokens: Tokens;
  /** What follows each token, −1 where nothing is scored. Default: the next token, and nothing after the last one. */
  readonly targets?: readonly number[] | Int32Array;
}

/** The part of a model's file that running it needs; texts need its tokenizer, and conversations its chat template. */
export type ModelWeights = Pick<ModelFile, 'config' | 'tensors'> &
  Partial<Pick<ModelFile, 'name' | 'tokenizer' | 'chat'>>;

export type ModelCacheOptions = Pick<KvCacheOptions, 'scheme' | 'windows' | 'memory'>;

export type PassTimes = NativePassTimes;

/** A model of the Llama family with its weights mapped into memory. Disposed with its backend. */
export class Model extends Owned<NativeModel> {
  /** @internal */
  readonly life: Lifetime<NativeModel>;
  readonly config: ModelConfig;
  /** Bytes of weights that the decoding of one token reads. */
  readonly bytesPerToken: number;
  readonly identity: ModelIdentity;
  /** What multiplies many rows: the instruction set, 'cuBLAS 13.0', or 'our own tensor-core kernel'. */
  readonly products: string;
  private readonly cacheHeadDim: number;
  private times: PassTimes = { all: 0, products: 0, append: 0, attend: 0 };

  private constructor(
    readonly backend: Backend,
    readonly file: ModelWeights,
    private readonly activations: Activations,
    native: NativeModel,
  ) {
    super();
    this.life = new Lifetime(this, 'model', native, backend.life);
    this.config = file.config;
    this.identity = new Identity(file);
    const { cacheHeadDim, bytesPerToken, products } = native.info();
    this.cacheHeadDim = cacheHeadDim;
    this.bytesPerToken = bytesPerToken;
    this.products = products;
  }

  /**
   * Maps the weights of a model: a path for openModel(), or what it returned. Weights stay in their stored form; the file
   * must not shrink while the model lives.
   * @throws ERR_INNERKV_INVALID_ARGUMENT when a tensor is missing, misplaced or of the wrong shape;
   *   ERR_INNERKV_UNSUPPORTED for weights without kernels.
   */
  static async open(
    backend: Backend,
    file: ModelWeights | string,
    options: { readonly activations?: Activations } = {},
  ): Promise<Model> {
    return Promise.resolve(Model.openSync(backend, file, options));
  }

  static openSync(
    backend: Backend,
    file: ModelWeights | string,
    { activations = 'int8' }: { readonly activations?: Activations } = {},
  ): Model {
    const opened = typeof file === 'string' ? openModel(file) : file;
    const { config } = opened;
    const Native = binding().Model;
    const native = new Native(
      backend.life.use(),
      {
        ...config,
        theta: ropeFrequencies(config.rope, config.headDim),
        halfLayout: config.rope.layout === 'half',
        bareNorms: config.bareNorms ?? false,
      },
      [...opened.tensors].map(([name, tensor]) => ({ scale: 1, ...tensor, name })),
    );
    return new Model(backend, opened, activations, native);
  }

  /** Where the last forward pass that succeeded spent its time. */
  get lastPass(): PassTimes {
    return this.times;
  }

  /** A cache of this model's shape, with its RoPE and sliding window. Heads are padded to a size that caches have. */
  async createCache(options: ModelCacheOptions): Promise<KvCache> {
    return Promise.resolve(this.createCacheSync(options));
  }

  createCacheSync(options: ModelCacheOptions): KvCache {
    return KvCache.createSync(this.backend, { ...options, ...this.cacheShape() });
  }

  /** What a cache for this model needs besides scheme, windows and memory; for KvCache.estimate() and create(). */
  cacheShape(): Omit<KvCacheOptions, keyof ModelCacheOptions> {
    const { layers, queryHeads, kvHeads, headDim, rope, slidingWindow = 0 } = this.config;
    return {
      layers,
      queryHeads,
      kvHeads,
      headDim: this.cacheHeadDim,
      model: this.identity,
      rope: { ...rope, rotaryDims: rotaryDims(rope, headDim) },
      softmaxScale: 1 / Math.sqrt(headDim),
      slidingWindow,
    };
  }

  /**
   * Appends tokens to a sequence and returns logits, [1 or tokens][vocabulary], or an empty array.
   * @throws ERR_INNERKV_OUT_OF_MEMORY, the reason of the signal, …; the sequence is then as it was before, to the bit.
   */
  async forward(
    sequence: Sequence,
    tokens: Tokens,
    options: ForwardOptions & Pick<ForwardItem, 'logits'> = {},
  ): Promise<Float32Array> {
    const { logits = 'last', ...rest } = options;
    return (await this.forwardBatch([{ sequence, tokens, logits }], rest))[0]!;
  }

  forwardSync(
    sequence: Sequence,
    tokens: Tokens,
    options: ForwardOptions & Pick<ForwardItem, 'logits'> = {},
  ): Float32Array {
    const { logits = 'last', ...rest } = options;
    return this.forwardBatchSync([{ sequence, tokens, logits }], rest)[0]!;
  }

  /** forward() of several sequences of one cache with one pass over the weights. */
  async forwardBatch(items: readonly ForwardItem[], options: ForwardOptions = {}): Promise<Float32Array[]> {
    const native = items.map((item) => this.forwardItem(item));
    await this.run(native, options);
    return native.map(({ logits }) => logits);
  }

  forwardBatchSync(items: readonly ForwardItem[], options: ForwardOptions = {}): Float32Array[] {
    const native = items.map((item) => this.forwardItem(item));
    this.runSync(native, options);
    return native.map(({ logits }) => logits);
  }

  /**
   * Appends tokens and returns −ln p(target) of each, in nats, 0 where nothing is scored: [tokens]. Logits stay native.
   * With `step: 1` this is the loss of decoding through the cache.
   */
  async nll(
    sequence: Sequence,
    tokens: Tokens,
    options: ForwardOptions & Pick<ScoreItem, 'targets'> = {},
  ): Promise<Float32Array> {
    const { targets, ...rest } = options;
    return (await this.nllBatch([{ sequence, tokens, ...(targets && { targets }) }], rest))[0]!;
  }

  nllSync(
    sequence: Sequence,
    tokens: Tokens,
    options: ForwardOptions & Pick<ScoreItem, 'targets'> = {},
  ): Float32Array {
    const { targets, ...rest } = options;
    return this.nllBatchSync([{ sequence, tokens, ...(targets && { targets }) }], rest)[0]!;
  }

  /** nll() of several sequences of one cache with one pass over the weights. */
  async nllBatch(items: readonly ScoreItem[], options: ForwardOptions = {}): Promise<Float32Array[]> {
    const native = items.map((item) => this.scoreItem(item));
    await this.run(native, options);
    return native.map(({ nll }) => nll);
  }

  nllBatchSync(items: readonly ScoreItem[], options: ForwardOptions = {}): Float32Array[] {
    const native = items.map((item) => this.scoreItem(item));
    this.runSync(native, options);
    return native.map(({ nll }) => nll);
  }

  /**
   * Generates text in a cache of its own, or in the one that is given: `for await (const token of model.generate(…))`.
   * @throws at once for a prompt or an option that is wrong; while iterating what forward() throws.
   */
  generate(prompt: Prompt, options: GenerateOneOptions = {}): Generation<GenerationSummary> {
    return generate(this, prompt, options);
  }

  /**
   * generate() of several prompts with one pass over the weights per step; `index` of a token says whose it is. Prompt i
   * draws its random numbers from stream i of the seed.
   */
  generateBatch(prompts: readonly Prompt[], options: GenerateOptions = {}): Generation<BatchSummary> {
    return generateBatch(this, prompts, options);
  }

  /**
   * A recorder of keys and queries before RoPE, to be given as `observe`. Keys at positions below `skip` (attention
   * sinks, whose keys are unlike all others) are left out; default 4. Queries all count.
   */
  moments(options: { readonly skip?: number } = {}): MomentsRecorder {
    const skip = checkInteger(options.skip ?? 4, 0, 2 ** 30, 'skip');
    return new MomentsRecorder(this, this.life.use().moments(skip));
  }

  private async run(items: NativeForwardItem[], options: ForwardOptions): Promise<void> {
    const native = this.forwardOptions(options);
    const moments = options.observe?.life.use();
    this.times = await abortable(options.signal, (flag) =>
      this.life.use().forward(false, flag, items, native, moments),
    );
  }

  private runSync(items: NativeForwardItem[], options: ForwardOptions): void {
    throwIfAborted(options.signal);
    const native = this.forwardOptions(options);
    const moments = options.observe?.life.use();
    this.times = this.life.use().forward(true, undefined, items, native, moments) as PassTimes;
  }

  private forwardOptions(options: ForwardOptions): NativeForwardOptions {
    const { activations = this.activations } = options;
    if (!['int8', 'float32'].includes(activations))
      throw invalid(`activations must be 'int8' or 'float32', not '${activations}'.`);
    const chunk = checkInteger(options.chunk ?? 512, 1, 65536, 'chunk');
    const step = checkInteger(options.step ?? chunk, 1, 65536, 'step');
    return { chunk, step, byteActivations: activations === 'int8' };
  }

  private forwardItem({ sequence, tokens, logits = 'last' }: ForwardItem) {
    if (!['last', 'all', 'none'].includes(logits))
      throw invalid(`logits must be 'last', 'all' or 'none', not '${logits}'.`);
    const checked = this.tokensOf(sequence, tokens);
    const logitRows = logits === 'all' ? checked.length : logits === 'last' ? 1 : 0;
    return {
      sequence: sequence.life.use(),
      tokens: checked,
      logitRows,
      logits: new Float32Array(logitRows * this.config.vocabulary),
      targets: undefined,
      nll: undefined,
    };
  }

  private scoreItem({ sequence, tokens, targets }: ScoreItem) {
    const checked = this.tokensOf(sequence, tokens);
    const { vocabulary } = this.config;
    const following = targets
      ? Int32Array.from(targets, (target) => checkInteger(target, -1, vocabulary - 1, 'target'))
      : Int32Array.from(checked, (_, i) => checked[i + 1] ?? -1);
    if (following.length !== checked.length)
      throw invalid(`There are ${following.length} targets for ${checked.length} tokens.`);
    return {
      sequence: sequence.life.use(),
      tokens: checked,
      logitRows: 0,
      logits: undefined,
      targets: following,
      nll: new Float32Array(checked.length),
    };
  }

  private tokensOf(sequence: Sequence, tokens: Tokens): Int32Array {
    const { vocabulary, contextLength } = this.config;
    const checked = Int32Array.from(tokens, (token) => checkInteger(token, 0, vocabulary - 1, 'token'));
    if (checked.length === 0) throw invalid('A forward pass needs at least one token.');
    if (sequence.length() + checked.length > contextLength)
      throw invalid(
        `${sequence.length()} + ${checked.length} tokens exceed the model's context of ${contextLength}.`,
        { contextLength },
      );
    return checked;
  }
}

/** The fingerprint reads the file, so only who asks for it pays. */
class Identity implements ModelIdentity {
  private made?: string;

  constructor(private readonly file: ModelWeights) {}

  get name(): string {
    return this.file.name ?? 'a model without a name';
  }

  get fingerprint(): string {
    return (this.made ??= fingerprint(this.file.config, this.file.tensors));
  }
}
