/** Checks of typed arrays before they cross to native code. */
import { type NativeArray, type NativeDtype } from './binding';
import { invalid } from './errors';

/** What a 16-bit array holds. Ignored for float32. */
export interface DtypeOptions {
  readonly dtype?: 'f16' | 'bf16';
}

/** Float32Array, Uint16Array with the bits of binary16 (or bfloat16, see `dtype`), or Float16Array where it exists. */
export type ArrayInput = Float32Array | Uint16Array | ArrayBufferView;

export interface CheckedTensor {
  readonly data: NativeArray;
  readonly dtype: NativeDtype;
}

/** `row` numbers make one token; returns the tensor and its number of tokens. `name` and `shape` are for the message. */
export function checkTensor(
  value: ArrayInput,
  row: number,
  name: string,
  shape: string,
  { dtype = 'f16' }: DtypeOptions = {},
): CheckedTensor & { readonly tokens: number } {
  const tensor = asTensor(value, name, dtype);
  if (tensor.data.length % row !== 0)
    throw invalid(`${name} has ${tensor.data.length} numbers; ${shape} needs a multiple of ${row}.`, {
      tensor: name,
      length: tensor.data.length,
      row,
    });
  return { ...tensor, tokens: tensor.data.length / row };
}

/** An output of exactly `length` float32. */
export function checkOutput(value: unknown, length: number, name: string): Float32Array {
  if (!isTyped(value, 'Float32Array')) throw invalid(`${name} must be a Float32Array.`);
  refuseShared(value, name);
  if (value.length !== length)
    throw invalid(`${name} has ${value.length} numbers; it needs ${length}.`, {
      tensor: name,
      expected: length,
    });
  return value as Float32Array;
}

/** Exactly `length` numbers that `dtype` names. */
export function checkArray(value: unknown, length: number, dtype: NativeDtype, name: string): NativeArray {
  const { data, dtype: found } = asTensor(value, name, dtype === 'bf16' ? 'bf16' : 'f16');
  if (found !== dtype)
    throw invalid(`${name} must be a ${dtype === 'f32' ? 'Float32Array' : `Uint16Array of ${dtype} bits`}.`);
  if (data.length !== length)
    throw invalid(`${name} has ${data.length} numbers; it needs ${length}.`, {
      tensor: name,
      expected: length,
    });
  return data;
}

/** An integer in [low, high]. */
export function checkInteger(value: unknown, low: number, high: number, name: string): number {
  if (typeof value !== 'number' || !Number.isInteger(value) || value < low || value > high)
    throw invalid(`${name} must be an integer from ${low} to ${high}, not ${String(value)}.`);
  return value;
}

function asTensor(value: unknown, name: string, dtype: 'f16' | 'bf16'): CheckedTensor {
  if (!['f16', 'bf16'].includes(dtype)) throw invalid(`dtype must be 'f16' or 'bf16', not ${dtype}.`);
  if (isTyped(value, 'Float32Array')) {
    refuseShared(value, name);
    return { data: value as Float32Array, dtype: 'f32' };
  }
  if (isTyped(value, 'Uint16Array')) {
    refuseShared(value, name);
    return { data: value as Uint16Array, dtype };
  }
  if (isTyped(value, 'Float16Array')) {
    refuseShared(value, name);
    return { data: new Uint16Array(value.buffer, value.byteOffset, value.byteLength / 2), dtype: 'f16' };
  }
  throw invalid(`${name} must be a Float32Array, a Uint16Array or a Float16Array.`);
}

/** Typed arrays of another realm (a vm context, a test runner) are as good as ours: ask for the tag, not the class. */
function isTyped(value: unknown, tag: string): value is ArrayBufferView & { readonly length: number } {
  return ArrayBuffer.isView(value) && Object.prototype.toString.call(value) === `[object ${tag}]`;
}

function refuseShared(value: ArrayBufferView, name: string): void {
  if (Object.prototype.toString.call(value.buffer) === '[object SharedArrayBuffer]')
    throw invalid(
      `${name} is backed by a SharedArrayBuffer, which may change while it is read. Copy it first.`,
    );
}
