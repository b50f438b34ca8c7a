/** Writes a ternary checkpoint: hidden, intermediate, layers, query heads, KV heads, vocabulary, context. Matrix i has the scale i + 1. */
import { type Llama2cHeader } from './llama2c';

export interface BitllamaChanges {
  readonly version?: number;
  readonly flag?: number;
  /** Bytes too many. */
  readonly extra?: number;
}

export function writeBitllama(header: Llama2cHeader, changes: BitllamaChanges = {}): Uint8Array {
  const { version = 1, flag = 1, extra = 0 } = changes;
  const [hidden, intermediate, layers, queryHeads, kvHeads, vocabulary] = header;
  const kv = (hidden / queryHeads) * kvHeads;
  const sizes = [hidden * hidden, kv * hidden, kv * hidden, hidden * hidden]
    .concat(Array<number>(3).fill(hidden * intermediate))
    .flatMap((size) => Array<number>(layers).fill(size));
  const floats = 256 + 4 * hidden * (1 + vocabulary);
  const bytes = new Uint8Array(sizes.reduce((sum, size) => sum + 4 + size / 4, floats) + extra);
  const view = new DataView(bytes.buffer);
  [0x616b3432, version, ...header].forEach((value, i) => view.setInt32(4 * i, value, true));
  bytes[36] = flag;
  sizes.reduce((at, size, i) => {
    view.setFloat32(at, i + 1, true);
    return at + 4 + size / 4;
  }, floats);
  return bytes;
}
