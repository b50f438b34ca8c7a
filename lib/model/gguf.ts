/**
 * The GGUF container, versions 2 and 3, little-endian: "GGUF", uint32 version, uint64 counts of tensors and of
 * metadata, the metadata, the descriptions of the tensors, padding, data. Only the header is read. A file is hostile
 * until proven otherwise.
 */
import { Cursor, type Source } from './bytes';
import { corrupt, quoted, storedBytes, typeNamed, unsupported, type TensorInfo } from './tensors';

/** Integers beyond 2^53 stay bigint. */
export type GgufScalar = number | bigint | boolean | string;
export type GgufValue = GgufScalar | readonly GgufScalar[];

export interface Gguf {
  readonly path: string;
  readonly version: number;
  readonly metadata: ReadonlyMap<string, GgufValue>;
  readonly tensors: readonly TensorInfo[];
}

export const MAGIC = 0x46554747; // "GGUF"
const MAX_TENSORS = 1 << 17;
const MAX_METADATA = 1 << 16;
/** Of one list, and of all: the largest vocabularies have 2^18 tokens and about twice as many merges. */
const MAX_LIST = 1 << 21;
const MAX_ELEMENTS = 1 << 23;
const MAX_ALIGNMENT = 1 << 16;
const DEFAULT_ALIGNMENT = 32;

/** Names by number; undefined entries were never assigned or are gone. */
const typeNames: readonly (string | undefined)[] = [
  'F32', 'F16', 'Q4_0', 'Q4_1', undefined, undefined, 'Q5_0', 'Q5_1', 'Q8_0', 'Q8_1', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K',
  'Q6_K', 'Q8_K', 'IQ2_XXS', 'IQ2_XS', 'IQ3_XXS', 'IQ1_S', 'IQ4_NL', 'IQ3_S', 'IQ2_S', 'IQ4_XS', 'I8', 'I16', 'I32',
  'I64', 'F64', 'IQ1_M', 'BF16', undefined, undefined, undefined, 'TQ1_0', 'TQ2_0', undefined, undefined, undefined,
  'MXFP4',
]; // prettier-ignore

const STRING = 8;
const ARRAY = 9;
const scalars: Readonly<
  Record<number, { bytes: number; read: (cursor: Cursor, path: string) => GgufScalar }>
> = {
  0: { bytes: 1, read: (cursor) => cursor.u8() },
  1: { bytes: 1, read: (cursor) => cursor.i8() },
  2: { bytes: 2, read: (cursor) => cursor.u16() },
  3: { bytes: 2, read: (cursor) => cursor.i16() },
  4: { bytes: 4, read: (cursor) => cursor.u32() },
  5: { bytes: 4, read: (cursor) => cursor.i32() },
  6: { bytes: 4, read: (cursor) => cursor.f32() },
  7: { bytes: 1, read: boolean },
  [STRING]: { bytes: 8, read: readString },
  10: { bytes: 8, read: (cursor) => narrow(cursor.u64()) },
  11: { bytes: 8, read: (cursor) => narrow(cursor.i64()) },
  12: { bytes: 8, read: (cursor) => cursor.f64() },
};

function boolean(cursor: Cursor, path: string): boolean {
  const value = cursor.u8();
  if (value > 1) throw corrupt(path, `the truth value before byte ${cursor.at} is ${value}`);
  return value === 1;
}

function narrow(value: bigint): number | bigint {
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : value;
}

function readString(cursor: Cursor): string {
  return cursor.text(cursor.count('a string length', Math.max(0, cursor.left - 8)));
}

/** `budget` is what is left of MAX_ELEMENTS. */
function readValue(cursor: Cursor, path: string, budget: { left: number }): GgufValue {
  const type = cursor.u32();
  if (type !== ARRAY) return scalar(type, path).read(cursor, path);
  const itemType = cursor.u32();
  if (itemType === ARRAY) throw unsupported(path, 'its metadata have arrays of arrays');
  const item = scalar(itemType, path);
  const count = cursor.count('an array', Math.min(MAX_LIST, budget.left));
  budget.left -= count;
  if (count * item.bytes > cursor.left) throw corrupt(path, `an array of ${count} ends behind the file`);
  // Grown as it is read: the length is only a claim until then.
  const values: GgufScalar[] = [];
  for (let i = 0; i < count; i++) values.push(item.read(cursor, path));
  return values;
}

