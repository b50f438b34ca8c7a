/**
 * The safetensors container: 8 bytes of header length, a JSON header, then the tensors back to back. A file is hostile
 * until proven otherwise: every size is checked before it is used, and tensors must tile the data without gap or overlap.
 */
import { readFileSync, statSync } from 'node:fs';
import { KvError } from '../errors';

export type FloatArray = Float32Array | Float64Array;

/** Bytes of one element of each type. */
const DTYPES = new Map(
  ['BOOL U8 I8 F8_E4M3 F8_E5M2', 'I16 U16 F16 BF16', 'I32 U32 F32', 'I64 U64 F64'].flatMap((names, log2) =>
    names.split(' ').map((name) => [name, 2 ** log2] as const),
  ),
);

const MAX_HEADER = 100_000_000; // the format's own limit
const MAX_FILE = 2 ** 31 - 1; // what Node reads in one piece

export interface TensorInfo {
  readonly dtype: string;
  readonly shape: readonly number[];
  /** Little-endian bytes, a view into the file. */
  readonly bytes: Uint8Array;
}

export interface Safetensors {
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: ReadonlyMap<string, string>;
}

/** A tensor as the header describes it. */
export interface TensorEntry {
  readonly dtype: string;
  readonly shape: readonly number[];
  /** First byte and the one after the last, from the end of the header. */
  readonly begin: number;
  readonly end: number;
}

export interface SafetensorsHeader {
  readonly tensors: ReadonlyMap<string, TensorEntry>;
  readonly metadata: ReadonlyMap<string, string>;
}

function corrupt(source: string, problem: string, cause?: unknown): KvError {
  return new KvError('ERR_INNERKV_CORRUPT', `${source} is not a valid safetensors file: ${problem}.`, {
    cause,
  });
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

/** Bytes of the header, from the first eight bytes of a file of `size`. */
export function safetensorsHeaderBytes(start: Uint8Array, size: number, source: string): number {
  if (size < 8) throw corrupt(source, `${size} bytes are too few`);
  const headerBytes = new DataView(start.buffer, start.byteOffset, 8).getBigUint64(0, true);
  if (headerBytes > BigInt(Math.min(MAX_HEADER, size - 8)))
    throw corrupt(source, `it ends before its header of ${headerBytes} bytes does`);
  return Number(headerBytes);
}

/** The JSON between the length and the data, of a file with `dataBytes` of data. */
export function parseSafetensorsHeader(
  json: Uint8Array,
  dataBytes: number,
  source: string,
): SafetensorsHeader {
  const tensors = new Map<string, TensorEntry>();
  let metadata = new Map<string, string>();
  for (const [name, entry] of Object.entries(parseHeader(json, source))) {
    if (name === '__metadata__') {
      metadata = parseMetadata(entry, source);
      continue;
    }
    const tensor = parseEntry(name, entry, source);
    if (tensor.end > dataBytes)
      throw corrupt(source, `tensor "${name}" ends at byte ${tensor.end} of ${dataBytes}: it is truncated`);
    tensors.set(name, tensor);
  }

  let at = 0;
  for (const [name, { begin, end }] of [...tensors].sort(
    ([, a], [, b]) => a.begin - b.begin || a.end - b.end,
  )) {
    if (begin !== at)
      throw corrupt(source, `tensor "${name}" ${begin < at ? 'overlaps another' : 'follows a gap'}`);
    at = end;
  }
  if (at !== dataBytes) throw corrupt(source, `${dataBytes - at} bytes belong to no tensor`);
  return { tensors, metadata };
}

/** `source` names the file in messages. */
export function parseSafetensors(file: Uint8Array, source = 'The buffer'): Safetensors {
  const dataAt = 8 + safetensorsHeaderBytes(file, file.byteLength, source);
  const data = file.subarray(dataAt);
  const header = parseSafetensorsHeader(file.subarray(8, dataAt), data.byteLength, source);
  const tensors = new Map(
    [...header.tensors].map(([name, { dtype, shape, begin, end }]) => [
      name,
      { dtype, shape, bytes: data.subarray(begin, end) },
    ]),
  );
  return { tensors, metadata: header.metadata };
}

function parseHeader(bytes: Uint8Array, source: string): Record<string, unknown> {
  let header: unknown;
  try {
    header = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes));
  } catch (cause) {
    throw corrupt(source, 'its header is not JSON', cause);
  }
  if (!isRecord(header)) throw corrupt(source, 'its header is not a JSON object');
  return header;
}

