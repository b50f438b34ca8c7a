/**
 * IEEE binary16 by plain arithmetic: no table, no bit tricks on the float32 pattern.
 * Source: docs/format.md section 1 (half(x)); IEEE 754-2019, section 3.4.
 */

// Bound once: in the tests' sandbox every look-up of a global is slow.
const { abs, floor } = Math;
const { isNaN } = Number;

/** Largest finite binary16 magnitude. */
export const MAX_HALF = 65504;

/** Smallest positive (subnormal) binary16 magnitude, 2^-24. */
export const MIN_HALF = 2 ** -24;

/** Bits of x rounded to binary16, ties to even; magnitudes above 65504 saturate to 65504. NaN gives 0x7e00. */
export function toHalfBits(x: number): number {
  const bits = toHalfBitsIeee(x);
  return (bits & 0x7fff) === 0x7c00 ? (bits & 0x8000) | 0x7bff : bits;
}

/** The same without saturation: magnitudes of 65520 and above become infinite. */
export function toHalfBitsIeee(x: number): number {
  if (isNaN(x)) return 0x7e00;
  const sign = x < 0 || (x === 0 && 1 / x < 0) ? 0x8000 : 0;
  const magnitude = abs(x);
  if (magnitude >= 65520) return sign | 0x7c00;

  let exponent = -14; // the exponent of the binade, or of all subnormals
  let unit = MIN_HALF; // 2 ** (exponent - 10), always exact
  for (; magnitude >= 2048 * unit; unit *= 2) exponent++;
  const units = roundTiesToEven(magnitude / unit); // 0 ... 2048, exact quotient
  // Binade `exponent` begins at (exponent + 14) * 1024 + 1024; subnormals begin at 0. A carry to 2048 lands right.
  return sign | ((exponent + 14) * 1024 + units);
}

/** Value of a binary16 pattern (infinities and NaN included); other numbers are none. */
export function fromHalfBits(bits: number): number {
  return VALUES[bits]!;
}

const VALUES = Float64Array.from({ length: 65536 }, (_, bits) => valueOf(bits));

function valueOf(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction === 0 ? sign * Infinity : NaN;
  if (exponent === 0) return sign * fraction * MIN_HALF;
  return sign * (1024 + fraction) * 2 ** (exponent - 25);
}

/** half(x) as a number. */
export function roundToHalf(x: number): number {
  return fromHalfBits(toHalfBits(x));
}

function roundTiesToEven(x: number): number {
  const below = floor(x);
  const rest = x - below;
  if (rest !== 0.5) return rest < 0.5 ? below : below + 1;
  return below % 2 === 0 ? below : below + 1;
}

/** Little-endian 16-bit entry `index` of a section. */
export function putHalf(bytes: Uint8Array, index: number, bits: number): void {
  bytes[2 * index] = bits & 255;
  bytes[2 * index + 1] = bits >> 8;
}

export function getHalf(bytes: Uint8Array, index: number): number {
  return bytes[2 * index]! | (bytes[2 * index + 1]! << 8);
}