function scalar(type: number, path: string) {
  const known = Object.hasOwn(scalars, type) ? scalars[type] : undefined;
  if (!known) throw corrupt(path, `its metadata have a value of the unknown type ${type}`);
  return known;
}

/** Reads the header of `source`. */
export function parseGguf(source: Source): Gguf {
  const { path, size } = source;
  const cursor = new Cursor(source);
  if (size < 24) throw corrupt(path, `${size} bytes are too few for GGUF`);
  if (cursor.u32() !== MAGIC) throw corrupt(path, 'it does not begin with "GGUF"');
  const version = cursor.u32();
  if (version === 1 || (version % 65536 === 0 && version !== 0))
    throw unsupported(path, version === 1 ? 'GGUF version 1 is out of use' : 'it is a big-endian GGUF');
  if (version !== 2 && version !== 3)
    throw unsupported(path, `it is GGUF version ${version}; 2 and 3 are known`);
  const tensorCount = cursor.count('a count of tensors', MAX_TENSORS);
  const metadataCount = cursor.count('a count of metadata', MAX_METADATA);

  const metadata = new Map<string, GgufValue>();
  const budget = { left: MAX_ELEMENTS };
  for (let i = 0; i < metadataCount; i++) {
    const key = readString(cursor);
    if (metadata.has(key)) throw corrupt(path, `its metadata have ${quoted(key)} twice`);
    metadata.set(key, readValue(cursor, path, budget));
  }
  const alignment = metadata.get('general.alignment') ?? DEFAULT_ALIGNMENT;
  if (
    typeof alignment !== 'number' ||
    !(alignment >= 8 && alignment <= MAX_ALIGNMENT && Number.isInteger(Math.log2(alignment)))
  )
    throw corrupt(path, `its alignment must be a power of two from 8 to ${MAX_ALIGNMENT}`);

  const descriptions = new Map<string, Description>();
  for (let i = 0; i < tensorCount; i++) {
    const description = readDescription(cursor, path);
    if (descriptions.has(description.name))
      throw corrupt(path, `it has tensor ${quoted(description.name)} twice`);
    descriptions.set(description.name, description);
  }
  const dataAt = Math.ceil(cursor.at / alignment) * alignment;
  return { path, version, metadata, tensors: place([...descriptions.values()], dataAt, alignment, source) };
}

type Description = Omit<TensorInfo, 'path'>;

function readDescription(cursor: Cursor, path: string): Description {
  const name = readString(cursor);
  const bad = (problem: string) => corrupt(path, `tensor ${quoted(name)} ${problem}`);
  const rank = cursor.u32();
  if (rank < 1 || rank > 4) throw bad(`has ${rank} dimensions`);
  const shape: number[] = [];
  for (let i = 0; i < rank; i++) shape.unshift(cursor.count('a dimension', Number.MAX_SAFE_INTEGER));
  const number = cursor.u32();
  const typeName = typeNames[number];
  const type = typeName === undefined ? undefined : typeNamed(typeName);
  if (type === undefined)
    throw typeName === undefined
      ? bad(`has the unknown type ${number}`)
      : unsupported(path, `tensor ${quoted(name)} is stored as ${typeName}`, { type: typeName });
  const offset = cursor.count('an offset', Number.MAX_SAFE_INTEGER);
  const bytes = storedBytes(type, shape);
  if (bytes === undefined) throw bad(`cannot be ${type} of shape [${shape.join(', ')}]`);
  return { name, type, shape, offset, bytes };
}

/** Tensors at their places in the file: inside it, aligned, apart. */
function place(
  descriptions: readonly Description[],
  dataAt: number,
  alignment: number,
  { path, size }: Source,
): TensorInfo[] {
  const tensors = descriptions.map((tensor) => ({ ...tensor, path, offset: dataAt + tensor.offset }));
  let end = dataAt;
  for (const { name, offset, bytes } of tensors.toSorted((a, b) => a.offset - b.offset)) {
    if (!(offset + bytes <= size))
      throw corrupt(path, `tensor ${quoted(name)} ends at byte ${offset + bytes} of ${size}: it is cut off`);
    if (offset % alignment !== 0)
      throw corrupt(path, `tensor ${quoted(name)} is not aligned to ${alignment}`);
    if (offset < end) throw corrupt(path, `tensor ${quoted(name)} overlaps another`);
    end = offset + bytes;
  }
  return tensors;
}
