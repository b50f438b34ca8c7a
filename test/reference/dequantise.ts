/**
 * Values of a model's stored tensors, block by block, in float64: every product is exact and the sums round once.
 * Source: the block definitions of the GGUF types (GGML_TYPE_*). Numbers are little-endian; d and m are binary16.
 *
 * | type | block | bytes | layout, in this order                                             | value                    |
 * | Q4_0 |  32 |  18 | d, 16 bytes: low nibbles are values 0 to 15, high ones 16 to 31     | d (q - 8)                |
 * | Q4_1 |  32 |  20 | d, m, 16 bytes likewise                                             | d q + m                  |
 * | Q5_0 |  32 |  22 | d, uint32 of the fifth bits (bit i of value i), 16 bytes likewise   | d (q - 16)               |
 * | Q5_1 |  32 |  24 | d, m, uint32 likewise, 16 bytes likewise                            | d q + m                  |
 * | Q8_0 |  32 |  34 | d, 32 int8                                                          | d q                      |
 * | Q4_K | 256 | 144 | d, m, 12 bytes: 8 scales and 8 minima of 6 bits, 128 bytes          | d scale q - m minimum    |
 * | Q6_K | 256 | 210 | 128 bytes of low nibbles, 64 of upper pairs, 16 int8 scales, d      | d scale (q - 32)         |
 * TERNARY: 32 numbers in 8 bytes, 2-bit two's complement, the first of four in the highest bits. Its scale is the tensor's.
 */
import { fromHalfBits } from './half';

/** Values and bytes of one block of each type. */
export const blocks = {
  F32: { values: 1, bytes: 4 },
  F16: { values: 1, bytes: 2 },
  BF16: { values: 1, bytes: 2 },
  Q4_0: { values: 32, bytes: 18 },
  Q4_1: { values: 32, bytes: 20 },
  Q5_0: { values: 32, bytes: 22 },
  Q5_1: { values: 32, bytes: 24 },
  Q8_0: { values: 32, bytes: 34 },
  Q4_K: { values: 256, bytes: 144 },
  Q6_K: { values: 256, bytes: 210 },
  TERNARY: { values: 32, bytes: 8 },
} as const;
export type StoredType = keyof typeof blocks;

type Block = (bytes: DataView, out: Float64Array) => void;

/** All values of `bytes`, which hold whole blocks. */
export function dequantise(type: StoredType, bytes: Uint8Array): Float64Array {
  const { values, bytes: size } = blocks[type];
  if (bytes.length % size !== 0) throw new RangeError(`${bytes.length} bytes are no whole blocks of ${type}`);
  const out = new Float64Array((bytes.length / size) * values);
  for (let i = 0; i * size < bytes.length; i++)
    decoders[type](
      new DataView(bytes.buffer, bytes.byteOffset + i * size, size),
      out.subarray(i * values, (i + 1) * values),
    );
  return out;
}

const half = (bytes: DataView, at: number) => fromHalfBits(bytes.getUint16(at, true));

/** Code `i` of 32 in 16 bytes from `at`. */
function nibble(bytes: DataView, at: number, i: number): number {
  const byte = bytes.getUint8(at + (i % 16));
  return i < 16 ? byte % 16 : Math.floor(byte / 16);
}

/** Bit `i` of the uint32 at `at`. */
function bit(bytes: DataView, at: number, i: number): number {
  return Math.floor(bytes.getUint32(at, true) / 2 ** i) % 2;
}

/** A bfloat16 is the upper half of a binary32. */
function bfloat(pattern: number): number {
  const word = new DataView(new ArrayBuffer(4));
  word.setUint16(0, pattern);
  return word.getFloat32(0);
}

/**
 * Scale and minimum of the j-th 32 values of a Q4_K block, 6 bits each, in 12 bytes at offset 4: the first four of
 * each are the low six bits of bytes 0 to 3 (scales) and 4 to 7 (minima); of the last four, bytes 8 to 11 hold the
 * low four bits (scale in the lower nibble), and the top pairs of bytes 0 to 7 their upper two.
 */
function scaleAndMinimum(bytes: DataView, j: number): [scale: number, minimum: number] {
  const at = (i: number) => bytes.getUint8(4 + i);
  if (j < 4) return [at(j) % 64, at(4 + j) % 64];
  const low = at(4 + j);
  return [(low % 16) + 16 * Math.floor(at(j - 4) / 64), Math.floor(low / 16) + 16 * Math.floor(at(j) / 64)];
}

const decoders: Record<StoredType, Block> = {
  F32: (bytes, out) => (out[0] = bytes.getFloat32(0, true)),
  F16: (bytes, out) => (out[0] = half(bytes, 0)),
  BF16: (bytes, out) => (out[0] = bfloat(bytes.getUint16(0, true))),
  Q4_0: (bytes, out) => {
    for (let i = 0; i < 32; i++) out[i] = half(bytes, 0) * (nibble(bytes, 2, i) - 8);
  },
  Q4_1: (bytes, out) => {
    for (let i = 0; i < 32; i++) out[i] = half(bytes, 0) * nibble(bytes, 4, i) + half(bytes, 2);
  },
  Q5_0: (bytes, out) => {
    for (let i = 0; i < 32; i++) out[i] = half(bytes, 0) * (nibble(bytes, 6, i) + 16 * bit(bytes, 2, i) - 16);
  },
  Q5_1: (bytes, out) => {
    for (let i = 0; i < 32; i++)
      out[i] = half(bytes, 0) * (nibble(bytes, 8, i) + 16 * bit(bytes, 4, i)) + half(bytes, 2);
  },
  Q8_0: (bytes, out) => {
    for (let i = 0; i < 32; i++) out[i] = half(bytes, 0) * bytes.getInt8(2 + i);
  },
  TERNARY: (bytes, out) => {
    const signed = [0, 1, -2, -1];
    for (let i = 0; i < 32; i++)
      out[i] = signed[Math.floor(bytes.getUint8(Math.floor(i / 4)) / 4 ** (3 - (i % 4))) % 4]!;
  },
  // Runs of 64 values share 32 bytes: the first 32 are their low nibbles, the others the high ones.
  Q4_K: (bytes, out) => {
    for (let i = 0; i < 256; i++) {
      const [scale, minimum] = scaleAndMinimum(bytes, Math.floor(i / 32));
      const byte = bytes.getUint8(16 + 32 * Math.floor(i / 64) + (i % 32));
      const code = i % 64 < 32 ? byte % 16 : Math.floor(byte / 16);
      out[i] = half(bytes, 0) * scale * code - half(bytes, 2) * minimum;
    }
  },
  // Runs of 128 values share 64 bytes of nibbles (low ones first) and 32 bytes of four upper pairs each.
  Q6_K: (bytes, out) => {
    for (let i = 0; i < 256; i++) {
      const run = Math.floor(i / 128);
      const place = i % 128;
      const low = bytes.getUint8(64 * run + (place % 64));
      const high = bytes.getUint8(128 + 32 * run + (place % 32));
      const code =
        (place < 64 ? low % 16 : Math.floor(low / 16)) +
        16 * (Math.floor(high / 4 ** Math.floor(place / 32)) % 4);
      out[i] = half(bytes, 208) * bytes.getInt8(192 + Math.floor(i / 16)) * (code - 32);
    }
  },
};
