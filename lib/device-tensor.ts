/** Tensors where a backend computes: a GPU's memory, or plain memory on the CPU, so that one program runs on both. */
import { abortable, throwIfAborted, type AbortOptions } from './abort';
import { type Backend } from './backend';
import { type NativeArray, type NativeDtype, type NativeOutput, type NativeTensor } from './binding';
import { invalid } from './errors';
import { Lifetime, Owned } from './lifetime';
import {
  checkArray,
  checkInteger,
  checkOutput,
  checkTensor,
  type ArrayInput,
  type CheckedTensor,
  type DtypeOptions,
} from './tensor';

export type Dtype = NativeDtype;

/** Float32, or 16 bits as they are. */
export type DtypeArray<D extends Dtype = Dtype> = D extends 'f32' ? Float32Array : Uint16Array;

/** Numbers for append() and attend(): an array, or a tensor of the cache's backend. */
export type TensorInput = ArrayInput | DeviceTensor;

/** Where float32 results go. */
export type TensorOutput = Float32Array | DeviceTensor<'f32'>;

export interface TensorOptions extends AbortOptions {
  /** What the tensor holds, of its dtype; zeros when absent. */
  readonly data?: ArrayInput;
}

/** Memory that belongs to somebody else. */
export interface BorrowedMemory<D extends Dtype = Dtype> {
  /** Address of the first element on the backend's device, aligned to the dtype. */
  readonly pointer: bigint;
  readonly shape: readonly number[];
  readonly dtype: D;
  /** Kept from the garbage collector until the tensor is disposed and no call uses it. */
  readonly owner?: unknown;
}

/**
 * A dense row-major tensor in a backend's memory, made by backend.tensor(), borrow(), import() or slice(). append() and
 * attend() take it without a copy to the host. It is read when a call runs, not when it is made.
 */
export class DeviceTensor<D extends Dtype = Dtype> extends Owned<NativeTensor> {
  /** @internal */
  readonly life: Lifetime<NativeTensor>;
  readonly shape: readonly number[];

  /** @internal `kept` must stay reachable as long as the memory is used. */
  constructor(
    readonly backend: Backend,
    shape: readonly number[],
    readonly dtype: D,
    native: NativeTensor,
    private kept?: unknown,
  ) {
    super();
    this.shape = Object.freeze([...shape]);
    const parent = kept instanceof DeviceTensor ? kept.life : backend.life;
    this.life = new Lifetime(this, 'tensor', native, parent);
  }

  /**
   * Memory of somebody else as a tensor; nothing is freed. It must stay valid until the tensor is disposed and no call
   * uses it.
   * @throws ERR_INNERKV_INVALID_ARGUMENT for null, misaligned or overflowing memory, and for what the system knows not
   *   to be memory of the backend's device.
   */
  static borrow<D extends Dtype>(backend: Backend, memory: BorrowedMemory<D>): DeviceTensor<D> {
    const { pointer, shape, dtype, owner } = memory;
    if (typeof pointer !== 'bigint') throw invalid('pointer must be a bigint.');
    const native = backend.life.use().borrow(pointer, checkDtype(dtype), elementsOf(shape));
    return new DeviceTensor(backend, shape, dtype, native, owner);
  }

  /**
   * Opens memory that another process of this machine gave away by exportHandle(). That process must hold it until this
   * tensor is disposed.
   * @throws ERR_INNERKV_UNSUPPORTED on a backend without shared memory, ERR_INNERKV_INVALID_ARGUMENT for a bad handle.
   */
  static import<D extends Dtype>(
    backend: Backend,
    handle: Uint8Array,
    shape: readonly number[],
    dtype: D,
  ): DeviceTensor<D> {
    const native = backend.life.use().import(handle, checkDtype(dtype), elementsOf(shape));
    return new DeviceTensor(backend, shape, dtype, native);
  }

  /** Elements. */
  get length(): number {
    return elementsOf(this.shape);
  }

  get byteLength(): number {
    return this.length * (this.dtype === 'f32' ? 4 : 2);
  }

  /** Address of the first element on the device. */
  get pointer(): bigint {
    return this.life.use().pointer();
  }

  /** Rows [first, first + count) along the first dimension, in the same memory; disposed with this tensor. */
  slice(first: number, count: number): DeviceTensor<D> {
    const [rows = 1, ...rest] = this.shape;
    checkInteger(first, 0, rows, 'first');
    checkInteger(count, 1, rows - first, 'count');
    const row = this.length / rows;
    const native = this.life.use().part(first * row, count * row);
    return new DeviceTensor(this.backend, [count, ...rest], this.dtype, native, this);
  }

  /** Replaces the contents. `data`: as many elements of the tensor's dtype; copied when the call is made. */
  async write(data: ArrayInput, options: AbortOptions = {}): Promise<void> {
    const array = checkArray(data, this.length, this.dtype, 'data');
    await keep(
      abortable(options.signal, (flag) => this.life.use().write(false, flag, array)),
      [this],
    );
  }

  writeSync(data: ArrayInput): void {
    void this.life.use().write(true, undefined, checkArray(data, this.length, this.dtype, 'data'));
  }

  /** The contents: a Float32Array, or the bits of 16-bit numbers in a Uint16Array; `out` when that is given. */
  async read(out: DtypeArray<D> = this.array(), options: AbortOptions = {}): Promise<DtypeArray<D>> {
    const array = checkArray(out, this.length, this.dtype, 'out');
    await keep(
      abortable(options.signal, (flag) => this.life.use().read(false, flag, array)),
      [this],
    );
    return out;
  }

