/** The one door to native code: loads the addon, names its types, and turns its failures into KvErrors. */
import bindings from 'bindings';
import { resolve } from 'node:path';
import { KvError, type ErrorCode, type ErrorDetails } from './errors';
import { type HeadBasis, type LayerScheme, type TensorSpec } from './schemes/types';

/** A flag that running native work reads. */
export interface NativeAbortFlag {
  set(): void;
}

/** Typed arrays as the addon takes them: Uint16Array holds binary16 bits, or bfloat16 when the dtype says so. */
export type NativeArray = Float32Array | Uint16Array;
/** Float32 results. */
export type NativeOutput = Float32Array | NativeTensor;
export type NativeInput = NativeArray | NativeTensor;
export type NativeDtype = 'f32' | 'f16' | 'bf16';
type Abort = NativeAbortFlag | undefined;

/**
 * Every method whose first parameter is `sync` returns its result when that is true, and otherwise a promise of it.
 * Inputs are copied in the asynchronous case.
 */
type Either<T> = T | Promise<T>;

export interface NativeDenseOptions {
  readonly k: NativeArray;
  readonly v: NativeArray;
  readonly q: NativeArray;
  readonly kvDtype: NativeDtype;
  readonly qDtype: NativeDtype;
  readonly tokens: number;
  readonly qTokens: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly softmaxScale: number;
  readonly softcap: number;
  readonly slidingWindow: number;
  readonly causal: boolean;
  readonly out: Float32Array;
  readonly lse: Float32Array | undefined;
  readonly logits: Float32Array | undefined;
}

export interface NativeBackend {
  info(): { isa: string; threads: number; availableIsas: string[] };
  /** Calls under way. */
  pending(): number;
  /** Settles after everything queued so far. */
  drain(): Promise<void>;
  attendDense(sync: boolean, abort: Abort, options: NativeDenseOptions): Either<void>;
  /** Zeros, or `data`. */
  tensor(
    sync: boolean,
    abort: Abort,
    dtype: NativeDtype,
    count: number,
    data: NativeArray | undefined,
  ): Either<NativeTensor>;
  borrow(pointer: bigint, dtype: NativeDtype, count: number): NativeTensor;
  import(handle: Uint8Array, dtype: NativeDtype, count: number): NativeTensor;
  dispose(): void;
}

/** Memory of a backend. */
export interface NativeTensor {
  pointer(): bigint;
  /** Elements [first, first + count) of the same memory. */
  part(first: number, count: number): NativeTensor;
  write(sync: boolean, abort: Abort, data: NativeArray): Either<void>;
  read(sync: boolean, abort: Abort, out: NativeArray): Either<void>;
  exportHandle(): Uint8Array;
  dispose(): void;
}

export interface NativeCacheOptions {
  readonly layers: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly schemes: readonly (Omit<LayerScheme, 'basis'> & { basis: readonly HeadBasis[] | null })[];
  readonly schemeOfLayer: readonly number[];
  readonly windowOfLayer: readonly number[];
  readonly theta: Float64Array | undefined;
  readonly halfLayout: boolean;
  readonly budget: number;
  readonly softmaxScale: number;
  readonly softcap: number;
}

export interface NativeAppendItem {
  readonly sequence: NativeSequence;
  readonly k: NativeInput;
  readonly v: NativeInput;
  readonly dtype: NativeDtype;
}

export interface NativeAttendItem {
  readonly sequence: NativeSequence;
  readonly q: NativeInput;
  readonly dtype: NativeDtype;
  readonly out: NativeOutput;
  readonly lse: NativeOutput | undefined;
  readonly logits: Float32Array | undefined;
  readonly mass: Float32Array | undefined;
}

export interface NativeCache {
  sequence(): NativeSequence;
  reader(): NativeReader;
  /** Bytes: the budget, what sequences hold, and what was taken from the machine. */
  stats(): { budget: number; used: number; reserved: number };
  plan(): {
    scheme: number;
    pageBytes: number;
    windowBytes: number;
    ringTokens: number;
    keyBitsPerValue: number;
    valueBitsPerValue: number;
    path: string;
  }[];
  appendBatch(sync: boolean, abort: Abort, layer: number, items: readonly NativeAppendItem[]): Either<void>;
  attendBatch(
    sync: boolean,
    abort: Abort,
    layer: number,
    items: readonly NativeAttendItem[],
    causal: boolean,
  ): Either<void>;
  dispose(): void;
}