function parseMetadata(entry: unknown, source: string): Map<string, string> {
  if (!isRecord(entry)) throw corrupt(source, 'its metadata is not an object');
  return new Map(
    Object.entries(entry).map(([key, value]) => {
      if (typeof value !== 'string') throw corrupt(source, `its metadata "${key}" is not a string`);
      return [key, value];
    }),
  );
}

function parseEntry(name: string, entry: unknown, source: string): TensorEntry {
  const bad = (problem: string) => corrupt(source, `tensor "${name}" ${problem}`);
  if (!isRecord(entry)) throw bad('has no description');
  const { dtype, shape, data_offsets: offsets } = entry;
  const size = typeof dtype === 'string' ? DTYPES.get(dtype) : undefined;
  if (typeof dtype !== 'string' || size === undefined)
    throw bad(`has the unknown type ${JSON.stringify(dtype)}`);
  if (!Array.isArray(shape) || !shape.every(isCount)) throw bad('has no valid shape');
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isCount))
    throw bad('has no valid offsets');
  const [begin, end] = offsets as [number, number];
  const bytes = shape.reduce((product, extent) => product * extent, size);
  if (begin > end || !isCount(bytes) || bytes !== end - begin)
    throw bad(`of shape [${shape.join(', ')}] and type ${dtype} cannot have ${end - begin} bytes`);
  return { dtype, shape, begin, end };
}

export function readSafetensors(path: string): Safetensors {
  let file: Uint8Array;
  try {
    const stat = statSync(path);
    if (!stat.isFile()) throw new Error('not a file');
    if (stat.size > MAX_FILE) throw new Error('larger than 2 GiB');
    file = readFileSync(path);
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new KvError('ERR_INNERKV_INVALID_ARGUMENT', `Cannot read ${path}: ${reason}.`, { cause });
  }
  return parseSafetensors(file, path);
}

/** float32 of a binary16 pattern. */
export function halfToFloat(bits: number): number {
  const exponent = (bits >> 10) & 31;
  const mantissa = bits & 1023;
  const magnitude =
    exponent === 0
      ? mantissa * 2 ** -24
      : exponent === 31
        ? mantissa === 0
          ? Infinity
          : NaN
        : (1024 + mantissa) * 2 ** (exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

/** The numbers of a F16, BF16, F32 or F64 tensor; undefined for other types. */
export function decodeFloats({ dtype, bytes }: TensorInfo): FloatArray | undefined {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (dtype === 'F64')
    return Float64Array.from({ length: bytes.byteLength / 8 }, (_, i) => view.getFloat64(8 * i, true));
  const out = new Float32Array(bytes.byteLength / (dtype === 'F32' ? 4 : 2));
  const bfloat = new DataView(new ArrayBuffer(4));
  const read: Partial<Record<string, (i: number) => number>> = {
    F32: (i) => view.getFloat32(4 * i, true),
    F16: (i) => halfToFloat(view.getUint16(2 * i, true)),
    BF16: (i) => {
      bfloat.setUint16(0, view.getUint16(2 * i, true)); // big-endian halves: the pattern is the upper one
      return bfloat.getFloat32(0);
    },
  };
  const element = read[dtype];
  if (!element) return undefined;
  for (let i = 0; i < out.length; i++) out[i] = element(i);
  return out;
}

/** A file of float32 tensors, in the order of the map. */
export function encodeSafetensors(
  tensors: ReadonlyMap<string, { readonly shape: readonly number[]; readonly data: Float32Array }>,
  metadata: Readonly<Record<string, string>> = {},
): Uint8Array {
  const header: Record<string, unknown> = { __metadata__: metadata };
  let at = 0;
  for (const [name, { shape, data }] of tensors) {
    header[name] = { dtype: 'F32', shape, data_offsets: [at, at + data.byteLength] };
    at += data.byteLength;
  }
  const json = new TextEncoder().encode(JSON.stringify(header));
  const headerBytes = Math.ceil(json.length / 8) * 8; // tensors start aligned; padding is spaces
  const file = new Uint8Array(8 + headerBytes + at);
  const view = new DataView(file.buffer);
  view.setBigUint64(0, BigInt(headerBytes), true);
  file.fill(0x20, 8, 8 + headerBytes).set(json, 8);
  at = 8 + headerBytes;
  for (const { data } of tensors.values())
    for (const value of data) {
      view.setFloat32(at, value, true);
      at += 4;
    }
  return file;
}