  readSync(out: DtypeArray<D> = this.array()): DtypeArray<D> {
    void this.life.use().read(true, undefined, checkArray(out, this.length, this.dtype, 'out'));
    return out;
  }

  /**
   * 64 bytes with which another process of this machine opens the memory by DeviceTensor.import(). Only of tensors made
   * by backend.tensor(). What a settled write() has written is there for it.
   * @throws ERR_INNERKV_UNSUPPORTED on a backend without shared memory.
   */
  exportHandle(): Uint8Array {
    return this.life.use().exportHandle();
  }

  /** Frees memory that is the tensor's own. Calls under way finish first. Slices are disposed too. */
  override dispose(): void {
    super.dispose();
    this.kept = undefined;
  }

  /** @internal What must stay reachable while a call uses the tensor. */
  get held(): unknown {
    return this.kept;
  }

  private array(): DtypeArray<D> {
    return new (this.dtype === 'f32' ? Float32Array : Uint16Array)(this.length) as DtypeArray<D>;
  }
}

/** @internal For Backend.tensor(). */
export async function makeTensor<D extends Dtype>(
  backend: Backend,
  shape: readonly number[],
  dtype: D,
  { data, signal }: TensorOptions,
): Promise<DeviceTensor<D>> {
  const [count, array] = checkNew(shape, dtype, data);
  const native = await abortable(signal, (flag) =>
    backend.life.use().tensor(false, flag, dtype, count, array),
  );
  return new DeviceTensor(backend, shape, dtype, native);
}

/** @internal For Backend.tensorSync(). */
export function makeTensorSync<D extends Dtype>(
  backend: Backend,
  shape: readonly number[],
  dtype: D,
  { data, signal }: TensorOptions,
): DeviceTensor<D> {
  throwIfAborted(signal);
  const [count, array] = checkNew(shape, dtype, data);
  const native = backend.life.use().tensor(true, undefined, dtype, count, array) as NativeTensor;
  return new DeviceTensor(backend, shape, dtype, native);
}

/** checkTensor() for arrays and tensors. */
export function checkInput(
  value: TensorInput,
  row: number,
  name: string,
  shape: string,
  options: DtypeOptions = {},
): { readonly data: CheckedTensor['data'] | NativeTensor; readonly dtype: Dtype; readonly tokens: number } {
  if (!(value instanceof DeviceTensor)) return checkTensor(value, row, name, shape, options);
  checkRows(value, row, name, shape);
  return { data: value.life.use(), dtype: value.dtype, tokens: value.length / row };
}

/** checkOutput() for arrays and tensors; `row` numbers make one of its rows. */
export function checkTarget(value: unknown, length: number, row: number, name: string): NativeOutput {
  if (!isTensor(value)) return checkOutput(value, length, name);
  if (value.dtype !== 'f32') throw invalid(`${name} must be a tensor of dtype 'f32', not '${value.dtype}'.`);
  checkRows(value, row, name, `[rows, ${row}]`);
  if (value.length !== length)
    throw invalid(`${name} has ${value.length} numbers; it needs ${length}.`, {
      tensor: name,
      expected: length,
    });
  return value.life.use();
}

function isTensor(value: unknown): value is DeviceTensor {
  return value instanceof DeviceTensor;
}

/** Flat, or of a shape whose last dimensions make a row. */
function checkRows({ shape, length }: DeviceTensor, row: number, name: string, wanted: string): void {
  let last = 1;
  const fits =
    shape.length === 1 ? length % row === 0 : shape.some((_, i) => (last *= shape.at(-1 - i)!) === row);
  if (!fits)
    throw invalid(`${name} has the shape [${shape.join(', ')}]; ${wanted} needs rows of ${row} numbers.`, {
      tensor: name,
      shape,
      row,
    });
}

function checkNew(
  shape: readonly number[],
  dtype: Dtype,
  data: ArrayInput | undefined,
): [number, NativeArray | undefined] {
  const count = elementsOf(shape);
  checkDtype(dtype);
  return [count, data && checkArray(data, count, dtype, 'data')];
}

function checkDtype<D extends Dtype>(dtype: D): D {
  if (!['f32', 'f16', 'bf16'].includes(dtype))
    throw invalid(`dtype must be 'f32', 'f16' or 'bf16', not ${dtype}.`);
  return dtype;
}

/** Elements of a shape of at least one dimension, each at least 1, so few that bytes fit into 48 bits. */
function elementsOf(shape: readonly number[]): number {
  const largest = 2 ** 45;
  if (!Array.isArray(shape) || shape.length === 0)
    throw invalid('shape must be an array of at least one size.');
  const count = shape.reduce<number>(
    (all, size) => all * checkInteger(size, 1, largest, 'a size of shape'),
    1,
  );
  if (count > largest) throw invalid(`A tensor of shape [${shape.join(', ')}] is too large.`);
  return count;
}

/** Owners of memory that calls under way use. */
const inUse = new Set<unknown>();

/** Keeps the owners of borrowed memory reachable until the call settles, whatever becomes of the tensors. */
export async function keep<T>(call: Promise<T>, values: readonly unknown[]): Promise<T> {
  const owners = values.map((value) => (value instanceof DeviceTensor ? [value, value.held] : undefined));
  inUse.add(owners);
  try {
    return await call;
  } finally {
    inUse.delete(owners);
  }
}