export interface NativeSequence {
  fork(sync: boolean, abort: Abort): Either<NativeSequence>;
  truncate(sync: boolean, abort: Abort, tokens: number): Either<void>;
  replace(
    sync: boolean,
    abort: Abort,
    layer: number,
    position: number,
    k: NativeInput,
    v: NativeInput,
    dtype: NativeDtype,
  ): Either<void>;
  /** `head` -1 means every head. */
  remove(sync: boolean, abort: Abort, layer: number, head: number, positions: Int32Array): Either<void>;
  readBack(
    sync: boolean,
    abort: Abort,
    layer: number,
    head: number,
  ): Either<{ k: Float32Array; v: Float32Array }>;
  writer(sync: boolean, abort: Abort): Either<NativeWriter>;
  length(layer: number): number;
  layerState(layer: number): {
    tokens: number;
    sink: number;
    keysQuantised: number;
    valuesQuantised: number;
    removed: number;
    pages: number;
  };
  page(
    layer: number,
    head: number,
    page: number,
  ): { bytes: Uint8Array; keyZeros: Uint16Array; valueZeros: Uint16Array } | null;
  dispose(): void;
}

export interface NativeWriter {
  next(sync: boolean, abort: Abort): Either<Uint8Array | null>;
  dispose(): void;
}

export interface NativeReader {
  feed(sync: boolean, abort: Abort, bytes: Uint8Array): Either<void>;
  finish(sync: boolean, abort: Abort): Either<NativeSequence>;
  dispose(): void;
}

/** Shape of a model; sizes as in ModelConfig of lib/model. */
export interface NativeModelOptions {
  readonly layers: number;
  readonly hidden: number;
  readonly intermediate: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly vocabulary: number;
  readonly rmsEpsilon: number;
  readonly theta: Float64Array;
  readonly halfLayout: boolean;
  readonly bareNorms: boolean;
}

export interface NativeWeights {
  /** Canonical. */
  readonly name: string;
  readonly type: string;
  readonly shape: readonly number[];
  readonly path: string;
  readonly offset: number;
  readonly bytes: number;
  readonly scale: number;
}

export interface NativeForwardItem {
  readonly sequence: NativeSequence;
  readonly tokens: Int32Array;
  /** 0, 1 or as many as tokens. */
  readonly logitRows: number;
  readonly logits: Float32Array | undefined;
  readonly targets: Int32Array | undefined;
  readonly nll: Float32Array | undefined;
}

export interface NativeForwardOptions {
  readonly chunk: number;
  readonly step: number;
  readonly byteActivations: boolean;
}

/**
 * Seconds of a forward pass: all of it, products with weights, appending keys and values, attention. The rest is norms,
 * rotations and the like; queueing is not counted.
 */
export interface NativePassTimes {
  readonly all: number;
  readonly products: number;
  readonly append: number;
  readonly attend: number;
}

/** Sums over tokens: [layers][kvHeads] and then [D], [D][D], [D][D]. */
export interface NativeMomentSums {
  /** Keys, and queries per query head: those of the first tokens are in the latter only. */
  readonly tokens: number;
  readonly queryTokens: number;
  readonly keySum: Float64Array;
  readonly keySquare: Float64Array;
  readonly querySquare: Float64Array;
}

export interface NativeMoments {
  read(sync: boolean, abort: Abort): Either<NativeMomentSums>;
  dispose(): void;
}

export interface NativeModel {
  info(): { cacheHeadDim: number; bytesPerToken: number; products: string };
  forward(
    sync: boolean,
    abort: Abort,
    items: readonly NativeForwardItem[],
    options: NativeForwardOptions,
    moments: NativeMoments | undefined,
  ): Either<NativePassTimes>;
  moments(skip: number): NativeMoments;
  dispose(): void;
}

