/** Reading a file piece by piece, with every length checked against the file before anything is allocated. */
import { closeSync, fstatSync, openSync, readSync, statSync } from 'node:fs';
import { invalid } from '../errors';
import { corrupt } from './tensors';

/** Bytes that can be read anywhere. */
export interface Source {
  /** For messages, and where tensors will be mapped from. */
  readonly path: string;
  readonly size: number;
  /** Exactly `count` bytes from `at`, which lie inside. */
  read(at: number, count: number): Uint8Array;
}

export function memorySource(bytes: Uint8Array, path = 'The buffer'): Source {
  return { path, size: bytes.length, read: (at, count) => bytes.subarray(at, at + count) };
}

/** Calls `use` with the opened file and closes it. Only regular files are opened: a pipe could block forever. */
export function withFile<T>(path: string, use: (source: Source) => T): T {
  let file: number;
  try {
    if (!statSync(path).isFile()) throw new Error('it is not a file');
    file = openSync(path, 'r');
  } catch (cause) {
    throw unreadable(path, cause);
  }
  try {
    const { size } = fstatSync(file);
    return use({ path, size, read: (at, count) => readExactly(file, path, at, count) });
  } finally {
    closeSync(file);
  }
}

export function unreadable(path: string, cause: unknown): Error {
  const reason = cause instanceof Error ? cause.message : String(cause);
  return invalid(`Cannot read ${path}: ${reason}.`, { path });
}

function readExactly(file: number, path: string, at: number, count: number): Uint8Array {
  const bytes = new Uint8Array(count);
  for (let done = 0; done < count;) {
    let got: number;
    try {
      got = readSync(file, bytes, done, count - done, at + done);
    } catch (cause) {
      throw unreadable(path, cause);
    }
    if (got === 0) throw corrupt(path, `it became shorter than ${at + count} bytes while it was read`);
    done += got;
  }
  return bytes;
}

const WINDOW = 1 << 16;
/** Longer strings are not believed: the longest real ones are chat templates of some 10 KiB. */
const MAX_STRING = 1 << 24;
/** Nor are longer headers: the longest real ones, of 2^18 tokens, have some 20 MiB. */
const MAX_HEADER = 1 << 27;

/** Little-endian numbers and strings one after the other. Reading past the end is a KvError. */
export class Cursor {
  private window: Uint8Array = new Uint8Array(0);
  private view: DataView = new DataView(new ArrayBuffer(0));
  private start = 0;
  private readonly decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

  constructor(
    private readonly source: Source,
    /** Next byte. */
    public at = 0,
  ) {}

  get left(): number {
    return this.source.size - this.at;
  }

  u8(): number {
    return this.number(1, (view, at) => view.getUint8(at));
  }

  i8(): number {
    return this.number(1, (view, at) => view.getInt8(at));
  }

  u16(): number {
    return this.number(2, (view, at) => view.getUint16(at, true));
  }

  i16(): number {
    return this.number(2, (view, at) => view.getInt16(at, true));
  }

  u32(): number {
    return this.number(4, (view, at) => view.getUint32(at, true));
  }

  i32(): number {
    return this.number(4, (view, at) => view.getInt32(at, true));
  }

  u64(): bigint {
    return this.number(8, (view, at) => view.getBigUint64(at, true));
  }

  i64(): bigint {
    return this.number(8, (view, at) => view.getBigInt64(at, true));
  }

  f32(): number {
    return this.number(4, (view, at) => view.getFloat32(at, true));
  }

  f64(): number {
    return this.number(8, (view, at) => view.getFloat64(at, true));
  }

  /** A uint64 that is at most `most`, itself at most 2^53. */
  count(what: string, most: number): number {
    const low = this.u32();
    const value = low + 2 ** 32 * this.u32();
    if (value > most) throw corrupt(this.source.path, `${what} of ${value} cannot be (at most ${most})`);
    return value;
  }

  /** UTF-8 of `length` bytes. */
  text(length: number): string {
    if (length > MAX_STRING) throw corrupt(this.source.path, `it has a string of ${length} bytes`);
    const bytes = this.bytes(length);
    try {
      return this.decoder.decode(bytes);
    } catch (cause) {
      throw corrupt(this.source.path, `the string before byte ${this.at} is not UTF-8`, cause);
    }
  }

  /** `length` bytes, valid until the next call. */
  bytes(length: number): Uint8Array {
    if (length > WINDOW) {
      this.need(length);
      this.at += length;
      return this.source.read(this.at - length, length);
    }
    const from = this.take(length);
    return this.window.subarray(from, from + length);
  }

  private need(count: number): void {
    if (count > this.left)
      throw corrupt(this.source.path, `it ends at byte ${this.source.size}, before its header does`);
    if (this.at + count > MAX_HEADER)
      throw corrupt(this.source.path, `its header is longer than ${MAX_HEADER} bytes`);
  }

  private number<T>(count: number, get: (view: DataView, at: number) => T): T {
    const at = this.take(count); // may move the view
    return get(this.view, at);
  }

  /** Place in the window of the next `count` bytes. */
  private take(count: number): number {
    this.need(count);
    if (this.at + count > this.start + this.window.length) {
      this.start = this.at;
      this.window = this.source.read(this.at, Math.min(WINDOW, this.left));
      this.view = new DataView(this.window.buffer, this.window.byteOffset, this.window.byteLength);
    }
    this.at += count;
    return this.at - count - this.start;
  }
}
