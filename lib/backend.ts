/** Where caches live: a device, its threads and its queue of calls. */
import { availableParallelism } from 'node:os';
import { abortable, throwIfAborted, type AbortOptions } from './abort';
import { binding, type CudaProbe, type NativeBackend, type NativeDenseOptions } from './binding';
import {
  makeTensor,
  makeTensorSync,
  type DeviceTensor,
  type Dtype,
  type TensorOptions,
} from './device-tensor';
import { invalid, KvError } from './errors';
import { Lifetime, Owned } from './lifetime';
import { checkInteger, checkOutput, checkTensor, type ArrayInput, type DtypeOptions } from './tensor';

export interface BackendOptions {
  /** Default: INNERKV_BACKEND, else 'auto'. */
  readonly backend?: 'auto' | 'cpu' | 'cuda';
  /** CPU threads, the caller's included. Default: INNERKV_THREADS, else all the process may use. */
  readonly threads?: number;
  /** Instruction set ('avx512', 'avx2', 'neon', 'scalar'). Default: INNERKV_ISA, else the best this machine runs. */
  readonly isa?: string;
  /**
   * A cudaStream_t of the caller's on the same GPU, for `backend: 'cuda'`: calls that use a DeviceTensor are ordered after
   * what it has been given when they run, and before what it is given after they have settled. Not checked.
   */
  readonly stream?: bigint;
  /** Calls that may be under way at once; one more rejects with ERR_INNERKV_QUEUE_FULL. */
  readonly queueLimit?: number;
}

export interface BackendInfo {
  readonly kind: 'cpu' | 'cuda';
  /** Of the CPU's part of the work. */
  readonly isa: string;
  readonly threads: number;
  readonly availableIsas: readonly string[];
  readonly cuda: CudaProbe;
  /** Why this backend was chosen, in words. */
  readonly why: string;
}

/** Made by createBackend(). Disposing it disposes its caches. */
export class Backend extends Owned<NativeBackend> {
  /** @internal */
  readonly life: Lifetime<NativeBackend>;

  /** @internal */
  constructor(
    native: NativeBackend,
    readonly info: BackendInfo,
  ) {
    super();
    this.life = new Lifetime(this, 'backend', native);
  }

  /**
   * A tensor in the backend's memory, of zeros or of `data`. @throws ERR_INNERKV_OUT_OF_MEMORY.
   */
  async tensor<D extends Dtype>(
    shape: readonly number[],
    dtype: D,
    options: TensorOptions = {},
  ): Promise<DeviceTensor<D>> {
    return makeTensor(this, shape, dtype, options);
  }

  tensorSync<D extends Dtype>(
    shape: readonly number[],
    dtype: D,
    options: TensorOptions = {},
  ): DeviceTensor<D> {
    return makeTensorSync(this, shape, dtype, options);
  }

  /** Calls under way. */
  get pending(): number {
    return this.life.use().pending();
  }

