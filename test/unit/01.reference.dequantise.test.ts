/** The dequantiser on blocks written by hand: values are stated, not computed by a second copy of the formula. */
import { blocks, dequantise, type StoredType } from '../reference/dequantise';

const ONE = [0x00, 0x3c]; // binary16
const HALF = [0x00, 0x38];
const MINUS_THREE = [0x00, 0xc2];

const zeros = (count: number) => new Array<number>(count).fill(0);
const values = (type: StoredType, ...bytes: number[]) => [...dequantise(type, Uint8Array.from(bytes))];
/** `count` zeros but for `given`. */
const sparse = (count: number, given: Record<number, number>, rest = 0) =>
  Array.from({ length: count }, (_, i) => given[i] ?? rest);

test('blocks have the published sizes', () => {
  for (const [type, { values: count, bytes }] of Object.entries(blocks)) {
    expect(dequantise(type as StoredType, new Uint8Array(3 * bytes))).toHaveLength(3 * count);
    expect(() => dequantise(type as StoredType, new Uint8Array(bytes + 1))).toThrow(RangeError);
  }
  const bitsPerValue = Object.values(blocks).map((block) => (8 * block.bytes) / block.values);
  expect(bitsPerValue).toEqual([32, 16, 16, 4.5, 5, 5.5, 6, 8.5, 4.5, 6.5625, 2]);
});

test('TERNARY: four to a byte, the first one highest, in two’s complement', () => {
  const found = values('TERNARY', 0b01_11_00_10, 0, 0, 0, 0, 0, 0, 0b00_00_00_11);
  expect(found).toEqual([1, -1, 0, -2, ...new Array<number>(27).fill(0), -1]);
});

test('plain numbers', () => {
  expect(values('F32', 0, 0, 0x80, 0x3f, 0, 0, 0x20, 0xc1)).toEqual([1, -10]);
  expect(values('F16', ...ONE, ...MINUS_THREE, 1, 0)).toEqual([1, -3, 2 ** -24]);
  expect(values('BF16', 0x80, 0x3f, 0x40, 0xc0, 0x80, 0x7f)).toEqual([1, -3, Infinity]);
});

test('Q4_0: nibbles around 8, low ones first', () => {
  const block = [...HALF, 0x0f, 0xf0, ...zeros(14).map(() => 0x88)];
  expect(values('Q4_0', ...block)).toEqual(sparse(32, { 0: 3.5, 1: -4, 16: -4, 17: 3.5 }, 0));
});

test('Q4_1: nibbles from the minimum up', () => {
  const block = [...HALF, ...MINUS_THREE, 0x4f, ...zeros(15)];
  expect(values('Q4_1', ...block)).toEqual(sparse(32, { 0: 4.5, 16: -1 }, -3));
});

test('Q5_0: bit i of the word is the fifth of value i', () => {
  const block = [...ONE, 0x01, 0x00, 0x02, 0x80, 0x0f, 0x10, ...zeros(13), 0x70];
  // Value 0: 16 + 15; 17: 16 + 1; 31: 16 + 7; the others 0.
  expect(values('Q5_0', ...block)).toEqual(sparse(32, { 0: 15, 17: 1, 31: 7 }, -16));
});

test('Q5_1: the same, from the minimum up', () => {
  const block = [...HALF, ...MINUS_THREE, 0x00, 0x80, 0x01, 0x00, 0x21, ...zeros(14), 0x05];
  // Value 0: 1; 15: 16 + 5; 16: 16 + 2.
  expect(values('Q5_1', ...block)).toEqual(sparse(32, { 0: -2.5, 15: 7.5, 16: 6 }, -3));
});

test('Q8_0: signed bytes', () => {
  const block = [...HALF, 127, 128, 255, ...zeros(28), 2];
  expect(values('Q8_0', ...block)).toEqual(sparse(32, { 0: 63.5, 1: -64, 2: -0.5, 31: 1 }));
});

test('Q4_K: eight runs of 32 with their own scale and minimum', () => {
  // Scales 1, 2, 3, 63 | 17, 32, 0, 55 and minima 4, 0, 0, 1 | 0, 48, 3, 0, by the packing of the two halves.
  const scales = [
    1 + 64 * (17 >> 4), 2 + 64 * (32 >> 4), 3, 63 + 64 * (55 >> 4), // scales 0 … 3, upper pairs of scales 4 … 7
    4, 0 + 64 * (48 >> 4), 0, 1, // minima 0 … 3, upper pairs of minima 4 … 7
    17 % 16, 0, 3 * 16, 55 % 16, // lower nibbles of scales and minima 4 … 7
  ]; // prettier-ignore
  const codes = [
    ...zeros(32).map(() => 0x21),
    ...zeros(32),
    ...zeros(32).map(() => 0x43),
    ...zeros(31),
    0xf0,
  ];
  const out = values('Q4_K', ...ONE, ...HALF, ...scales, ...codes);
  const run = (j: number) => out.slice(32 * j, 32 * j + 32);
  expect(run(0)).toEqual(zeros(32).map(() => 1 * 1 - 2));
  expect(run(1)).toEqual(zeros(32).map(() => 2 * 2));
  expect(run(2)).toEqual(zeros(32));
  expect(run(3)).toEqual(zeros(32).map(() => -0.5));
  expect(run(4)).toEqual(zeros(32).map(() => 17 * 3));
  expect(run(5)).toEqual(zeros(32).map(() => 32 * 4 - 24));
  expect(run(6)).toEqual(zeros(32).map(() => -1.5));
  expect(run(7)).toEqual(sparse(32, { 31: 55 * 15 }));
});

test('Q6_K: nibbles, pairs and scales of 16', () => {
  const low = sparse(128, { 0: 0x51, 32: 0x0f, 127: 0xf0 });
  const high = sparse(64, { 0: 0b10_01_00_11, 63: 0b11_00_00_00 });
  const scales = sparse(16, { 0: 1, 2: 2, 4: 3, 6: 0xff, 15: 0x80 });
  const out = values('Q6_K', ...low, ...high, ...scales, ...HALF);
  // Value 0: 1 + 48; 32: 15 + 0; 64: 5 + 16; 96: 0 + 32; 255: 15 + 48. The other codes are 0, that is -32.
  const expected = sparse(256, {});
  const runs: [number, number][] = [[0, 1], [2, 2], [4, 3], [6, -1], [15, -128]]; // prettier-ignore
  for (const [run, scale] of runs) for (let i = 0; i < 16; i++) expected[16 * run + i] = 0.5 * scale * -32;
  expected[0] = 0.5 * (49 - 32);
  expected[32] = 0.5 * 2 * (15 - 32);
  expected[64] = 0.5 * 3 * (21 - 32);
  expected[96] = 0;
  expected[255] = 0.5 * -128 * (63 - 32);
  expect(out.map((value) => value + 0)).toEqual(expected.map((value) => value + 0));
});