export interface NativeEstimate {
  readonly windowBytes: number;
  readonly codeBytes: number;
  readonly scaleBytes: number;
  readonly zeroBytes: number;
  readonly outlierBytes: number;
  readonly paddingBytes: number;
  readonly fp16Bytes: number;
  readonly bitsPerValue: number;
  readonly bytesPerToken: number;
}

/** What the machine offers to CUDA. Versions are 1000 * major + 10 * minor; driver 0 means none. */
export interface CudaProbe {
  /** Whether this binary contains CUDA code at all. */
  readonly compiled: boolean;
  readonly driverVersion: number;
  readonly runtimeVersion: number;
  /** Name of the first CUDA error met, e.g. cudaErrorNoDevice. */
  readonly error: string | null;
  readonly devices: readonly {
    readonly name: string;
    readonly capability: string;
    readonly totalBytes: number;
    readonly multiprocessors: number;
  }[];
}

export interface SupportedSpec extends TensorSpec {
  /** Whether keys may be stored so. */
  readonly key: boolean;
  /** Whether values may be stored so. */
  readonly value: boolean;
}

export interface NativeBinding {
  readonly AbortFlag: new () => NativeAbortFlag;
  readonly Backend: new (
    threads: number,
    isa: string,
    queueLimit: number,
    device: 'cpu' | 'cuda',
    stream: bigint | undefined,
  ) => NativeBackend;
  readonly Cache: new (backend: NativeBackend, options: NativeCacheOptions) => NativeCache;
  readonly Model: new (
    backend: NativeBackend,
    options: NativeModelOptions,
    tensors: readonly NativeWeights[],
  ) => NativeModel;
  readonly formatVersion: number;
  readonly pageTokens: number;
  estimate(options: NativeCacheOptions, tokens: number, sequences: number): NativeEstimate;
  supportedSpecs(): SupportedSpec[];
  probeCuda(): CudaProbe;
  /** Loads cuBLAS if it can: 1000 * major + 10 * minor, or 0. */
  cublasVersion(): number;
  setErrorFactory(make: (code: ErrorCode, message: string, details: ErrorDetails) => KvError): void;
}

function requireBinary(path: string): NativeBinding {
  // eslint-disable-next-line @typescript-eslint/no-require-imports -- an addon has no other way in
  return require(path) as NativeBinding;
}

interface Loaded {
  readonly native: NativeBinding;
  /** Where the addon came from: a path, or what the package `bindings` was asked for. */
  readonly path: string;
}

function load(): Loaded {
  const failures: string[] = [];
  const attempt = (path: string, open: () => NativeBinding): Loaded | undefined => {
    try {
      return { native: open(), path };
    } catch (error) {
      failures.push(`${path}: ${error instanceof Error ? error.message : String(error)}`);
      return undefined;
    }
  };
  // A binary that was asked for by name is the only one tried: never silently another one.
  const named = process.env.INNERKV_BINARY;
  const loaded = named
    ? attempt(resolve(named), () => requireBinary(resolve(named)))
    : attempt('bindings("innerkv")', () => bindings('innerkv') as NativeBinding);
  if (loaded) return loaded;
  throw new KvError(
    'ERR_INNERKV_NO_BINARY',
    `The native addon of innerkv could not be loaded. Tried:\n- ${failures.join('\n- ')}\n` +
      (named
        ? 'INNERKV_BINARY names that file. Correct it, or unset it to use the package’s own build.'
        : 'Build it in the package’s folder with: npm run build:native (needs CMake and a C++20 compiler).'),
    { details: { attempts: failures } },
  );
}

let loaded: Loaded | undefined;

function open(): Loaded {
  if (loaded) return loaded;
  loaded = load();
  loaded.native.setErrorFactory((code, message, details) => new KvError(code, message, { details }));
  return loaded;
}

/** The addon, loaded at the first call. Throws ERR_INNERKV_NO_BINARY with every attempt. */
export function binding(): NativeBinding {
  return open().native;
}

/** Which file the addon was loaded from. */
export function bindingPath(): string {
  return open().path;
}

/**
 * Every combination of bits, grouping and mode that keys or values may be stored in. `outliers` of 1 to 8 go with each of them
 * but 16 bits and `tokens32`, and keys of schemes with error feedback.
 */
export function supportedSpecs(): SupportedSpec[] {
  return binding().supportedSpecs();
}