  /** Waits for everything queued so far, then disposes. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.disposed) await this.life.use().drain();
    this.dispose();
  }
}

/**
 * Opens a backend. Nothing is chosen silently: `info.why` says what and why, and an explicit wish that cannot be met is
 * ERR_INNERKV_UNSUPPORTED.
 */
export async function createBackend(options: BackendOptions = {}): Promise<Backend> {
  return Promise.resolve(createBackendSync(options));
}

/** The same without a promise. */
export function createBackendSync(options: BackendOptions = {}): Backend {
  const wish = options.backend ?? process.env.INNERKV_BACKEND ?? 'auto';
  if (wish !== 'auto' && wish !== 'cpu' && wish !== 'cuda')
    throw invalid(`backend must be 'auto', 'cpu' or 'cuda', not '${wish}'.`);
  const native = binding();
  const cuda = native.probeCuda();
  const usable = cuda.compiled && cuda.devices.length > 0;
  const whyNotCuda = cuda.compiled
    ? usable
      ? "the CUDA kernels are proven in emulation only; ask for backend: 'cuda' to use the GPU"
      : `no usable CUDA device (${cuda.error ?? 'none found'}; driver ${cuda.driverVersion}, runtime ${cuda.runtimeVersion})`
    : 'this build has no CUDA code';
  if (wish === 'cuda' && !usable)
    throw new KvError('ERR_INNERKV_UNSUPPORTED', `The CUDA backend cannot be used: ${whyNotCuda}.`, {
      details: { cuda },
    });
  const threads = checkInteger(
    options.threads ?? Number(process.env.INNERKV_THREADS ?? availableParallelism()),
    1,
    1024,
    'threads',
  );
  const kind = wish === 'cuda' ? 'cuda' : 'cpu';
  const queueLimit = checkInteger(options.queueLimit ?? 1024, 1, 2 ** 30, 'queueLimit');
  const { stream } = options;
  if (stream !== undefined && (kind !== 'cuda' || typeof stream !== 'bigint'))
    throw invalid("stream must be a bigint, and goes with backend: 'cuda'.");
  const isa = options.isa ?? process.env.INNERKV_ISA ?? '';
  const backend = new native.Backend(threads, isa, queueLimit, kind, stream);
  const why = wish === 'auto' ? `chosen because ${whyNotCuda}` : 'asked for';
  return new Backend(backend, { kind, ...backend.info(), cuda, why });
}

export interface DenseAttentionOptions extends DtypeOptions, AbortOptions {
  /** [kvHeads, tokens, headDim], float32 or 16 bits; k and v of one dtype. */
  readonly k: ArrayInput;
  readonly v: ArrayInput;
  /** [qTokens, queryHeads, headDim], after RoPE, not scaled. */
  readonly q: ArrayInput;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  /** Default 1 / sqrt(headDim). */
  readonly softmaxScale?: number;
  readonly softcap?: number;
  readonly slidingWindow?: number;
  /** Query i is token tokens − qTokens + i. Default true. */
  readonly causal?: boolean;
  /** [qTokens, queryHeads, headDim]; made when absent. */
  readonly out?: Float32Array;
  /** [qTokens, queryHeads], natural log-sum-exp of the scaled logits. */
  readonly lse?: Float32Array;
  /** [qTokens, queryHeads, tokens], -Infinity where masked. */
  readonly logits?: Float32Array;
}

/**
 * Attention over uncompressed keys and values, vectorised and threaded: the 16- and 32-bit baseline, and exact prefill.
 * Returns [qTokens, queryHeads, headDim].
 */
export async function denseAttention(
  backend: Backend,
  options: DenseAttentionOptions,
): Promise<Float32Array> {
  const native = denseOptions(options);
  await abortable(options.signal, (flag) => backend.life.use().attendDense(false, flag, native));
  return native.out;
}

/** denseAttention() on the calling thread. */
export function denseAttentionSync(backend: Backend, options: DenseAttentionOptions): Float32Array {
  throwIfAborted(options.signal);
  const native = denseOptions(options);
  void backend.life.use().attendDense(true, undefined, native);
  return native.out;
}

function denseOptions(options: DenseAttentionOptions): NativeDenseOptions {
  const { queryHeads, kvHeads, headDim, causal = true } = options;
  const k = checkTensor(options.k, kvHeads * headDim, 'k', '[kvHeads, tokens, headDim]', options);
  const v = checkTensor(options.v, kvHeads * headDim, 'v', '[kvHeads, tokens, headDim]', options);
  const q = checkTensor(options.q, queryHeads * headDim, 'q', '[qTokens, queryHeads, headDim]', options);
  if (k.tokens !== v.tokens || k.dtype !== v.dtype)
    throw invalid('k and v must have the same shape and dtype.');
  const rows = q.tokens * queryHeads;
  return {
    k: k.data,
    v: v.data,
    q: q.data,
    kvDtype: k.dtype,
    qDtype: q.dtype,
    tokens: k.tokens,
    qTokens: q.tokens,
    queryHeads,
    kvHeads,
    headDim,
    softmaxScale: options.softmaxScale ?? 1 / Math.sqrt(headDim),
    softcap: options.softcap ?? 0,
    slidingWindow: options.slidingWindow ?? 0,
    causal,
    out: options.out ? checkOutput(options.out, rows * headDim, 'out') : new Float32Array(rows * headDim),
    lse: options.lse && checkOutput(options.lse, rows, 'lse'),
    logits: options.logits && checkOutput(options.logits, rows * k.tokens, 'logits'),
  };
}
