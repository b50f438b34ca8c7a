/** Outliers of a token, and their rows in a page in CSR form. Source: docs/format.md section 8. */
import { getHalf, putHalf } from './half';
import { PAGE_TOKENS } from './types';

const { abs, max, min } = Math;

/** One outlier of a row: `valueBits` (binary16) is added to the dense value of `channel`. */
export interface Outlier {
  readonly channel: number;
  readonly valueBits: number;
}

/** Where the `count` outliers of a token are, ascending, and what is rounded in its stead. */
export function takeOutliers(
  x: Float32Array,
  count: number,
  groups: readonly { start: number; end: number }[],
): { channels: number[]; rest: Float32Array } {
  const byMagnitude = [...x.keys()].sort((a, b) => abs(x[b]!) - abs(x[a]!) || a - b);
  const channels = byMagnitude.slice(0, count).sort((a, b) => a - b);
  const rest = Float32Array.from(x);
  for (const { start, end } of groups) {
    const others = [...x.keys()].slice(start, end).filter((c) => !channels.includes(c));
    const low = others.reduce((a, c) => min(a, x[c]!), Infinity);
    const high = others.reduce((a, c) => max(a, x[c]!), -Infinity);
    for (const c of channels) if (c >= start && c < end) rest[c] = min(max(x[c]!, low), high) + 0; // no -0
  }
  return { channels, rest };
}

/** Bytes of one row start. */
function startBytes(capacity: number): number {
  return capacity <= 255 ? 1 : 2;
}

/** Where the values begin: after 129 row starts and `capacity` channels, at an even byte. */
function valuesAt(capacity: number): number {
  const end = (PAGE_TOKENS + 1) * startBytes(capacity) + capacity;
  return end + (end % 2);
}

/** Bytes of the section, a multiple of 64. */
export function outlierBytes(capacity: number): number {
  return Math.ceil((valuesAt(capacity) + 2 * capacity) / 64) * 64;
}

/** rows [slot], up to 128 of them, each ascending by channel; starts beyond the last row that is there are zero. */
export function encodeOutliers(
  rows: readonly (readonly Outlier[] | undefined)[],
  capacity: number,
): Uint8Array {
  const bytes = new Uint8Array(outlierBytes(capacity));
  const indices = (PAGE_TOKENS + 1) * startBytes(capacity);
  const values = bytes.subarray(valuesAt(capacity));
  let entry = 0;
  const used = rows.findLastIndex((row) => row !== undefined) + 1;
  for (let row = 0; row < used; row++) {
    putStart(bytes, capacity, row, entry);
    let last = -1;
    for (const { channel, valueBits } of rows[row] ?? []) {
      if (channel <= last) throw new Error(`channels of row ${row} do not ascend`);
      if (entry === capacity) throw new Error(`more than ${capacity} outliers`);
      bytes[indices + entry] = channel;
      putHalf(values, entry, valueBits);
      last = channel;
      entry++;
    }
  }
  putStart(bytes, capacity, used, entry);
  return bytes;
}

export function decodeOutliers(bytes: Uint8Array, capacity: number): Outlier[][] {
  const indices = (PAGE_TOKENS + 1) * startBytes(capacity);
  const values = bytes.subarray(valuesAt(capacity));
  return Array.from({ length: PAGE_TOKENS }, (_, row) => {
    const outliers: Outlier[] = [];
    for (let entry = getStart(bytes, capacity, row); entry < getStart(bytes, capacity, row + 1); entry++)
      outliers.push({ channel: bytes[indices + entry]!, valueBits: getHalf(values, entry) });
    return outliers;
  });
}

function putStart(bytes: Uint8Array, capacity: number, row: number, start: number): void {
  if (startBytes(capacity) === 1) bytes[row] = start;
  else putHalf(bytes, row, start);
}

function getStart(bytes: Uint8Array, capacity: number, row: number): number {
  return startBytes(capacity) === 1 ? bytes[row]! : getHalf(bytes, row);
}
